"""How alike two texts or two functions are: digests, shingles, MinHash, syntax trees.

Pure functions; imports the types of `records` only. Begin with `shingles.py` and `minhash.py` for
texts, with `ast_match.py` for functions.
"""
