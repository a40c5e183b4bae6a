"""Tokenizers and token files: records in, Megatron's `.bin` and `.idx` out.

The only room here that imports `megaphi.data`. Begin with `tokenize_records.py`.
"""
