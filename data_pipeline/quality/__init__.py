"""phi-1's quality filter: a random forest trained on a language model's judgements of documents."""
