"""The Batch API of OpenAI-compatible servers: half the price, answers within a day.

Belongs to `llm`. Begin with `run.py`; what survives a crash is in `batch_journal.py`, next to the
ledger.
"""
