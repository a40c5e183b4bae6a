"""Token files, sample order and the batch loader."""
