"""phi-1's quality filter: a random forest trained on a language model's judgements of documents.

Imports `annotation` (labels), `tokens`, `similarity`, `runner`, `records`, and `megaphi.formats`
for the models that embed texts. Begin with `train_filter.py`, then `filter.py`.
"""
