"""The record: one document as a JSON line with its provenance, and the files that hold records.

Imports no other room of this package. Begin with `record.py`.
"""
