"""`megaphi reproduce`: a paper's claim as an experiment that anyone reruns, in a small world.

Calls the other verbs as a user would, one process per step; imports `tools.evaluation` (intervals),
`tools.bench` (the machine) and what reads records and logs. Begin with `figure.py`, which says what
is compared; `jobs.py` runs it, `result.py` reads the scores, `page.py` draws them.
"""
