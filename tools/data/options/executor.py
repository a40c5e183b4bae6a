"""`--engine local|ray|slurm`: where the verbs of `megaphi data` run their shards.

Slurm: the command prepares its work directory and prints (or, with `--submit`, runs) a script that
submits two jobs. The tasks of an array job run the same command with `--slice I/N`, which does a
share of the shards of the first parallel phase; the second job, once all of them succeeded, runs
the plain command, which finds the shards done, does what is left and publishes. Submitting again
after tasks were lost does what is missing.
"""

import argparse
import contextlib
import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaphi.errors import EXIT_REJECTS, RunError, TooManyRejects

if TYPE_CHECKING:
    from data_pipeline.runner.executors import Executor

ENGINES = ("local", "ray", "slurm")
# Options that say where to run, and how many words follow; the commands of the jobs lack them.
_OPTIONS = {
    "--engine": 1,
    "--ray-address": 1,
    "--slurm-option": 1,
    "--workers": 1,
    "--slice": 1,
    "--submit": 0,
    "--wait": 0,
    "--json": 0,
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says the default of an option where there is one to say."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, "") or action.default == []:
            return action.help
        return super()._get_help_string(action)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where shards run."""
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="shards at a time: processes, or with slurm tasks of the array; by default one for "
        "each processor of this machine, with ray of the cluster",
    )
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine", choices=ENGINES, default="local", help="where shards run; the output is equal"
    )
    group.add_argument(
        "--ray-address", metavar="HOST:PORT", help="of the cluster; see the documentation of Ray"
    )
    group.add_argument(
        "--submit", action="store_true", help="with slurm: submit the jobs, do not print them"
    )
    group.add_argument(
        "--wait", action="store_true", help="with --submit: until the output is there"
    )
    group.add_argument(
        "--slurm-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="of sbatch, such as --slurm-option=--partition=cpu; may be repeated",
    )
    group.add_argument(
        "--slice", metavar="I/N", help="what a task of a Slurm array runs: shards I, I + N, ..."
    )


def executor_of(arguments: argparse.Namespace) -> "Executor":
    """The executor that the options ask for.

    Raises:
        ValueError: options that do not fit together, or Ray is not installed.
        RunError: there is no Ray cluster.
    """
    from data_pipeline.runner.executors import LocalExecutor, PlanExecutor, SliceExecutor

    engine, workers = arguments.engine, arguments.workers
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed")
    given = {
        "--ray-address": (arguments.ray_address is not None, "ray"),
        "--submit": (arguments.submit, "slurm"),
        "--wait": (arguments.wait, "slurm"),
        "--slurm-option": (bool(arguments.slurm_option), "slurm"),
        "--slice": (arguments.slice is not None, "local"),
    }
    for option, (is_given, fits) in given.items():
        if is_given and engine != fits:
            raise ValueError(f"{option} belongs to --engine {fits}, not {engine}")
    if engine == "ray":
        from data_pipeline.runner.ray_executor import RayExecutor

        return RayExecutor(arguments.ray_address, workers)
    workers = workers or cores()
    if engine == "slurm":
        return PlanExecutor(workers)
    if arguments.slice is not None:
        index, _, slices = arguments.slice.partition("/")
        if not (index.isdecimal() and slices.isdecimal()):
            raise ValueError(f"--slice {arguments.slice}: must be I/N, such as 0/8")
        return SliceExecutor(workers, index=int(index), slices=int(slices))
    return LocalExecutor(workers)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def run_verb(arguments: argparse.Namespace, argv: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Run a verb with its engine; returns the JSON object and the line to print.

    Args:
        arguments: of the verb; `arguments.run` runs it.
        argv: the words that they were read from, without `megaphi data`.

    Raises:
        ValueError: `--overwrite` would remove what is to be read; or see the verb.
        RunError: a job that was waited for failed, the disk is full; or see the verb.
    """
    from data_pipeline.runner.executors import ShardsPlanned, SliceDone

    if argv[0] not in ("tokenize", "merge"):  # whose output is files beside a folder of that name
        check_inputs_stay(arguments)
    run: Callable[[argparse.Namespace], tuple[dict[str, Any], str]] = arguments.run
    try:
        if not hasattr(arguments, "slice") or arguments.engine != "ray":
            return run(arguments)
        # Ray prints what befalls its nodes to stdout, which is the result's.
        with contextlib.redirect_stdout(sys.stderr):
            return run(arguments)
    except OSError as error:
        # Raised by a write, these name no file.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = getattr(arguments, "out", None) or getattr(arguments, "work", None) or "output"
        raise RunError(
            f"{where}: {error.strerror}; make room and run again, what is done is kept"
        ) from None
    except SliceDone as left:
        result = {"verb": argv[0], "out": str(arguments.out), "slice": arguments.slice}
        line = (
            f"slice {arguments.slice} of {arguments.out}: {left.done} of {left.total} shards done "
            "here; a run without --slice publishes"
        )
        return result | {"shards": left.done, "of": left.total}, line
    except ShardsPlanned as plan:
        script = _script(arguments, argv, plan.missing)
        if not arguments.submit:
            return {"verb": argv[0], "shards": plan.missing, "script": script}, script.rstrip("\n")
        jobs = _submit(script, arguments)
        if arguments.wait:
            # it is there: what is left to do is to say what it is
            arguments.engine, arguments.submit, arguments.wait = "local", False, False
            arguments.slurm_option, arguments.overwrite = [], False
            return run(arguments)
        result = {"verb": argv[0], "out": str(arguments.out), "jobs": jobs}
        line = f"submitted {arguments.out}: {plan.missing} shards, jobs {' '.join(jobs)}"
        return result | {"shards": plan.missing}, line


def check_inputs_stay(arguments: argparse.Namespace) -> None:
    """Check that the output does not replace a folder that is read, or one that holds it.

    Raises:
        ValueError: it does.
    """
    out = getattr(arguments, "out", None)
    if not getattr(arguments, "overwrite", False) or out is None or not out.is_dir():
        return
    for name, value in vars(arguments).items():
        if name in ("out", "ledger"):
            continue
        for each in value if isinstance(value, list) else [value]:
            is_source = isinstance(each, Path) or name == "sources"
            if is_source and out.resolve() in (Path(each).resolve(), *Path(each).resolve().parents):
                raise ValueError(
                    f"{each}: is read, and --overwrite of {out} would remove it; "
                    "choose another --out"
                )


def _script(arguments: argparse.Namespace, argv: Sequence[str], missing: int) -> str:
    """The shell script that submits the jobs of a stage."""
    name, logs = f"megaphi-{argv[0]}", f"{arguments.out}.slurm"
    plain = [sys.executable, "-m", "megaphi", "data", *without_engine(argv)]
    workers = '--workers "${SLURM_CPUS_PER_TASK:-1}"'
    tasks = min(missing, arguments.workers or cores())
    options = "".join(f" {shlex.quote(option)}" for option in arguments.slurm_option)

    def sbatch(job: str, log: str, more: str, command: str) -> str:
        output = shlex.quote(f"--output={logs}/{log}")
        return (
            f"sbatch --parsable --job-name={job}{more} {output}{options} \\\n"
            f"    --wrap={shlex.quote(command)}"
        )

    last = f"{shlex.join(plain)} {workers}"
    wait = " --wait" if arguments.wait else ""
    head = (
        f"# {missing} shards of {arguments.out}; logs in {logs}\n"
        f"set -euo pipefail\nmkdir -p {shlex.quote(logs)}\n"
    )
    if not tasks:
        return f"{head}{sbatch(name, '%j.log', wait, last)}\n"
    share = f'{shlex.join(plain)} --slice "$SLURM_ARRAY_TASK_ID/{tasks}" {workers}'
    array = sbatch(name, "%A-%a.log", f" --array=0-{tasks - 1}", share)
    after = ' --dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes' + wait
    final = sbatch(f"{name}-last", "%j.log", after, last)
    return f'{head}array="$({array})"\necho "$array"\n{final}\n'


def without_engine(argv: Sequence[str]) -> list[str]:
    """The words of a command without the options that say where it runs."""
    kept: list[str] = []
    skip = 0
    for word in argv:
        name, equals, _ = word.partition("=")
        if skip:
            skip -= 1
        elif name in _OPTIONS:
            skip = 0 if equals else _OPTIONS[name]
        else:
            kept.append(word)
    return kept


def _submit(script: str, arguments: argparse.Namespace) -> list[str]:
    """Run the script; returns the job numbers that it printed.

    Raises:
        RunError: sbatch refused, or a job that was waited for failed.
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    jobs = [line.split(";")[0] for line in done.stdout.split()]
    if done.returncode == 0:
        return jobs
    said = " ".join(done.stderr.split()) or f"status {done.returncode}"
    if len(jobs) < 2:
        raise RunError(f"sbatch: {said}; without --submit the script is printed")
    message = f"{arguments.out}: job {jobs[-1]} failed ({said}); see {arguments.out}.slurm"
    if done.returncode == EXIT_REJECTS:
        raise TooManyRejects(message)
    raise RunError(message + ", and run again to do what is missing")
