"""Removes documents that contain a benchmark's problems or their solutions.

Imports `quality` (embeddings), `similarity`, `runner` and `records`. Begin with `stage.py`;
`benchmarks.py` reads HumanEval and MBPP, `report.py` writes what was found.
"""
