"""Rates of the data path: tokenizing, sample order, loading, corpus stages."""
