"""`megaphi evaluate`: pass@k of a model, or of given completions, on a suite of programs.

MODEL is a run (its newest checkpoint), a checkpoint, or a Hugging Face directory: a phi model, or
any other causal language model if `transformers` is installed. Programs run isolated by bubblewrap
and are judged from outside; without it the command refuses. A killed evaluation continues when the
same command is given again. With --follow it scores each checkpoint of a run as it is published,
on this machine or another, and draws the score over the training's tokens into its TensorBoard.
"""

import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipeline.sandbox.executor import judge_all, usable_processors
from data_pipeline.sandbox.packages import Packages, find_packages
from data_pipeline.sandbox.sandbox import Lane, Limits, describe_isolation
from megaphi.durable import write_durably
from megaphi.formats.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    digest_file,
    find_checkpoints,
)
from tools.evaluation.checkpoints import Curve, progress_of
from tools.evaluation.completions import Sampling, complete, open_backend, read_completions
from tools.evaluation.report import read_similarity, render, summarise
from tools.evaluation.store import Key, RowFile, open_directory
from tools.evaluation.suites import Problem, Suite, load_suite
from tools.model_options import check_sampling, choose_device, tokenizer_file
from tools.threads import wait_without_spinning


def _parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megaphi evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is evaluated: one of these")
    what.add_argument("model", metavar="MODEL", nargs="?", help="run, checkpoint or directory")
    what.add_argument("--completions", type=Path, metavar="FILE.jsonl", help="task_id, completion")
    what.add_argument(
        "--canonical", action="store_true", help="the suite's own solutions (a check)"
    )
    parser.add_argument("--suite", required=True, help="humaneval, mbpp or FILE.jsonl")
    parser.add_argument("--suite-file", type=Path, metavar="FILE", help="data of humaneval or mbpp")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for the results (of a run: RUN/evaluations/SUITE)"
    )
    parser.add_argument("--similarity", type=Path, metavar="FILE.json", help="split the score")
    parser.add_argument(
        "--k",
        type=int,
        nargs="+",
        metavar="K",
        help="default: of 1, 10 and 100 what --samples allows",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    sampling = parser.add_argument_group("generation")
    sampling.add_argument("--samples", type=int, default=1, metavar="N", help="a problem")
    sampling.add_argument("--temperature", type=float, default=0.0)
    sampling.add_argument("--top-p", type=float, default=1.0)
    sampling.add_argument("--seed", type=int, default=0)
    sampling.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    sampling.add_argument("--batch-size", type=int, default=32, metavar="N")
    sampling.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    sampling.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    sampling.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="instead of the model's own"
    )
    sampling.add_argument("--cuda-graphs", choices=("auto", "never"), default="auto")
    run = parser.add_argument_group("the checkpoints of a run")
    run.add_argument("--all-checkpoints", action="store_true", help="each of the run MODEL")
    run.add_argument("--tensorboard", action="store_true", help="draw them into the run's")
    run.add_argument(
        "--follow", action="store_true", help="both, as they are published, until the last"
    )
    run.add_argument("--every-steps", type=int, default=1, metavar="N", help="only steps N divides")
    run.add_argument("--poll-seconds", type=float, default=30.0, metavar="S")
    run.add_argument(
        "--patience-seconds", type=float, default=3600.0, metavar="S",
        help="give up following when nothing changes in the run for so long (default: an hour)",
    )  # fmt: skip
    programs = parser.add_argument_group("running programs")
    programs.add_argument("--workers", type=int, default=usable_processors(), metavar="N")
    programs.add_argument(
        "--timeout", type=float, default=3.0, metavar="SECONDS",
        help="processor time; a program that only waits is stopped after three times as long",
    )  # fmt: skip
    programs.add_argument(
        "--package", action="append", metavar="NAME",
        help="that programs and tests may import, again for another; '' for none "
        "(default: numpy, where it is installed)",
    )  # fmt: skip
    programs.add_argument("--memory-mib", type=int, default=1024, metavar="N")
    programs.add_argument("--unsafe-no-sandbox", action="store_true")
    return parser


