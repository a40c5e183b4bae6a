"""`megaphi data execute`: run exercises in the sandbox, and keep those that work."""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from data_pipeline.generation.execute import COUNT_NAME, ENTRY, Ran, plan_execute
from data_pipeline.sandbox.packages import Packages, find_packages
from data_pipeline.sandbox.program_test import ProgramTest
from data_pipeline.sandbox.sandbox import Lane, Limits, describe_isolation
from tools.data.options.stage import add_stage_parser, stage_options, stage_result

# The test is ours and runs outside of the program's process.
_TEST = ProgramTest(code=f"said = {ENTRY}()\nassert said == '', said\n", entry_point=ENTRY)
# such as an exercise that replaces what the test calls, or one that waits for input
_STATUS = {"unlike": "exception", "stalled": "timeout"}


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    text = "records -> the same without exercises that fail: in their definitions or doctests"
    parser = add_stage_parser(subparsers, "execute", text, run)
    parser.add_argument(
        "--timeout", type=float, default=3.0, metavar="SECONDS", help="processor time of a program"
    )
    parser.add_argument(
        "--package", action="append", metavar="NAME",
        help="that programs may import, again for another; '' for none (default: numpy, where it "
        "is installed)",
    )  # fmt: skip
    parser.add_argument("--memory-mib", type=int, default=1024, metavar="N", help="of a program")
    parser.add_argument(
        "--unsafe-no-sandbox",
        action="store_true",
        help="run model-written code with your own rights",
    )


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the verb; returns the JSON object and the line to print.

    Raises:
        FileNotFoundError, ValueError, RunError: see `plan_execute` and `run_stage`; there is no
            sandbox.
    """
    from data_pipeline.runner.stage import run_stage

    started = time.monotonic()
    if not (0 < arguments.timeout <= 3600 and arguments.memory_mib > 0):
        raise ValueError("--timeout and --memory-mib must be above 0")
    limits = Limits(seconds=arguments.timeout, memory_bytes=arguments.memory_mib << 20)
    isolate = not arguments.unsafe_no_sandbox
    given = arguments.package
    packages = find_packages(None if given is None else [name for name in given if name])
    lane = Lane(limits, isolate=isolate, packages=packages)  # can programs be run at all?
    lane.close()

    config = asdict(limits) | {"sandbox": isolate, "packages": lane.packages}
    run_programs = SandboxRun(limits, isolate, packages)
    stage, work = plan_execute(arguments.records, run_programs, config)
    with stage_options(arguments, "execute", ()) as options:
        stage = replace(stage, compress=arguments.zstd)
        manifest, reused = run_stage(stage, work, arguments.out, options)
    result, line = stage_result(arguments, manifest, reused, started)
    isolation = describe_isolation(isolate, lane.packages)
    count = json.loads((arguments.out / COUNT_NAME).read_bytes())["exercises"]
    result |= {"exercises": count, "isolation": isolation}
    return result, f"{line} | {count} exercises were run | isolation: {isolation}"


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
        lane = Lane(self.limits, isolate=self.isolate, packages=self.packages)
        try:
            verdicts = [lane.judge(program, _TEST) for program in programs]
        finally:
            lane.close()
        return [
            Ran(_STATUS.get(verdict.status, verdict.status), " ".join(verdict.error.split()))
            for verdict in verdicts
        ]
