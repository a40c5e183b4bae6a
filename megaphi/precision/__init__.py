"""Number formats: which one a run computes in, fp16's loss scale, FP8 layers.

Imports `model` (its linear layers) and `parallel`. Begin with `policy.py`; `fp8_choice.py` leads to
the FP8 layers.
"""