_DEFAULT_KS = (1, 10, 100)
# options of sampling that results do not depend on
_HOW = ("batch_size", "cuda_graphs")
_POSITIVE = (
    "samples",
    "max_new_tokens",
    "batch_size",
    "workers",
    "timeout",
    "memory_mib",
    "every_steps",
    "poll_seconds",
    "patience_seconds",
)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What does not change from one checkpoint to the next."""

    suite: Suite
    similarity: dict[str, dict[str, bool]]
    options: argparse.Namespace
    sampling: Sampling
    limits: Limits
    packages: Packages
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages that can be imported in the sandbox."""

    @property
    def isolate(self) -> bool:
        return not self.options.unsafe_no_sandbox

    def settings(self, subject: Mapping[str, Any]) -> dict[str, Any]:
        """What results depend on, for telling whether an evaluation may continue."""
        return {
            **subject,
            "suite_sha256": self.suite.sha256,
            "limits": asdict(self.limits),
            "sandbox": self.isolate,
            "packages": self.versions,
        }


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit status."""
    wait_without_spinning()
    options = _parser().parse_args(argv)
    job = _check(options)
    job = _try_sandbox(job)
    if options.all_checkpoints:
        summary = _evaluate_run(job)
    elif options.model is not None:
        from megaphi.formats.weights import resolve_model

        summary = _evaluate_model(job, resolve_model(options.model), options.out)
        _tell(job, summary)
    else:
        summary = _evaluate_given(job)
        _tell(job, summary)
    if options.json:
        print(json.dumps(summary))
    failed = options.canonical and summary["statuses"] != {"passed": summary["programs"]}
    return 1 if failed else 0


def _check(options: argparse.Namespace) -> _Job:
    """Read what the options name.

    Raises:
        FileNotFoundError, ValueError: they do not fit together or name what is not there.
    """
    subjects = [options.model is not None, options.completions is not None, options.canonical]
    if sum(subjects) != 1:
        raise ValueError("give exactly one of MODEL, --completions FILE.jsonl and --canonical")
    if options.follow:
        options.all_checkpoints = options.tensorboard = True
    if options.all_checkpoints and options.model is None:
        raise ValueError("--all-checkpoints and --follow need a run directory as MODEL")
    if options.tensorboard and not options.all_checkpoints:
        raise ValueError("--tensorboard goes with --all-checkpoints")
    if options.out is None and not options.all_checkpoints:
        raise ValueError("--out DIR is needed, a directory for the results")
    for name in _POSITIVE:
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, and no infinity")
    check_sampling(options.temperature, options.top_p)
    if options.k is not None and min(options.k) < 1:
        raise ValueError("--k must be above 0")
    if options.k is not None and options.model is not None and max(options.k) > options.samples:
        raise ValueError(f"--k {max(options.k)} needs as many --samples, not {options.samples}")
    if options.samples > 1 and options.temperature == 0:
        raise ValueError(
            f"--samples {options.samples} at temperature 0 are all the same; give --temperature 0.8"
        )
    suite = load_suite(options.suite, options.suite_file)
    return _Job(
        suite=suite,
        similarity=read_similarity(options.similarity, suite),
        options=options,
        sampling=Sampling(
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            cuda_graphs=options.cuda_graphs,
        ),
        limits=Limits(seconds=options.timeout, memory_bytes=options.memory_mib << 20),
        packages=find_packages(
            None if options.package is None else [name for name in options.package if name]
        ),
    )


def _try_sandbox(job: _Job) -> _Job:
    """Find out, before hours of generation, whether programs and tests can be run.

    Returns:
        The job, with the versions of the packages that can be imported.

    Raises:
        ValueError: there is no sandbox, or it lacks a module that a test imports.
    """
    lane = Lane(job.limits, isolate=job.isolate, packages=job.packages)
    try:
        users: dict[str, str] = {}
        for problem in job.suite.problems:
            for name in problem.test.imports:
                users.setdefault(name, problem.task_id)
        missing = lane.missing_modules(list(users))
    finally:
        lane.close()
    if missing:
        raise ValueError(
            f"the test of {users[missing[0]]} cannot be run: it imports {missing[0]}, which the "
            f"sandbox does not have; install it and give --package {missing[0].partition('.')[0]}"
        )
    return replace(job, versions=lane.packages)


def _tell(job: _Job, summary: Mapping[str, Any]) -> None:
    """Print a summary for people."""
    if not job.options.json:
        print(render(summary))


def _evaluate_given(job: _Job) -> dict[str, Any]:
    """Score completions from a file, or the suite's own solutions."""
    options = job.options
    if options.canonical:
        missing = [p.task_id for p in job.suite.problems if p.canonical is None]
        if missing:
            raise ValueError(f"{options.suite}: {missing[0]} has no solution of the suite's own")
        subject = {"model": "canonical solutions"}
        rows: Iterable[dict[str, Any]] = [
            {"task_id": p.task_id, "sample": 0, "completion": p.canonical}
            for p in job.suite.problems
        ]
        _require_samples(job, rows, "--canonical")
    else:
        rows = list(read_completions(options.completions, job.suite))
        digest = hashlib.sha256(options.completions.read_bytes()).hexdigest()
        subject = {"model": str(options.completions), "completions_sha256": digest}
        _require_all(job, rows, subject)
    with open_directory(options.out, job.settings(subject)):
        return _judge(job, options.out, rows, subject)


def _evaluate_model(job: _Job, source: Path, out: Path) -> dict[str, Any]:
    """Generate what is missing, then score."""
    options = job.options
    device, dtype = choose_device(options.device, options.dtype)
    tokenizer = None
    if options.tokenizer is not None:
        tokenizer = digest_file(tokenizer_file(options.tokenizer)).sha256
    progress = progress_of(source)
    subject = {
        "model": str(source),
        "weights_sha256": _identity(source),
        "training_tokens": None if progress is None else progress.tokens,
        "samples": options.samples,
        "dtype": str(dtype).removeprefix("torch."),
        **{name: value for name, value in asdict(job.sampling).items() if name not in _HOW},
        **({} if tokenizer is None else {"tokenizer_sha256": tokenizer}),
    }
    with open_directory(out, job.settings(subject)):
        with RowFile(out / "completions.jsonl") as file:
            wanted = [
                (key, problem)
                for problem in job.suite.problems
                for sample in range(options.samples)
                if (key := (problem.task_id, sample)) not in file.rows
            ]
            if wanted:
                backend = open_backend(source, device, dtype, options.tokenizer)
                for row in _progress(complete(backend, wanted, job.sampling), len(wanted), "text"):
                    file.add(row)
            rows = list(file.rows.values())
        return _judge(job, out, rows, subject)


