"""`megaphi data run`: complete corpora from one recipe, resumable, with estimates.

Imports the table of stages and options of `tools.data`. Begin with `recipe.py`, then `command.py`.
"""
