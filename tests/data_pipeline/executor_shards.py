"""A stage for tests of executors, in a module of its own so that any worker can import it."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.records.record import Record, Reject
from data_pipeline.runner.stage import Stage, Tally, Work
from megaphi.errors import RunError


def shard(task: tuple[int, Path | None], config: Any, tally: Tally) -> Iterator[Record | Reject]:
    """Ten documents of a number; leaves a file `PARENT-NUMBER-PROCESS` in the given folder."""
    number, nodes = task
    if nodes is not None:
        # a Ray worker's parent is its node's raylet
        (nodes / f"{os.getppid()}-{number}-{os.getpid()}").touch()
    if config["fails"] and number == 1:
        raise RunError(f"shard {number} is broken")
    for row in range(10):
        tally.records_in += 1
        if nodes is not None:
            time.sleep(0.04)
        if row == 7:
            yield Reject(f"{number}-{row}", "seven", "", f"{number}:{row}")
        else:
            yield Record(id=f"{number}-{row}", text=f"text {number} {row}\n" * 9, source="test")


def stage(count: int, nodes: Path | None = None, fails: bool = False) -> tuple[Stage, Work]:
    """The stage and its work of `count` shards."""
    if nodes is not None:
        nodes.mkdir()
    config = {"count": count, "fails": fails}
    inputs = [{"path": "none", "files": 0, "bytes": 0, "sha256": ""}]
    return (
        Stage(name="numbers", version="1", config=config, function=shard),
        Work(
            shards=[(number, nodes) for number in range(count)],
            fingerprint=count,
            describe=lambda recorded: inputs,
            identify=lambda: inputs,
        ),
    )
