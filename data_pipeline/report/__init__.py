"""The corpus report: how diverse a corpus is, how much of it repeats, what it covers.

Imports `dedup`, `similarity`, `runner` and `records`. Begin with `build.py`; `scan.py` reads the
records, `measures.py` has the measures, `page.py` writes them.
"""
