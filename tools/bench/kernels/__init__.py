"""Times of single operations on a GPU, next to torch.compile and Liger.

Imports `kernels` and `megaphi.model`. Begin with `command.py`; `cases.py` lists the operations.
"""
