"""`megaphi data`: the command line of the corpus stages.

Begin with `command.py`. `verbs/` has one file per stage, `options/` what several stages share,
`run/` the recipes of `megaphi data run`. The work itself is done in `data_pipeline/`.
"""
