"""Tokens per second of training steps, next to transformers under torch.compile.

Imports `megaphi.training`. Begin with `command.py`, which starts `worker.py` in processes of its
own.
"""
