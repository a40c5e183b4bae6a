"""Optimizer, schedule and gradient clipping.

Imports `kernels` for the update and `parallel` for the processes. Begin with `adamw.py`;
`schedule.py` has the learning rate.
"""
