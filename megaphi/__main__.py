"""The `megaphi` command, also as `python -m megaphi`; its verbs are in the package `tools`.

Unlike `python -m tools.cli` it works in a folder that has a package `tools` of its own.
"""

import importlib
import sys

from megaphi.errors import EXIT_FAILED, RunError
from megaphi.own_packages import prefer_ours


def main() -> int:
    """Run the command line and return the exit status."""
    try:
        prefer_ours("tools", "data_pipeline", "kernels")
    except RunError as error:
        print(f"megaphi: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    # by name, since imports otherwise only run from tools to megaphi
    status: int = importlib.import_module("tools.cli").main()
    return status


if __name__ == "__main__":
    sys.exit(main())
