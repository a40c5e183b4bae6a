"""Our top-level packages have common names: make sure that Python finds ours.

`kernels` and `tools` are also names on the package index, and `python -m` looks in the current
folder first, where a user may well have a package `tools`.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

from megaphi.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds all four packages: a checkout, or site-packages."""


def check_ours(name: str) -> None:
    """Refuse to run with another package of this name.

    Raises:
        RunError: names the package that Python would import.
    """
    found = _location(name)
    ours = ROOT / name / "__init__.py"
    if found != ours:
        raise RunError(
            f"Python finds another package called {name} ({found}) before megaphi's ({ours}); "
            "uninstall it or give megaphi an environment of its own"
        )


def prefer_ours(*names: str) -> None:
    """Let our packages be found before others of the same names, for this process.

    Raises:
        RunError: another one was imported already.
    """
    if any(_location(name) != ROOT / name / "__init__.py" for name in names):
        sys.path.insert(0, str(ROOT))
        importlib.invalidate_caches()
    for name in names:
        check_ours(name)


def _location(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).resolve() if spec is not None and spec.origin else None
