"""Tokenizers and token files: records in, Megatron's `.bin` and `.idx` out.

Imports `ingest` (licences), `runner` and `records`, and is the only room here that imports
`megaphi.data`. Begin with `tokenize_records.py`.
"""
