"""`megaphi train RECIPE.yaml [--section.key=value …]`: one process; torchrun starts several."""

from megaphi.train import run


def main(argv: list[str]) -> int:
    """Train a recipe in this process and return the exit status."""
    return run(argv)
