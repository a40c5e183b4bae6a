"""Keeps one document of each group of near-duplicates.

Imports `similarity` and `runner`. Begin with `stage.py`; `index.py` holds the signatures on disk.
"""
