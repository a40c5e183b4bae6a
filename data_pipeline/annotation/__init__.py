"""A language model judges documents: prompts go out, labels come back and are checked.

Imports `llm`, `similarity`, `runner` and `records`. Begin with `stage.py`; `agreement.py` and
`canaries.py` say how far the labels can be trusted.
"""
