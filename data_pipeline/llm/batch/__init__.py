"""The Batch API of OpenAI-compatible servers: half the price, answers within a day.

Belongs to `llm`. Begin with `run.py`; `journal.py` is what survives a crash.
"""
