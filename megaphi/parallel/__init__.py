"""How processes are arranged, and what tensor and context parallelism do inside of a layer.

Imports `kernels`, `config` and `device`. Begin with `mesh.py`, then `tensor.py` and `context.py`.
What wraps the model (`parallelize`, pipelines) is in `training/`, since it imports the model.
"""
