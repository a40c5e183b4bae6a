"""Rates of the data path: tokenizing, sample order, loading, corpus stages.

Imports `data_pipeline` and `megaphi.data`. Begin with `command.py`.
"""
