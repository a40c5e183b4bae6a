"""Asking a language model: requests, prices and limits, a ledger that no crash makes pay twice.

Imports `runner` and `records`. Begin with `session.py`, which the stages use; `client.py` sends a
request, `ledger.py` remembers it, and `batch/` is the Batch API.
"""
