"""`megaphi evaluate`: scores of generated programs: suites, completions, pass@k, reports.

Imports `data_pipeline.sandbox`, where the programs run, `megaphi.generate` and `megaphi.formats`.
Begin with `command.py`.
"""
