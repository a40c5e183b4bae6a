"""Runs a test file's numerics in Triton's interpreter, which needs a process of its own."""

import re
import subprocess
import sys

from tests.helpers import child_environment


def assert_passes_in_the_interpreter(selection: list[str], at_least: int) -> None:
    """Run pytest in a child where Triton interprets, and check that it really tested something.

    Args:
        selection: pytest's arguments: the file and what of it to run.
        at_least: tests that must have passed; none may be skipped.
    """
    environment = {**child_environment(), "TRITON_INTERPRET": "1", "MEGAPHI_KERNELS": "triton"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *selection],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-1000:]
    assert int(passed.group(1)) >= at_least
    assert "skipped" not in done.stdout
