"""Token files, sample order and the batch loader.

Imports `config`, `device`, `durable` and `errors` only. Begin with `loader.py`; it reads the
samples of `dataset.py` and `blend.py`, and those read `indexed.py`, the token file.
"""
