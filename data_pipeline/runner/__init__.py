"""Runs a stage over shards, resumably: process pool, Ray or Slurm; publishes, counts rejects.

Imports `records` only. Begin with `stage.py`; `output.py` says what a finished directory is.
"""
