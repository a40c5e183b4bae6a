"""`megaphi bench data --out DIR`: measure this machine, beside the tools that others use.

Writes DIR/NAME.json, with everything needed to judge the figures (machine, load, versions, commit,
command line, every single repeat), and DIR/NAME.txt, the table that is also printed.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from megaphi import __version__

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("numpy", "torch", "tokenizers", "gigatoken", "megatron-core")


def main(argv: Sequence[str]) -> int:
    """Run a sub-verb; returns the exit status.

    Raises:
        ValueError: the call is wrong.
        RunError: a measurement of our own failed.
    """
    options = _parser().parse_args(argv)
    from megaphi.checkpoint.manifest import write_durably

    machine = describe_machine(["megaphi", "bench", *argv])
    report, lines = options.run(options)
    machine["load_after"] = os.getloadavg()
    report = {"machine": machine, **report}
    text = "\n".join([*machine_lines(machine), *lines])
    write_durably(options.out / f"{options.name}.json", json.dumps(report, indent=1) + "\n")
    write_durably(options.out / f"{options.name}.txt", text + "\n")
    print(json.dumps(report) if options.json else text)
    return 0


def _parser() -> argparse.ArgumentParser:
    """The sub-verbs and their options."""
    parser = argparse.ArgumentParser(
        prog="megaphi bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="name", required=True, metavar="VERB")
    data = verbs.add_parser(
        "data",
        help="tokenizing, sample order, blending, loading",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    data.add_argument("--json", action="store_true", help="print one JSON object")
    data.add_argument("--tokenizer", default="codegen", metavar="NAME_OR_DIR", help="tokenizer")
    data.add_argument(
        "--source", type=Path, metavar="DIR", help="its .py files; None: the standard library"
    )
    data.add_argument("--megabytes", type=float, default=32.0, metavar="N", help="of --source")
    data.add_argument("--index-tokens", type=float, default=2e9, metavar="N", help="made up")
    data.add_argument(
        "--blend-samples", type=float, default=36.9e6, metavar="N", help="of two data sets, 6 to 1"
    )
    data.add_argument(
        "--loader-samples", type=int, default=100_000, metavar="N", help="of 2,048 tokens"
    )
    data.add_argument("--repeats", type=int, default=3, metavar="N", help="of everything")
    cores = len(os.sched_getaffinity(0))
    data.add_argument("--workers", type=int, default=cores, metavar="N", help="of our tokenizing")
    data.set_defaults(run=_data)
    return parser


def _data(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from tools.bench_data import run_data

    return run_data(options)


def describe_machine(command: Sequence[str]) -> dict[str, Any]:
    """What the figures depend on besides the code; None where it cannot be found out."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "megaphi": __version__,
        "commit": git_commit(ROOT),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "load_before": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in _PACKAGES},
    }


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """The machine in the head of a table."""
    loads = " to ".join(f"{machine[key][0]:.1f}" for key in ("load_before", "load_after"))
    packages = ", ".join(
        f"{name} {v or 'not installed'}" for name, v in machine["packages"].items()
    )
    return [
        f"{machine['command']}    {machine['date']}",
        f"megaphi {machine['megaphi']}, commit {machine['commit'] or 'unknown'}",
        f"{machine['cpu'] or 'unknown CPU'}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, load average {loads}",
        f"Python {machine['python']}, {packages}",
    ]


def package_version(name: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str | None:
    """The CPU's name as its maker spells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # not Linux
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def git_commit(root: Path) -> str | None:
    """Commit of a checkout, with `-dirty` if tracked files were changed; None outside of git.

    Only `root` itself is asked: an installed package must not report the project around it.
    """
    if not (root / ".git").exists():
        return None
    # without optional locks a benchmark cannot get in the way of a commit
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always"]
    options = ["--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def child_environment() -> dict[str, str]:
    """Environment of a measuring process: it imports this very code."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def run_child(module: str, request: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m module request` quietly."""
    command = [sys.executable, "-W", "ignore", "-m", module, str(request)]
    return subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, check=False
    )
