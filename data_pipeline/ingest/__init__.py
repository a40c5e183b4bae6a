"""Turns raw files (folders, archives, JSONL, Parquet, dumps, the hub) into records.

Imports `records` and `runner`. Begin with `stage.py`, then `sources.py`, which finds the files and
tells their kind by their name, and `readers.py`, which has one reader for each kind.
"""
