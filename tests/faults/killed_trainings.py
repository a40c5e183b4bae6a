"""A training that meets one fault in one of its saves, for tests.layouts to start."""

import contextlib
import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from megaphi import train
from megaphi.checkpoint.manager import CheckpointManager
from megaphi.recipe_file import load_recipe
from tests.faults.file_calls import Call, watch_files


def run(argv: list[str]) -> int:
    """Train; `argv` is one JSON object with the `options` and what is to happen.

    At the start of save number `save` of this process (from 1), on the processes in `ranks`:
    `signal` is sent `delay` seconds later, or from file call `first` on the disk is full.
    """
    plan = json.loads(argv[0])
    if int(os.environ["RANK"]) in plan["ranks"]:
        _arm(plan)
    return train.main(plan["options"])


def _arm(plan: dict[str, Any]) -> None:
    """Make a fault happen in a save."""
    original, saves = CheckpointManager.save, 0
    disk = contextlib.ExitStack()
    trigger = _sender(plan["signal"], plan["delay"]) if plan["signal"] else None
    run_dir = Path(load_recipe(plan["options"]).train.run_dir)

    def refuse(number: int, call: Call, _: Any) -> None:
        of_checkpoint = call.path.startswith((".step-", "step-", "latest"))
        needs_space = call.kind in ("create", "mkdir", "write", "truncate")
        if number >= plan["first"] and of_checkpoint and needs_space:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(self: CheckpointManager, *arguments: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == plan["save"] + 1:
            self.wait()  # the disk is full as long as the save before is written
            disk.close()
        if saves == plan["save"] and trigger is None:
            disk.enter_context(watch_files(run_dir, 0, refuse))
        elif saves == plan["save"] and trigger is not None:
            os.write(trigger, b"x")
        original(self, *arguments)

    setattr(CheckpointManager, "save", save)  # noqa: B010 (its arguments are not those)


def _sender(number: int, delay: float) -> int:
    """Start a process that signals this one after a delay; what is written to starts the delay.

    Another process, because a signal must also come while this one is inside of a library.
    """
    target = os.getpid()
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        if os.read(reading, 1):
            time.sleep(delay)
            if os.getppid() == target:
                os.kill(target, signal.Signals(number))
        os._exit(0)
    os.close(reading)
    return writing
