"""What this machine has: `megaphi doctor` and `megaphi preflight`.

Imports what decides in a run (`megaphi.model`, `megaphi.precision`), to say what it would decide.
Begin with `doctor.py` or `preflight.py`.
"""
