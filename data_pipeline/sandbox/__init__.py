"""Runs programs that nobody has read: bubblewrap, system call filter, limits, and a judge outside.

Imports nothing of this package and no torch. Begin with `executor.py`, then `sandbox.py`; the files
`candidate.py`, `judge.py`, `plain_values.py` and `zygote.py` run inside of the sandbox.
"""
