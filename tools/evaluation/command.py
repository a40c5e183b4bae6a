"""`megaphi evaluate`: pass@k of a model, or of given completions, on a suite of programs.

MODEL is a run (its newest checkpoint), a checkpoint, or a Hugging Face directory: a phi model, or
any other causal language model if `transformers` is installed. Programs run isolated by bubblewrap
and are judged from outside; without it the command refuses. A killed evaluation continues when the
same command is given again. With --follow it scores each checkpoint of a run as it is published,
on this machine or another, and draws the score over the training's tokens into its TensorBoard.
"""

import argparse
import functools
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipeline.sandbox.executor import judge_all
from data_pipeline.sandbox.packages import Packages, find_packages
from data_pipeline.sandbox.sandbox import Limits, SandboxPair, describe_isolation
from megaphi.durable import file_sha256, write_durably
from megaphi.formats.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    find_checkpoints,
)
from tools.evaluation.checkpoints import Curve, progress_of
from tools.evaluation.compare import (
    compare_directories,
    outcomes_of,
    pair,
    render_comparison,
)
from tools.evaluation.completions import Sampling, complete, open_backend
from tools.evaluation.given import read_completions
from tools.evaluation.options import evaluation_parser
from tools.evaluation.perturb import FAMILIES, perturb_suite
from tools.evaluation.report import read_similarity, render, summarise
from tools.evaluation.store import Key, RowFile, open_directory
from tools.evaluation.suites import Problem, Suite, load_suite
from tools.model_options import (
    check_sampling,
    choose_device,
    tokenizer_file,
    wait_without_spinning,
)
from tools.option_names import flags_of, translated

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

    @property
    def families(self) -> list[str]:
        """The perturbations that were asked for."""
        wanted = self.options.perturb or []
        return [family for family in FAMILIES if family in wanted or "all" in wanted]

    def settings(self, subject: Mapping[str, Any], suite: Suite) -> dict[str, Any]:
        """What results depend on, for telling whether an evaluation may continue."""
        return {
            **subject,
            "suite_sha256": suite.sha256,
            "limits": asdict(self.limits),
            "sandbox": self.isolate,
            "packages": self.versions,
        }


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit status."""
    wait_without_spinning()
    options = evaluation_parser(__doc__ or "").parse_args(argv)
    if options.compare is not None:
        return _compare(options)
    with translated(flags_of(options)):
        job = _try_sandbox(_check(options))
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
    scores = [summary["statuses"].get("passed", 0) / summary["programs"]]
    scores += [found["after"]["value"] for found in summary.get("perturbed", {}).values()]
    failed = options.canonical and min(scores) < 1
    return 1 if failed else 0


def _check(options: argparse.Namespace) -> _Job:
    """Read what the options name.

    Raises:
        FileNotFoundError, ValueError: they do not fit together or name what is not there.
    """
    subjects = [options.model is not None, options.completions is not None, options.canonical]
    if sum(subjects) != 1:
        raise ValueError(
            "give exactly one of MODEL, --completions FILE.jsonl, --canonical and --compare A B"
        )
    if options.follow:
        options.all_checkpoints = options.tensorboard = True
    if options.all_checkpoints and options.model is None:
        raise ValueError("--all-checkpoints and --follow need a run directory as MODEL")
    if options.tensorboard and not options.all_checkpoints:
        raise ValueError("--tensorboard goes with --all-checkpoints")
    if options.suite is None:
        raise ValueError("--suite is needed: humaneval, mbpp or FILE.jsonl")
    if options.perturb and options.completions is not None:
        raise ValueError(
            "--perturb needs MODEL or --canonical: given completions answer the clean prompts"
        )
    if options.out is None and not options.all_checkpoints:
        raise ValueError("--out DIR is needed, a directory for the results")
    for name in _POSITIVE:
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, and no infinity")
    check_sampling(options)
    if options.k is not None and min(options.k) < 1:
        raise ValueError("--k must be above 0")
    if options.k is not None and options.model is not None and max(options.k) > options.samples:
        raise ValueError(f"--k {max(options.k)} needs as many --samples, not {options.samples}")
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
    sandboxes = SandboxPair(job.limits, isolate=job.isolate, packages=job.packages)
    try:
        users: dict[str, str] = {}
        for problem in job.suite.problems:
            for name in problem.test.imports:
                users.setdefault(name, problem.task_id)
        missing = sandboxes.missing_modules(list(users))
    finally:
        sandboxes.close()
    if missing:
        raise ValueError(
            f"the test of {users[missing[0]]} cannot be run: it imports {missing[0]}, which the "
            f"sandbox does not have; install it and give --package {missing[0].partition('.')[0]}"
        )
    return replace(job, versions=sandboxes.packages)


def _tell(job: _Job, summary: Mapping[str, Any]) -> None:
    """Print a summary for people."""
    if not job.options.json:
        print(render(summary))


def _compare(options: argparse.Namespace) -> int:
    """Compare two finished evaluations; returns the exit status."""
    given = [options.model, options.completions, options.suite, options.perturb]
    if options.canonical or any(word is not None for word in given):
        raise ValueError("--compare A B takes two finished evaluations and nothing to evaluate")
    found = compare_directories(*options.compare)
    text = json.dumps(found) if options.json else render_comparison(found)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_durably(options.out / "comparison.json", json.dumps(found, indent=1) + "\n")
    print(text)
    return 0


def _evaluate_given(job: _Job) -> dict[str, Any]:
    """Score completions from a file, or the suite's own solutions."""
    options = job.options
    if options.canonical:
        missing = [p.task_id for p in job.suite.problems if p.canonical is None]
        if missing:
            raise ValueError(f"{options.suite}: {missing[0]} has no solution of the suite's own")
        rows: list[dict[str, Any]] = _canonical_rows(job.suite, options.out)
        _require_samples(job, rows, "--canonical")
        return _evaluate(job, options.out, {"model": "canonical solutions"}, _canonical_rows)
    rows = list(read_completions(options.completions, job.suite))
    digest = file_sha256(options.completions)
    subject = {"model": str(options.completions), "completions_sha256": digest}
    _require_all(job, rows, subject)
    return _evaluate(job, options.out, subject, lambda suite, out: rows)


