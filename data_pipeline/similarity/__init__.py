"""How alike two texts or two functions are: digests, shingles, MinHash, syntax trees.

Pure functions; imports nothing of this package. `dedup`, `decontaminate` and `report` build on it.
"""
