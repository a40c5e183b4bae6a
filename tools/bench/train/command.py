"""`megaphi bench train`: tokens a second of real training steps, and where their time goes.

Every configuration runs the trainer itself on a synthetic token file, in a process of its own: one
that crashes or runs out of memory is a row with its reason. With `--curve N` nothing is timed apart
and N steps show whether configurations learn alike.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaphi.config import Recipe
from megaphi.data.indexed import IndexedDatasetWriter, optimal_dtype
from megaphi.metrics.flops import flops_per_token, peak_flops
from megaphi.recipe_file import load_recipe
from tools.bench.machine import ROOT, child_environment

PEERS = ("transformers", "transformers-eager")
_TINY = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.num_heads": 2,
    "model.vocab_size": 512,
    "model.max_sequence_length": 64,
    "data.sequence_length": 32,
}
_DOCUMENT = 1024  # tokens of a synthetic document


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One row: what is varied. A peer ignores kernels, precision and attention."""

    micro_batch: int
    dropout: float
    precision: str
    attention: str = "auto"
    kernels: str = "torch"
    compiled: bool = False
    peer: str | None = None

    @property
    def label(self) -> str:
        """The row's name."""
        if self.peer is not None:
            how = "torch.compile" if self.peer == "transformers" else "eager"
            return f"transformers, {how}"
        parts = [self.precision, self.kernels, *(["compile"] if self.compiled else [])]
        return ", ".join([*parts, *([self.attention] if self.attention != "auto" else [])])


