"""Corpus stages as pure functions over records, and the engines that run them.

Imports `megaphi`, never `tools`. Begin with `records/record.py`, then `runner/stage.py`; a small
stage is `dedup/stage.py`, and `docs/architecture.md` has the order of the rooms.
"""
