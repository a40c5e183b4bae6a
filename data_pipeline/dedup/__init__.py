"""Keeps one document of each group of near-duplicates.

Imports `similarity`, `runner` and `records`. Begin with `stage.py`; `index.py` holds the signatures
on disk.
"""
