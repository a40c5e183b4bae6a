"""What a process keeps of the memory that it frees, counted in page faults."""

import subprocess
import sys

import pytest

from tests.helpers import child_environment

PROGRAM = """if True:
    import resource
    import sys
    from megaphi.allocator import keep_freed_memory

    took = keep_freed_memory() if sys.argv[1] == "kept" else None

    def step():
        return [bytearray(16 << 20) for _ in range(8)]

    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    print(took, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> tuple[str, int]:
    """What `keep_freed_memory` returned, and the pages that five steps of 128 MiB made anew."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    took, count = done.stdout.split()
    return took, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_used_again() -> None:
    took, kept = faults("kept")
    if took == "False":
        pytest.skip("the C library is not glibc")
    assert kept * 10 < faults("default")[1]
