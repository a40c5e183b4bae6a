"""The `megaphi` command line: a file, or a room with a command module, for each verb.

Imports everything, and nothing imports it. Begin with `cli.py`, which has the table of verbs.
"""
