"""megaphi: train phi-1 and its like, from token files to a checkpoint that others can load."""

__version__ = "0.1.0"
