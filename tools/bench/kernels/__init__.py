"""Times of single operations on a GPU, next to torch.compile and Liger."""
