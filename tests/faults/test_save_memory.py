"""Saving again and again needs no more memory than saving once."""

from tests.faults.save_trials import Saves, save_memory


def test_memory_does_not_grow(saves: Saves) -> None:
    """Peak: the state, a snapshot of it, and one file at a time. 50 saves warm caches up."""
    outcome = save_memory(saves, asynchronous=True, count=120)
    assert outcome.violations == []
    assert 2.0 < outcome.figures["peak"] < 2.2
