"""Turns raw files (folders, archives, JSONL, Parquet, dumps, the hub) into records.

Imports `records` and `runner`. Begin with `stage.py`, then `sources.py`, which knows the formats.
Each other file reads one kind of source.
"""
