"""`megaphi data`: the command line of the corpus stages.

Imports the options of a stage when its verb is called, and the stage when it runs. Begin with
`parser.py`, which has the table of stages; `stage_options.py` makes the command line of a stage
from its options, and `run/` has the recipes. The work itself is done in `data_pipeline/`.
"""
