"""What `megaphi plan` computes: layouts, memory, time; models of the trainer, not parts of it."""