def _canonical_rows(suite: Suite, _: Path) -> list[dict[str, Any]]:
    return [{"task_id": p.task_id, "sample": 0, "completion": p.canonical} for p in suite.problems]


def _evaluate_model(job: _Job, source: Path, out: Path) -> dict[str, Any]:
    """Generate what is missing, then score."""
    options = job.options
    device, dtype = choose_device(options.device, options.dtype)
    tokenizer = None
    if options.tokenizer is not None:
        tokenizer = file_sha256(tokenizer_file(options.tokenizer))
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
    backend = functools.cache(lambda: open_backend(source, device, dtype, options.tokenizer))

    def generate(suite: Suite, folder: Path) -> list[dict[str, Any]]:
        with RowFile(folder / "completions.jsonl") as file:
            wanted = [
                (key, problem)
                for problem in suite.problems
                for sample in range(options.samples)
                if (key := (problem.task_id, sample)) not in file.rows
            ]
            if wanted:
                found = complete(backend(), wanted, job.sampling)
                for row in _progress(found, len(wanted), "text"):
                    file.add(row)
            return list(file.rows.values())

    return _evaluate(job, out, subject, generate)


Completions = Callable[[Suite, Path], list[dict[str, Any]]]
"""The completions of a suite, kept in a directory where that is worth while."""


def _evaluate(
    job: _Job, out: Path, subject: Mapping[str, Any], completions: Completions
) -> dict[str, Any]:
    """Score a suite, and alongside it the perturbed ones; leaves the summary in the directory."""
    with open_directory(out, job.settings(subject, job.suite)):
        results = _judge(job, job.suite, out, completions(job.suite, out))
        summary = {
            **summarise(job.suite, results, job.options.k or _DEFAULT_KS, job.similarity),
            "isolation": describe_isolation(job.isolate, job.versions),
            **job.settings(subject, job.suite),
        }
        if job.families:
            clean = outcomes_of(results)
            summary["perturbed"] = {
                family: _perturbed(job, family, clean, out, subject, completions)
                for family in job.families
            }
        write_durably(out / "summary.json", json.dumps(summary, indent=1) + "\n")
        write_durably(out / "summary.txt", render(summary) + "\n")
    return summary


def _perturbed(
    job: _Job,
    family: str,
    clean: Mapping[str, list[bool]],
    out: Path,
    subject: Mapping[str, Any],
    completions: Completions,
) -> dict[str, Any]:
    """Score a perturbed suite, paired with the clean one; the suite is kept with its results."""
    suite, changed = perturb_suite(job.suite, family)
    folder = out / "perturbed" / family
    with open_directory(folder, {**job.settings(subject, suite), "perturbed": family}):
        text = "".join(json.dumps(row) + "\n" for _, row in suite.rows)
        write_durably(folder / "suite.jsonl", text)
        results = _judge(job, suite, folder, completions(suite, folder))
    return {"changed": len(changed), **pair(clean, outcomes_of(results))}


def _identity(source: Path) -> str:
    """A hash that tells one model's weights from another's without reading them all."""
    manifest = source / "manifest.json"
    if manifest.is_file():
        return file_sha256(manifest)
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


def _judge(job: _Job, suite: Suite, out: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the programs that have no result yet; returns all results."""
    problems = {problem.task_id: problem for problem in suite.problems}
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
        return list(file.rows.values())


def _program(problem: Problem, row: Mapping[str, Any]) -> tuple[Key, str, Any]:
    """A completion as a whole program, with its test."""
    prefix = "" if row.get("whole") else problem.prefix
    return (problem.task_id, row["sample"]), prefix + row["completion"], problem.test


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
