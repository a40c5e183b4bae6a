"""Cheap rules over single documents: quality signals, secrets, personal data.

Imports `runner` and `records`. Begin with `stage.py`; the thresholds are in `heuristics.yaml`.
"""
