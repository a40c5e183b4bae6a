"""Publishing, verifying and loading the checkpoints of a run.

Imports `formats` (the files), `model`, `parallel` and `data`. Begin with `manager.py`, which the
trainer uses; `resume.py` says what a checkpoint and a run must agree in.
"""
