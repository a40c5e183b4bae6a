"""What `megaphi plan` computes: layouts, memory, time; models of the trainer, not parts of it.

Imports `megaphi.config`, `megaphi.model` (shapes) and `megaphi.metrics`. Begin with `command.py`,
then `layout.py`.
"""
