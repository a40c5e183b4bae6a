"""The execute stage: exercises that do not run are taken out.

Each record with the source `exercise` is run as a program of its own: its definitions, what stands
alongside them at the top level (such as assertions), and then the examples of its docstrings, which
must print exactly what they show. All other records pass.

The programs come from a language model, so they run in the sandbox. A program is told its own
source as a string, so that it starts in a module of its own and cannot be mistaken for the frame
around it. It could feign success of its own examples; nothing else depends on its verdict than
whether it is kept itself.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from data_pipeline.generation.options import ExecuteRun
from data_pipeline.records.record import Json, Record, Reject
from data_pipeline.runner.finished import Finished, Show, run_planned
from data_pipeline.runner.output import write_json
from data_pipeline.runner.record_work import PartShard, broken_text, read_shard, record_work
from data_pipeline.runner.stage import Stage, Tally, Work
from data_pipeline.sandbox.packages import Packages, find_packages
from data_pipeline.sandbox.program_test import ProgramTest
from data_pipeline.sandbox.sandbox import Limits, SandboxPair, describe_isolation

VERSION = "2"
SOURCE = "exercise"
BATCH = 512  # programs that are handed over together
ENTRY = "failed_examples"
COUNT_NAME = "execution.json"  # alongside the parts
# The test is ours and runs outside of the program's process.
_TEST = ProgramTest(code=f"said = {ENTRY}()\nassert said == '', said\n", entry_point=ENTRY)
# such as an exercise that replaces what the test calls, or one that waits for input
_STATUS = {"unlike": "exception", "stalled": "timeout"}

_FRAME = """
import sys, types
source = {source}
module = types.ModuleType("exercise")
sys.modules["exercise"] = module
exec(compile(source, "<exercise>", "exec"), module.__dict__)

def {entry}():
    if ">>>" not in source:
        return ""
    import doctest, io
    said = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder().find(module, "exercise", module):
        runner.run(test, out=said.write)
    return said.getvalue()[-2000:]
"""


@dataclass(frozen=True)
class Ran:
    """How a program ended.

    Attributes:
        status: `passed`, `failed` (an example showed something else), `exception`, `timeout` or
            `died`.
        detail: what was seen, for a person.
    """

    status: str
    detail: str


Run = Callable[[Sequence[str]], list[Ran]]
"""Runs programs; the outcomes are in the order of the programs.

A program has passed if it defines a function `ENTRY` that returns an empty string.
"""


@dataclass(frozen=True)
class _Shard:
    """A part of the records, and what runs their programs."""

    part: PartShard
    run: Run


def program(source: str) -> str:
    """The program that runs an exercise and its examples."""
    return _FRAME.format(source=ascii(source), entry=ENTRY)


@dataclass(frozen=True)
class SandboxRun:
    """Runs programs one after the other, each in fresh processes; can be sent to workers.

    Attributes:
        limits: of each program.
        isolate: False runs without a sandbox.
        packages: what programs may import.
    """

    limits: Limits
    isolate: bool
    packages: Packages

    def __call__(self, programs: Sequence[str]) -> list[Ran]:
        """The outcomes in the order of the programs."""
        if not programs:
            return []
        pair = SandboxPair(self.limits, isolate=self.isolate, packages=self.packages)
        try:
            verdicts = [pair.judge(program, _TEST) for program in programs]
        finally:
            pair.close()
        return [
            Ran(_STATUS.get(verdict.status, verdict.status), " ".join(verdict.error.split()))
            for verdict in verdicts
        ]


def execute_run(run: ExecuteRun, show: Show) -> Finished:
    """Execute as the user's options say.

    Raises:
        FileNotFoundError, ValueError, RunError: see `plan_execute` and `run_stage`; there is no
            sandbox.
    """
    started, out = time.monotonic(), run.output.out
    limits = Limits(seconds=run.timeout, memory_bytes=run.memory_mib << 20)
    isolate = not run.unsafe_no_sandbox
    given = None if run.package is None else [name for name in run.package if name]
    packages = find_packages(given)
    pair = SandboxPair(limits, isolate=isolate, packages=packages)  # can programs be run at all?
    pair.close()

    config = asdict(limits) | {"sandbox": isolate, "packages": pair.packages}
    planned = plan_execute(run.records, SandboxRun(limits, isolate, packages), config)
    done = run_planned(planned, run.output, run.engine, show, started=started)
    isolation = describe_isolation(isolate, pair.packages)
    count = json.loads((out / COUNT_NAME).read_bytes())["exercises"]
    return Finished(
        done.result | {"exercises": count, "isolation": isolation},
        f"{done.line} | {count} exercises were run | isolation: {isolation}",
    )


def plan_execute(records: Sequence[Path], run: Run, limits: dict[str, Json]) -> tuple[Stage, Work]:
    """The stage and its work.

    Args:
        records: records directories.
        run: runs the programs; sent to the workers.
        limits: what they may use, and how they are isolated; part of the stage's configuration.

    Raises:
        FileNotFoundError, ValueError, RunError: see `record_work`.
    """
    stage = Stage(name="execute", version=VERSION, config=limits, function=execute_shard)
    work = record_work(records, finish=_write_count)
    return stage, replace(work, shards=[_Shard(part, run) for part in work.shards])


def execute_shard(shard: _Shard, config: dict[str, Any], tally: Tally) -> Iterator[Record | Reject]:
    """The stage function: yield each record that ran or need not, reject the others."""
    batch: list[tuple[str, Record]] = []
    ran = 0
    for entry in read_shard(shard.part, tally):
        batch.append(entry)
        ran += entry[1]["source"] == SOURCE
        if len(batch) == BATCH:
            yield from _judge(batch, shard.run)
            batch = []
    yield from _judge(batch, shard.run)
    tally.notes.append(ran)


def _write_count(directory: Path, notes: list[list[Json]]) -> None:
    """Report next to the parts how many exercises there were: other documents are handed on."""
    write_json(directory / COUNT_NAME, {"exercises": sum(sum(each) for each in notes)})


def _judge(batch: list[tuple[str, Record]], run: Run) -> Iterator[Record | Reject]:
    """The outcomes of a batch, in its order."""
    broken = [broken_text(where, record) for where, record in batch]
    wanted = [
        number
        for number, (_, record) in enumerate(batch)
        if record["source"] == SOURCE and broken[number] is None
    ]
    ran = dict(
        zip(wanted, run([program(batch[number][1]["text"]) for number in wanted]), strict=True)
    )
    for number, (where, record) in enumerate(batch):
        reject, outcome = broken[number], ran.get(number)
        if reject is not None:
            yield reject
        elif outcome is None:
            yield record
        elif outcome.status == "passed":
            doctest = ">>>" in record["text"]
            yield cast(Record, {**record, "execution": {"status": "passed", "doctest": doctest}})
        else:
            yield Reject(record["id"], _REASONS[outcome.status], outcome.detail[:500], where)


_REASONS = {
    "failed": "doctest",
    "exception": "exception",
    "timeout": "timeout",
    "died": "died",
}
