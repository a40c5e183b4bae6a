"""Entry point of training: `torchrun … -m megaphi.train RECIPE.yaml --section.key=value …`.

With one process no launcher is needed: `python -m megaphi.train` or `megaphi train`.
"""

import sys

from megaphi.errors import EXIT_OK, run_main
from megaphi.metrics.console import outlive_readers
from megaphi.recipe_file import load_recipe
from megaphi.resilience.signals import StopRequest


def main(argv: list[str]) -> int:
    """Train the recipe that `argv` describes.

    Raises:
        ValueError: the recipe or what it names does not fit.
        RunError: the run failed.
        Preempted: the run was asked to stop and has saved a checkpoint.
    """
    recipe = load_recipe(argv)
    outlive_readers()
    stop = StopRequest()
    # torch takes seconds to import; a wrong recipe should not
    from megaphi.parallel.mesh import processes
    from megaphi.training.trainer import Trainer

    stop.check()
    with processes(recipe.parallel) as mesh:
        Trainer(recipe, mesh, stop).run()
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
