"""`megaphi inspect`: what a file or folder is, and whether it is complete.

Begin with `command.py`.
"""
