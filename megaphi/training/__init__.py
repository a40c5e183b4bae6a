"""A training run: build order, loop, one step, evaluation, what is reported.

The top room of `megaphi`; it may import all others. Begin with `trainer.py`;
`docs/one-step.md` walks through a step.
"""
