"""Trainings that are killed, stopped and damaged, and end as if nothing had been."""

import itertools
import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

from megaphi.formats.manifest import CheckpointError, find_checkpoints, verify_checkpoint
from tests.faults.save_trials import Kind, Outcome
from tests.faults.test_resume import final_tensors
from tests.helpers import curve, toy_options
from tests.layouts import Launcher

STEPS, INTERVAL = 24, 2
DAMAGES = ("bit flip", "truncated", "zeroed", "deleted", "swapped")
EVENTS = ("kill one", "kill all", "terminate", "disk full", *DAMAGES)


class Trainings:
    """Runs the same small training, disturbed in many ways, in directories below `folder`."""

    def __init__(self, launcher: Launcher, tokens: Path, folder: Path) -> None:
        self.launcher = launcher
        self.tokens = tokens
        self.folder = folder
        self._numbers = itertools.count()
        self._straight: dict[int, tuple[Any, Any]] = {}

    def start(
        self, run_dir: Path, kind: Kind, ranks: list[int], **fault: Any
    ) -> tuple[list[int], str]:
        """Train on from where the run is; exit statuses and output."""
        options = toy_options(
            self.tokens, run_dir, train__steps=STEPS, checkpoint__interval=INTERVAL,
            train__global_batch_size=4, checkpoint__asynchronous=str(kind.asynchronous).lower(),
        )  # fmt: skip
        plan = {"options": options, "ranks": ranks, "signal": 0, "delay": 0.0, "save": 0} | fault
        log = self.folder / f"log-{next(self._numbers)}"
        statuses = self.launcher.train(
            [json.dumps(plan)], kind.processes, log, "tests.faults.killed_trainings:run"
        )
        return statuses, log.read_text()

    def straight(self, processes: int) -> tuple[Any, Any]:
        """Curve and final tensors of a run that nobody disturbed."""
        if processes not in self._straight:
            run_dir = self.folder / f"straight-{processes}"
            statuses, printed = self.start(run_dir, Kind(processes, False), [])
            assert set(statuses) == {0}, printed
            self._straight[processes] = (curve(run_dir), final_tensors(run_dir))
        return self._straight[processes]

    def disturbed(self, kind: Kind, events: list[str], generator: random.Random) -> Outcome:
        """Let events hit one run, one after another, and compare its end with `straight`."""
        outcome = Outcome(trials=1)
        run_dir = self.folder / f"run-{next(self._numbers)}"
        for event in events:
            if event in DAMAGES:
                happened = self._damage(run_dir, event, generator)
            else:
                happened = self._disturb(run_dir, kind, event, generator, outcome)
            outcome.count(**{event: int(happened)})
        statuses, printed = self._resume(run_dir, kind, outcome, ranks=[])
        same = (curve(run_dir), final_tensors(run_dir)) == self.straight(kind.processes)
        if set(statuses) != {0} or not same:
            what = "another end" if set(statuses) == {0} else printed[-2000:]
            outcome.violations.append(f"{kind}, {events}: {what} in {run_dir}")
        if not outcome.violations:
            shutil.rmtree(run_dir)
        return outcome

    def _resume(
        self, run_dir: Path, kind: Kind, outcome: Outcome, **fault: Any
    ) -> tuple[list[int], str]:
        """Start the run again; it must go on from the newest checkpoint that verifies."""
        there = find_checkpoints(run_dir)
        sound = [path for path in there if _is_sound(path)]
        if there and not sound:
            outcome.violations.append(f"{run_dir}: no sound checkpoint is left")
        statuses, printed = self.start(run_dir, kind, **fault)
        if sound and f"resuming from {sound[0]}" not in printed:
            outcome.violations.append(f"{run_dir}: not resumed from {sound[0].name}: {printed}")
        outcome.count(starts=1)
        return statuses, printed

    def _disturb(
        self, run_dir: Path, kind: Kind, event: str, generator: random.Random, outcome: Outcome
    ) -> bool:
        """Train until an event ends it; whether it did, before the run was over."""
        everyone = list(range(kind.processes))
        ranks = everyone if event == "kill all" else [generator.choice(everyone)]
        fault: dict[str, Any] = {"save": generator.randint(1, 3)}
        expected = {0, 1}
        if event == "disk full":
            fault |= {"first": generator.randrange(12)}
        else:
            number = signal.SIGTERM if event == "terminate" else signal.SIGKILL
            fault |= {"signal": int(number), "delay": generator.uniform(0, 0.15)}
            expected = {0, 75} if event == "terminate" else {0, 1, -9}
        statuses, printed = self._resume(run_dir, kind, outcome, ranks=ranks, **fault)
        killed = statuses.count(-9)
        if not set(statuses) <= expected or (killed > len(ranks)):
            outcome.violations.append(f"{kind}, {event}: exit statuses {statuses}: {printed}")
        if event == "disk full" and any(statuses) and "No space left on device" not in printed:
            outcome.violations.append(f"{kind}, {event}: not named: {printed}")
        return any(statuses)

    def _damage(self, run_dir: Path, event: str, generator: random.Random) -> bool:
        """Damage the newest checkpoint of a run, if there is one before it."""
        there = [path for path in find_checkpoints(run_dir) if _is_sound(path)]
        if len(there) < 2:
            return False
        damage(there[0], there[1], event, generator)
        return True


def damage(newest: Path, other: Path, event: str, generator: random.Random) -> Path:
    """Damage a file of a checkpoint; returns which.

    `swapped` exchanges a shard with the same one of another checkpoint, both sound in themselves.
    """
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    if event == "swapped":
        files = [path for path in files if path.suffix == ".safetensors"]
    path = generator.choice(files)
    content = path.read_bytes()
    if event == "bit flip":
        place = generator.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
    elif event == "truncated":
        path.write_bytes(content[: generator.randrange(len(content))])
    elif event == "zeroed":
        path.write_bytes(bytes(len(content)))
    elif event == "deleted":
        path.unlink()
    else:
        path.write_bytes((other / path.name).read_bytes())
    return path


def _is_sound(directory: Path) -> bool:
    """Whether a checkpoint verifies."""
    try:
        verify_checkpoint(directory)
    except CheckpointError:
        return False
    return True