def run_train(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Measure every configuration.

    Returns:
        The report and its table; `failed` of the report says what went wrong.

    Raises:
        ValueError: an option or the recipe does not fit.
        FileNotFoundError: there is no such recipe.
    """
    cuda = cuda_is_there()
    configurations = configurations_of(options, cuda)
    plan = {
        "steps": options.curve or options.steps,
        "warmup_steps": 0 if options.curve else options.warmup_steps,
        "profile_steps": 0 if options.curve else options.profile_steps,
    }
    # a profiler has a warm-up step of its own
    total = sum(plan.values()) + (plan["profile_steps"] > 0)
    deadline = time.monotonic() + options.seconds
    work = Path(tempfile.mkdtemp(prefix=f"bench-{options.name}-", dir=options.work))
    # a time limit around this process ends it by SIGTERM: that must end its worker as well
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        first = load_recipe(recipe_options(options, configurations[0], work, total, cuda))
        largest = max(c.micro_batch for c in configurations) * options.accumulate
        tokens = (largest * total + 2) * first.data.sequence_length
        write_language(work / "tokens", first.model.vocab_size, tokens, first.train.seed)
        rows = []
        for number, configuration in enumerate(configurations, start=1):
            place = f"{number}/{len(configurations)}"
            print(f"{place} {configuration.label}", file=sys.stderr, flush=True)
            words = recipe_options(options, configuration, work, total, cuda)
            request = {"options": words, "peer": configuration.peer, **plan}
            left = deadline - time.monotonic()
            rows.append(measure_row(request, configuration, work, min(options.limit, left)))
    finally:
        signal.signal(signal.SIGTERM, previous)
        shutil.rmtree(work, ignore_errors=True)
    compare(rows)
    settings = {
        "curve": bool(options.curve),
        **plan,
        "accumulate": options.accumulate,
        "sequence_length": first.data.sequence_length,
        "layers": first.model.num_layers,
        "hidden_size": first.model.hidden_size,
        "overrides": options.set,
    }
    recipe = first.to_dict()
    report = {"settings": settings, "recipe": recipe, "rows": rows, "failed": failures(rows)}
    return report, table(report)


def measure_row(
    request: dict[str, Any], configuration: Configuration, work: Path, limit: float
) -> dict[str, Any]:
    """A configuration's row: what its process measured, and the rates that follow."""
    result = run_worker(request, configuration, work, limit)
    if "problem" not in result:
        result |= rates(load_recipe(request["options"]), result)
    shutil.rmtree(work / "run", ignore_errors=True)
    chosen = dataclasses.asdict(configuration)
    return {"name": configuration.label, "configuration": chosen, **result}


def configurations_of(options: argparse.Namespace, cuda: bool) -> list[Configuration]:
    """The product of all axes, peers last.

    Raises:
        ValueError: an axis has no such value.
    """
    precisions = _words(options.precisions or ("bf16" if cuda else "fp32"))
    kernels = _words(options.kernels or ("triton,torch" if cuda else "torch"))
    batches = [int(word) for word in _words(options.micro_batches or ("8" if cuda else "2"))]
    dropouts = [float(word) for word in _words(options.dropout)]
    compiled = [{"off": False, "on": True}.get(word) for word in _words(options.compile)]
    peers = _words(options.peer or "")
    for name in peers:
        if name not in PEERS:
            raise ValueError(f"--peer {name}: must be one of {', '.join(PEERS)}")
    if None in compiled:
        raise ValueError(f"--compile {options.compile}: must be off, on or off,on")
    ours = [
        Configuration(
            micro_batch=batch,
            dropout=dropout,
            precision=precision,
            attention=attention,
            kernels=kernel,
            compiled=bool(compile_),
        )
        for batch, dropout, precision, attention, kernel, compile_ in itertools.product(
            batches, dropouts, precisions, _words(options.attention), kernels, compiled
        )
    ]
    theirs = [
        Configuration(micro_batch=batch, dropout=dropout, precision=precisions[0], peer=peer)
        for batch, dropout, peer in itertools.product(batches, dropouts, peers)
    ]
    return ours + theirs


def _words(text: str) -> list[str]:
    """The different parts of a comma-separated list, in order."""
    return list(dict.fromkeys(word for word in text.split(",") if word))


def recipe_options(
    options: argparse.Namespace, configuration: Configuration, work: Path, steps: int, cuda: bool
) -> list[str]:
    """The command line of a recipe that a configuration stands for."""
    recipe = options.recipe
    if recipe is None and cuda:
        recipe = ROOT / "launch" / "recipes" / "phi-1-base.yaml"
    values: dict[str, Any] = {} if recipe is not None else dict(_TINY)
    values |= {
        "train.run_dir": work / "run",
        "train.steps": steps,
        "train.micro_batch_size": configuration.micro_batch,
        "train.global_batch_size": configuration.micro_batch * options.accumulate,
        "data.train": work / "tokens",
        "data.validation": "null",
        "data.split": "null",
        "data.planned_samples": "null",
        "model.residual_dropout": configuration.dropout,
        "model.attention_dropout": configuration.dropout,
        "precision.dtype": configuration.precision,
        "compute.attention": configuration.attention,
        "compute.compile": str(configuration.compiled).lower(),
        "schedule.shape": "constant",
        "schedule.decay_steps": "null",
        "schedule.warmup_steps": max(1, steps // 10),
        "checkpoint.resume": "never",
        "checkpoint.initialize_from": "null",
        "logging.tensorboard": "false",
    }
    words = [f"--{key}={value}" for key, value in values.items()]
    return [
        *([str(recipe)] if recipe is not None else []),
        *words,
        *(f"--{w}" for w in options.set),
    ]


def write_language(prefix: Path, vocab_size: int, num_tokens: int, seed: int) -> None:
    """Write a token file whose loss can fall: a Markov chain with Zipf's frequencies.

    Each token has four successors, taken with probabilities 0.6, 0.2, 0.15 and 0.05: 1.06 nats of
    entropy a token, against ln V at the start. Successors are drawn by Zipf's law, so that some
    tokens are frequent. Documents hold 1,024 tokens.
    """
    generator = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, vocab_size + 1)
    weights /= weights.sum()
    successors = generator.choice(vocab_size, size=(vocab_size, 4), p=weights)
    documents = -(-num_tokens // _DOCUMENT)
    text = np.empty((documents, _DOCUMENT), dtype=np.int64)
    text[:, 0] = generator.choice(vocab_size, size=documents, p=weights)
    for place in range(1, _DOCUMENT):
        choice = generator.choice(4, size=documents, p=(0.6, 0.2, 0.15, 0.05))
        text[:, place] = successors[text[:, place - 1], choice]
    with IndexedDatasetWriter(prefix, optimal_dtype(vocab_size)) as writer:
        for document in text:
            writer.add_document(document)


def run_worker(
    request: dict[str, Any], configuration: Configuration, work: Path, limit: float
) -> dict[str, Any]:
    """Run a configuration in its own process; its result, or the `problem` that it met."""
    if limit < 5:
        return {"problem": "no time left"}
    if configuration.kernels == "triton" and not cuda_is_there():
        return {"problem": "needs a GPU"}
    path, result = work / "request.json", work / "result.json"
    result.unlink(missing_ok=True)
    path.write_text(json.dumps(request | {"result": str(result)}), encoding="utf-8")
    command = [sys.executable, "-m", "tools.bench.train.worker", str(path)]
    environment = child_environment() | {"MEGAPHI_KERNELS": configuration.kernels}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that compile workers end with it
    )
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return {"problem": f"no result within {limit:.0f} s", "crashed": True}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode != 0 or not result.is_file():
        lines = errors.strip().splitlines() or [f"exit status {process.returncode}"]
        problem = reason(lines, process.returncode)
        # a full memory is a finding, and a ValueError says that this machine cannot do it
        expected = problem == "out of memory" or problem.startswith("failed: ValueError")
        return {"problem": problem, "crashed": not expected, "stderr": lines[-30:]}
    values: dict[str, Any] = json.loads(result.read_bytes())
    sys.stderr.write(errors)  # warnings
    losses = [*values["warmup_losses"], *values["losses"]]
    if not all(map(math.isfinite, losses)):
        return values | {"problem": "a loss is not finite", "nonfinite": True}
    return values


def cuda_is_there() -> bool:
    """Whether PyTorch finds a GPU."""
    import torch

    return torch.cuda.is_available()


def reason(lines: list[str], status: int) -> str:
    """Why a process failed, in a line."""
    if any("out of memory" in line.lower() for line in lines):
        return "out of memory"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    raised = [line for line in lines if line and not line[0].isspace()]
    return f"failed: {(raised or lines)[-1].removeprefix('[rank0]: ')[:200]}"


def rates(recipe: Recipe, result: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second and MFU, by the host's clock over all timed steps."""
    import torch

    tokens = recipe.train.global_batch_size * recipe.data.sequence_length
    rate = len(result["losses"]) * tokens / result["wall_seconds"]
    peak = peak_flops(result["device"], torch.bfloat16) if "device" in result else None
    found: dict[str, Any] = {
        "tokens_per_second": rate,
        "step_ms": statistics.median(result["step_seconds"]) * 1e3,
    }
    for key, causal in (("mfu", False), ("mfu_causal", True)):
        flops = flops_per_token(recipe.model, recipe.data.sequence_length, causal=causal)
        found[key] = None if peak is None else rate * flops / peak
    last = result["losses"][-max(1, len(result["losses"]) // 10) :]
    return found | {"final_loss": statistics.fmean(last)}


def compare(rows: list[dict[str, Any]]) -> None:
    """Set each measured row against the first of its batch and dropout, and against its peer."""

    def alike(row: dict[str, Any]) -> list[dict[str, Any]]:
        keys = ("micro_batch", "dropout")
        mine = [row["configuration"][key] for key in keys]
        return [
            other
            for other in rows
            if "problem" not in other and [other["configuration"][k] for k in keys] == mine
        ]

    for row in rows:
        if "problem" in row:
            continue
        base = alike(row)[0]
        row["over_base"] = row["tokens_per_second"] / base["tokens_per_second"]
        row["loss_difference"] = row["final_loss"] - base["final_loss"]
        peers = [r for r in alike(row) if r["configuration"]["peer"] is not None]
        if peers and row["configuration"]["peer"] is None:
            fastest = max(peers, key=lambda r: float(r["tokens_per_second"]))
            row["over_peer"] = row["tokens_per_second"] / fastest["tokens_per_second"]
            row["peer"] = fastest["name"]


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What went wrong; a row that this machine cannot run, and a peer, do not count."""
    found = [
        f"{row['name']}: {row['problem']}"
        for row in rows
        if row.get("nonfinite") or (row.get("crashed") and row["configuration"]["peer"] is None)
    ]
    if all("problem" in row for row in rows):
        found.append(f"nothing was measured; {rows[0]['name']}: {rows[0]['problem']}")
    return found


def table(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    from tools.bench.train.table import curve_lines, profile_lines, speed_lines

    settings = report["settings"]
    head = (
        f"{settings['layers']} layers of {settings['hidden_size']}, sequences of "
        f"{settings['sequence_length']:,} tokens, {settings['accumulate']} micro-batch(es) a step"
    )
    body = curve_lines(report) if settings["curve"] else speed_lines(report)
    failed = [f"FAILED {failure}" for failure in report["failed"]]
    return [head, *body, *profile_lines(report["rows"]), *failed]
