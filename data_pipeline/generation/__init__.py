"""A language model writes textbooks and exercises from a plan.

Imports `llm` and `runner`. Begin with `plan.py` (what to ask for), then `stage.py` (asking),
`check.py` and `execute.py` (what is kept).
"""
