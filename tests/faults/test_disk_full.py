"""A disk that is full, broken or read-only at any moment of a save: named, cleaned up, survived."""

import pytest

from tests.faults.save_trials import Outcome, Saves, failing_disk, full_disk, long_files
from tests.helpers import short_and_slow


def assert_survived(outcome: Outcome, trials: int) -> None:
    assert outcome.violations == []
    assert outcome.trials >= trials


@pytest.mark.parametrize("asynchronous", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("name", short_and_slow(["ENOSPC"], ["EROFS", "EIO"]))
def test_from_any_call_on_the_disk_refuses(saves: Saves, name: str, asynchronous: bool) -> None:
    """The error says which and where; older checkpoints stay; the next save works."""
    assert_survived(failing_disk(saves, asynchronous, [name]), 40)


@pytest.mark.parametrize("inodes", [False, True], ids=["bytes", "files"])
def test_a_small_file_system_runs_out(saves: Saves, inodes: bool) -> None:
    """Every amount of free space from nothing to enough, on a file system of its own."""
    outcome = full_disk(saves, asynchronous=inodes, inodes=inodes)
    if outcome is None:
        pytest.skip("no tmpfs can be mounted here; that needs root")
    assert_survived(outcome, 8)


def test_a_limit_on_the_length_of_files(saves: Saves) -> None:
    assert_survived(long_files(saves, asynchronous=False), 9)
