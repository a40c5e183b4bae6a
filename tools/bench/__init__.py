"""`megaphi bench`: rates of data, kernels and training, next to the installed peers.

Begin with `command.py`; each of the three rooms holds one subject.
"""
