"""A stage whose shards depend on all records: a first phase reads them and decides."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.records.record import Json, digest
from data_pipeline.runner.output import LOCK_NAME, Manifest, WorkDirectory
from data_pipeline.runner.stage import Options, Stage, Work, run_stage


@dataclass(frozen=True, kw_only=True)
class FirstPhase:
    """What is done before the first shard of a stage, and not when its output is reused.

    Attributes:
        directory: where it works and leaves its decisions, next to the output; a run that is
            killed continues in it.
        plan: what determines its results; another plan starts anew.
        run: called with that directory.
    """

    directory: Path
    plan: Json
    run: Callable[[WorkDirectory], None]


def run_with_first_phase(
    stage: Stage, work: Work, out: Path, options: Options, first: FirstPhase
) -> tuple[Manifest, bool]:
    """Run a first phase and the stage, and remove what the first phase left; see `run_stage`."""
    opened: list[WorkDirectory] = []

    def prepare() -> None:
        plan = digest(first.plan)
        opened.append(WorkDirectory(first.directory, plan, shared=options.runner.shared))
        first.run(opened[0])

    try:
        result = run_stage(stage, replace(work, prepare=prepare), out, options)
        # Of a run that was killed after it had published, the first phase alone is left.
        if not opened and (first.directory / LOCK_NAME).exists():
            opened.append(WorkDirectory(first.directory, ""))
        for directory in opened:
            directory.discard()
    finally:
        for directory in opened:
            directory.release()
    return result
