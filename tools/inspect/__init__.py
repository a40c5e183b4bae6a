"""`megaphi inspect`: what a file or folder is, and whether it is complete.

Imports `megaphi.formats`, `megaphi.data` and `megaphi.metrics`. Begin with `command.py`.
"""