def _identity(source: Path) -> str:
    """A hash that tells one model's weights from another's without reading them all."""
    manifest = source / "manifest.json"
    if manifest.is_file():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()
    files = sorted(path for path in source.iterdir() if path.suffix in (".safetensors", ".json"))
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _require_all(job: _Job, rows: Iterable[Mapping[str, Any]], subject: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if a problem has no completion."""
    names = {problem.task_id for problem in job.suite.problems}
    absent = names - {row["task_id"] for row in rows}
    if absent:
        raise ValueError(
            f"{subject['model']}: no completion for {len(absent)} of {len(names)} problems, "
            f"for instance {min(absent)}"
        )
    _require_samples(job, rows, str(subject["model"]))


def _require_samples(job: _Job, rows: Iterable[Mapping[str, Any]], where: str) -> None:
    """Raise a `ValueError` if a problem has fewer completions than a k that was asked for."""
    counts = Counter(row["task_id"] for row in rows)
    task_id, fewest = min(counts.items(), key=lambda item: item[1])
    if job.options.k is not None and max(job.options.k) > fewest:
        raise ValueError(
            f"--k {max(job.options.k)} needs as many completions of each problem; {where} has "
            f"{fewest} of {task_id}"
        )


def _judge(
    job: _Job, out: Path, completions: Iterable[Mapping[str, Any]], subject: Mapping[str, Any]
) -> dict[str, Any]:
    """Run the programs that have no result yet, and write the summary."""
    problems = {problem.task_id: problem for problem in job.suite.problems}
    rows = list(completions)
    with RowFile(out / "results.jsonl") as file:
        wanted = [row for row in rows if (row["task_id"], row["sample"]) not in file.rows]
        verdicts = judge_all(
            [_program(problems[row["task_id"]], row) for row in wanted],
            workers=job.options.workers,
            limits=job.limits,
            isolate=job.isolate,
            packages=job.packages,
        )
        for (task_id, sample), verdict in _progress(verdicts, len(wanted), "program"):
            if verdict.status == "unrunnable":
                raise ValueError(f"the test of {task_id} cannot be run: {verdict.error}")
            file.add({"task_id": task_id, "sample": sample, **asdict(verdict)})
        summary = summarise(
            job.suite, file.rows.values(), job.options.k or _DEFAULT_KS, job.similarity
        )
    summary = {
        **summary,
        "isolation": describe_isolation(job.isolate, job.versions),
        **job.settings(subject),
    }
    write_durably(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_durably(out / "summary.txt", render(summary) + "\n")
    return summary


def _program(problem: Problem, row: Mapping[str, Any]) -> tuple[Key, str, Any]:
    """A completion as a whole program, with its test."""
    return (problem.task_id, row["sample"]), problem.prefix + row["completion"], problem.test


def _progress(items: Iterable[Any], total: int, unit: str) -> Iterator[Any]:
    """Show a bar on a terminal."""
    from tqdm import tqdm

    yield from tqdm(items, total=total, unit=unit, disable=not sys.stderr.isatty(), leave=False)


def _evaluate_run(job: _Job) -> dict[str, Any]:
    """Score every checkpoint of a run, oldest first; what has results already costs nothing."""
    options = job.options
    run_dir = Path(options.model)
    if (run_dir / MANIFEST_NAME).exists() or (run_dir / "config.json").exists():
        raise ValueError(f"{run_dir}: is one model; --follow and --all-checkpoints need a run")
    if not options.follow and not find_checkpoints(run_dir):
        raise ValueError(f"{run_dir}: no checkpoint in it; --all-checkpoints needs a run directory")
    curve = Curve(
        run_dir=run_dir,
        out=options.out or run_dir / "evaluations" / job.suite.name,
        suite_name=job.suite.name,
        evaluate=lambda checkpoint, out: _evaluate_model(job, checkpoint, out),
        every_steps=options.every_steps,
    )
    found = curve.score_all()
    if options.follow:
        found = curve.follow(options.poll_seconds, options.patience_seconds)
    summary: dict[str, Any] | None = None
    for checkpoint, summary in found:
        if not options.json:
            print(f"{checkpoint.name}, {summary['training_tokens']:,} tokens")
            print(render(summary), flush=True)
        if options.follow:
            curve.record(summary, tensorboard=True)
    if summary is None:
        raise CheckpointError(f"{run_dir}: no checkpoint of it could be scored")
    return {**summary, "checkpoints": curve.record(summary, tensorboard=options.tensorboard)}
