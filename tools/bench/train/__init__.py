"""Tokens per second of training steps, next to transformers under torch.compile."""
