"""Breaks saves and trainings in every way that the tests know, as long as one likes, and counts.

First comes a round of what chance chooses, then every crash point and every stage of a full disk,
then chance again until the time is over. What a trial does follows from the seed and its number.
"""

import argparse
import datetime
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.faults import save_trials
from tests.faults.save_trials import KINDS, Kind, Outcome, Saves
from tests.faults.training_trials import DAMAGES, EVENTS, Trainings
from tests.helpers import write_toy_tokens
from tests.layouts import Launcher

DISK_ERRORS = ("ENOSPC", "EDQUOT", "EROFS", "EIO")


@dataclass(frozen=True)
class Trial:
    """One thing to try."""

    row: str
    """The line of the table that it counts for."""
    run: Callable[[Saves, Trainings, random.Random], Outcome | None]
    """None if it cannot be tried here."""


def _training(kind: Kind) -> Trial:
    """A training that meets random events, the first one a kill."""

    def run(_: Saves, trainings: Trainings, generator: random.Random) -> Outcome:
        events = ["kill one", *generator.choices(EVENTS, k=generator.randint(2, 7))]
        return trainings.disturbed(kind, events, generator)

    return Trial(f"training disturbed, {kind}", run)


def _power_loss(kind: Kind, new: bool) -> Trial:
    """Lost power at each call of a save."""
    return Trial(
        f"power lost in a save, {kind}",
        lambda saves, _, rng: save_trials.power_loss(saves, kind, rng, new, rounds=2),
    )


def _crash_points(kind: Kind) -> Trial:
    """Death at each call of a save."""
    return Trial(
        f"death at a file call, {kind}",
        lambda saves, _, rng: save_trials.crash_points(saves, kind, None, rng),
    )


def _on_saves(row: str, function: Callable[..., Outcome | None], *arguments: object) -> Trial:
    """A function of `tests.faults.save_trials` that needs no chance."""
    return Trial(row, lambda saves, _, __: function(saves, *arguments))


def _every_point() -> Iterator[Trial]:
    """What is tried once, and then all of it."""
    for kind in KINDS:
        yield _crash_points(kind)
    for background in (False, True):
        where = "background" if background else "foreground"
        refused, full = f"disk refuses from a call on, {where}", f"small file system, {where}"
        yield _on_saves(refused, save_trials.failing_disk, background, DISK_ERRORS)
        yield _on_saves(full, save_trials.full_disk, background, False)
        yield _on_saves(full, save_trials.full_disk, background, True)
        limit = f"limit on the length of files, {where}"
        yield _on_saves(limit, save_trials.long_files, background)
        memory = f"memory over many saves, {where}"
        yield _on_saves(memory, save_trials.save_memory, background, 200)


def _by_chance() -> Iterator[Trial]:
    """What is different every time."""
    for kind in KINDS:
        for new in (False, True):
            yield _training(kind)
            yield _training(kind)
            yield _power_loss(kind, new)
    yield Trial("bit flipped", lambda saves, _, rng: save_trials.bit_flips(saves, 1000, rng))


def trials() -> Iterator[Trial]:
    """Everything by chance once, then every point, then chance without end."""
    yield from _by_chance()
    yield from _every_point()
    while True:
        yield from _by_chance()


def _machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def soak(minutes: float, seed: int, first: int, folder: Path) -> dict[str, Outcome]:
    """Try one thing after another until the time is over; outcomes by row."""
    rows: dict[str, Outcome] = {}
    end = time.monotonic() + 60 * minutes
    with Launcher() as launcher:
        trainings = Trainings(launcher, write_toy_tokens(folder / "toy"), folder)
        for number, trial in enumerate(trials()):
            if number < first:
                continue
            if time.monotonic() > end:
                break
            with tempfile.TemporaryDirectory(dir=folder) as own:
                saves = Saves(launcher, Path(own))
                outcome = trial.run(saves, trainings, random.Random(f"{seed}/{number}"))
            if outcome is None:
                print(f"{number:5} {trial.row}: not possible here (needs root)", flush=True)
                continue
            rows.setdefault(trial.row, Outcome()).add(outcome)
            print(
                f"{number:5} {trial.row}: {outcome.trials} tried, {_details(outcome)}", flush=True
            )
            for text in outcome.violations:
                print(f"VIOLATION (seed {seed}, trial {number}): {text}", flush=True)
    return rows


def _details(outcome: Outcome) -> str:
    """The figures of an outcome on one line."""
    return ", ".join(f"{key} {value:g}" for key, value in outcome.figures.items())


def table(rows: dict[str, Outcome]) -> str:
    """The outcomes, one row each."""
    lines = [f"{'what':<48}{'tried':>8}{'violations':>12}  details"]
    for row, outcome in sorted(rows.items()):
        figures = _details(outcome)
        lines.append(f"{row:<48}{outcome.trials:>8}{len(outcome.violations):>12}  {figures}")
    return "\n".join(lines)


def summary(rows: dict[str, Outcome]) -> dict[str, int]:
    """How often what was survived, over all rows."""

    def tried(start: str) -> int:
        return sum(outcome.trials for row, outcome in rows.items() if row.startswith(start))

    def events(*names: str) -> int:
        figures = [o.figures for row, o in rows.items() if row.startswith("training")]
        return int(sum(f.get(name, 0) for f in figures for name in names))

    return {
        "trainings compared with an undisturbed one": tried("training"),
        "kills of a training": events("kill one", "kill all"),
        "requests to stop a training": events("terminate"),
        "full disks in a training": events("disk full"),
        "damaged checkpoints under a training": events(*DAMAGES),
        "crash points of a save": tried("death"),
        "power losses in a save": tried("power"),
        "bits flipped": tried("bit"),
        "saves on a disk that refuses": tried("disk") + tried("small") + tried("limit"),
        "violations": sum(len(outcome.violations) for outcome in rows.values()),
    }


def main() -> int:
    """Run from the command line; 1 if anything was not as promised."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.splitlines()[0])
    parser.add_argument("minutes", nargs="?", type=float, default=60.0)
    parser.add_argument("seed", nargs="?", type=int)
    parser.add_argument("--first", type=int, default=0, metavar="TRIAL", help="number to begin at")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    print(f"seed {seed}; the same again: launch/soak.sh {arguments.minutes:g} {seed}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="megaphi-soak-") as folder:
        rows = soak(arguments.minutes, seed, arguments.first, Path(folder))
    print(f"\n{table(rows)}")
    totals = summary(rows)
    for what, number in totals.items():
        print(f"{number:8} {what}")
    if arguments.json:
        report = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "seed": seed,
            "minutes": round((time.monotonic() - began) / 60, 1),
            "machine": _machine(),
            "summary": totals,
            "rows": {
                row: {
                    "tried": outcome.trials,
                    "figures": outcome.figures,
                    "violations": outcome.violations,
                }
                for row, outcome in sorted(rows.items())
            },
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if totals["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
