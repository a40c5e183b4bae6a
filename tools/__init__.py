"""The `megaphi` command line: one module a verb."""
