"""Wrong calls and files of `megaphi generate` and `evaluate`: a line, status 2, and no traces."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megaphi.config import Model
from megaphi.formats.weights import write_weights_checkpoint
from megaphi.model.phi import parameter_shapes
from tests.helpers import write_byte_tokenizer
from tests.isolation import needs_sandbox
from tools.cli import main

pytestmark = needs_sandbox

ROW = {
    "task_id": "t/0",
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "canonical_solution": "    return a + b\n",
}
MBPP_ROW = {"task_id": 11, "text": "Add.", "test_list": ["assert add(1, 2) == 3"], "code": "x"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_model(directory: Path) -> Path:
    """A checkpoint of a tiny model with a byte tokenizer."""
    config = Model(
        num_layers=1, hidden_size=16, num_heads=2, vocab_size=320, max_sequence_length=64
    )
    random = torch.Generator().manual_seed(0)
    weights = [(n, torch.randn(s, generator=random)) for n, s in parameter_shapes(config).items()]
    tokenizer_dir = directory.with_name("bytes")
    tokenizer_dir.mkdir()
    write_weights_checkpoint(
        directory, config, weights, write_byte_tokenizer(tokenizer_dir), {"kind": "weights"}
    )
    return directory


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "task_id": None}, "row 1: task_id must be"),
        ({**ROW, "entry_point": "add; import os"}, "row 1: entry_point 'add; import os' is no"),
        ({**ROW, "canonical_solution": 5}, "row 1: canonical_solution must be a text"),
        ({**ROW, "prompt": ""}, "row 1: prompt is empty"),
        ({**ROW, "prompt": "a\ud800"}, "row 1: prompt has the lone surrogate '\\ud800'"),
        ({**MBPP_ROW, "test_list": []}, "row 1: test_list is empty"),
        ({**MBPP_ROW, "test_setup_code": 5}, "row 1: test_setup_code must be a text"),
        ({**MBPP_ROW, "code": 5}, "row 1: code must be a text"),
    ],
)
def test_suites_with_wrong_fields(tmp_path: Path, capsys, row: dict, message: str) -> None:
    suite = write(tmp_path / "suite.jsonl", row)
    words = ["evaluate", "--canonical", "--suite", str(suite), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mbpp_has_numbers(tmp_path: Path, capsys) -> None:
    file = write(tmp_path / "m.jsonl", {**MBPP_ROW, "task_id": "mine/1"})
    words = ["evaluate", "--canonical", "--suite", "mbpp", "--suite-file", str(file)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "m.jsonl: row 1: task_id must be a number of MBPP" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "nan"], "--temperature must be 0 or above, not nan"),
        (["--temperature", "1", "--top-p", "7"], "--top-p must be above 0 and at most 1, not 7"),
        (["--timeout", "inf"], "--timeout must be above 0, and no infinity"),
        (["--tokenizer", "nowhere"], "nowhere: no tokenizer.json"),
        (["--k", "1", "10"], "--k 10 needs as many --samples, not 1"),
    ],
)
def test_a_wrong_call_does_not_claim_the_directory(
    tmp_path: Path, capsys, words: list[str], message: str
) -> None:
    """What a wrong call asked for must not be in the way of the right one."""
    model, out = make_model(tmp_path / "model"), tmp_path / "out"
    suite = write(tmp_path / "suite.jsonl", ROW)
    call = ["evaluate", str(model), "--suite", str(suite), "--out", str(out)]
    assert main([*call, *words]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_completions_that_lack_a_problem_do_not_claim_it_either(tmp_path: Path, capsys) -> None:
    suite = write(tmp_path / "suite.jsonl", ROW, {**ROW, "task_id": "t/1"})
    given = {"task_id": "t/0", "completion": ROW["canonical_solution"]}
    file = write(tmp_path / "given.jsonl", given)
    words = ["evaluate", "--completions", str(file), "--suite", str(suite)]
    words += ["--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "no completion for 1 of 2 problems, for instance t/1" in capsys.readouterr().err
    write(file, given, {**given, "task_id": "t/1"})
    assert main(words) == 0


def test_another_tokenizer_is_another_evaluation(tmp_path: Path, capsys) -> None:
    model, out = make_model(tmp_path / "model"), tmp_path / "out"
    suite = write(tmp_path / "suite.jsonl", ROW)
    words = ["evaluate", str(model), "--suite", str(suite), "--out", str(out)]
    words += ["--max-new-tokens", "2"]
    assert main(words) == 0
    assert main([*words, "--tokenizer", str(model / "tokenizer")]) == 2
    assert "begun with tokenizer_sha256 None" in capsys.readouterr().err


def test_out_is_a_file(tmp_path: Path, capsys) -> None:
    suite = write(tmp_path / "suite.jsonl", ROW)
    words = ["evaluate", "--canonical", "--suite", str(suite), "--out"]
    for out in (suite, suite / "below"):
        assert main([*words, str(out)]) == 2
        assert "suite.jsonl" in (message := capsys.readouterr().err)
        assert "give another --out" in message


@pytest.mark.parametrize("content", ['{"benchmarks": 5}', '{"benchmarks": {"x": {}}}'])
def test_a_report_of_something_else(tmp_path: Path, capsys, content: str) -> None:
    suite = write(tmp_path / "suite.jsonl", ROW)
    (tmp_path / "report.json").write_text(content)
    words = ["evaluate", "--canonical", "--suite", str(suite), "--out", str(tmp_path / "out")]
    assert main([*words, "--similarity", str(tmp_path / "report.json")]) == 2
    assert "not a report of `megaphi data decontaminate`" in capsys.readouterr().err


def test_follow_needs_a_run(tmp_path: Path, capsys) -> None:
    """A single checkpoint never gets another one: it would be waited for without end."""
    model = make_model(tmp_path / "model")
    suite = write(tmp_path / "suite.jsonl", ROW)
    assert main(["evaluate", str(model), "--suite", str(suite), "--follow"]) == 2
    assert "is one model; --follow and --all-checkpoints need a run" in capsys.readouterr().err


def test_follow_says_that_it_waits(tmp_path: Path) -> None:
    suite = write(tmp_path / "suite.jsonl", ROW)
    words = ["evaluate", str(tmp_path / "never"), "--suite", str(suite), "--follow"]
    follower = subprocess.Popen(
        [sys.executable, "-m", "megaphi", *words, "--poll-seconds", "0.1"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert follower.stderr is not None
        line = follower.stderr.readline()
        assert "never (there is no such directory yet): waiting for its first checkpoint" in line
    finally:
        follower.kill()
        follower.communicate()


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"caf\xe9", "p.txt", "p.txt: not UTF-8 at byte 3"),
        (b"\n\n", "p.jsonl", "p.jsonl: no prompt in it"),
        (b'{"prompt": "a"}\n{"prompt": "\\udcff"}\n', "p.jsonl", "line 2: the prompt has the lone"),
    ],
)
def test_prompts_that_are_no_text(
    tmp_path: Path, capsys, content: bytes, name: str, message: str
) -> None:
    model = make_model(tmp_path / "model")
    (tmp_path / name).write_bytes(content)
    assert main(["generate", str(model), "--prompt-file", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "policy"),
    [
        (["generate", "nowhere", "--prompt", "a"], None),
        (["generate", "nowhere", "--prompt", "a"], "ACTIVE"),
        (["convert", "to-hf", "nowhere", "out"], None),
        (["evaluate", "nowhere", "--suite", "suite.jsonl", "--out", "out"], None),
    ],
)
def test_threads_sleep_while_they_wait(
    tmp_path: Path, words: list[str], policy: str | None
) -> None:
    """OpenMP itself says what it understood when torch loads it; the user's choice is kept."""
    write(tmp_path / "suite.jsonl", ROW)
    environment = {**os.environ, "OMP_DISPLAY_ENV": "TRUE", "PYTHONPATH": os.getcwd()}
    environment.pop("GOMP_SPINCOUNT", None)
    environment.pop("OMP_WAIT_POLICY", None)
    if policy is not None:
        environment["OMP_WAIT_POLICY"] = policy
    done = subprocess.run(
        [sys.executable, "-m", "megaphi", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"OMP_WAIT_POLICY = '{policy or 'PASSIVE'}'" in done.stderr
