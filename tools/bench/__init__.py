"""`megaphi bench`: rates of data, kernels and training, next to the installed peers.

Imports what it measures. Begin with `command.py`; each of the three rooms holds one subject and has
a `command.py` of its own.
"""
