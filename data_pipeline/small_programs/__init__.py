"""A small world of programs: typed operations composed into functions, and texts about them.

TinyStories composes stories from the words of a small child; here exercises, textbook sections and
test suites are composed from some two hundred primitive operations. A program does what a language
model does at full size, and knows the truth. Everything is a pure function of (seed, options).
Begin with `options.py`, then `world.py` (which compositions there are, and which are held out),
`exercise.py`, `textbook.py` and `suite.py`; `stage.py` makes records of them. May import
`data_pipeline.records`, `data_pipeline.runner` and `megaphi`.
"""
