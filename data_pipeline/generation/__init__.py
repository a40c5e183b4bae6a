"""A language model writes textbooks and exercises from a plan.

Imports `llm`, `sandbox`, `tokens`, `similarity`, `runner` and `records`. Begin with `plan.py` (what
to ask for), then `stage.py` (asking), `check.py` and `execute.py` (what is kept).
"""
