"""The phi model: blocks, attention, rotary embedding, initialisation and loss."""

import importlib.util
from pathlib import Path

from megaphi.errors import RunError


def _check_kernels_are_ours() -> None:
    """Refuse another package called `kernels`: the name is also one on the package index.

    Raises:
        RunError: names the package that Python would import.
    """
    ours = Path(__file__).resolve().parents[2] / "kernels" / "__init__.py"
    spec = importlib.util.find_spec("kernels")
    found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
    if found != ours:
        raise RunError(
            f"Python finds another package called kernels ({found}) before megaphi's ({ours}); "
            "uninstall it or give megaphi an environment of its own"
        )


_check_kernels_are_ours()
