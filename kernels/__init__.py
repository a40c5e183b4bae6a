"""The operations of the training step: call them through `kernels.ops`.

`reference` defines each in plain PyTorch, one file an operation holds its Triton kernels, and
`dispatch` says which of the two runs.
"""
