"""FLOPs, throughput, and the log of a run: rows, TensorBoard, the console.

Imports `config`, `durable` and `errors` only. Begin with `logger.py`; `flops.py` counts operations.
"""
