"""The operations of the training step: call them through `kernels.ops`.

Imports nothing of this repository. `reference.py` defines each operation in plain PyTorch, one file
for each operation holds its Triton kernels, and `dispatch.py` says which of the two runs.
"""
