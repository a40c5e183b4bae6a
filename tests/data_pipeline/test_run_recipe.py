"""`megaphi data run`: recipes checked before anything runs, reuse, rebuilds, kills, estimates."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.dedup import stage as dedup_stage
from megaphi.data.indexed import IndexedDataset
from tools.cli import main
from tools.data.run.estimate import MB_PER_CPU_SECOND
from tools.data.run.recipe import read_recipe

ROOT = Path(__file__).parents[2]

RECIPE = """
work: WORK
variables: {code: CODE}
stages:
  raw: {verb: ingest, sources: ["${code}"], source: test}
  unique: {verb: dedup, inputs: [raw]}
  report: {verb: report, inputs: [unique], before: ["${raw}"], examples: 3}
  tokenizer: {verb: train-tokenizer, inputs: [unique], vocab_size: 320}
  first: {verb: tokenize, inputs: [unique], tokenizer: "${tokenizer}"}
  second: {verb: tokenize, inputs: [raw], tokenizer: "${tokenizer}", shuffle_seed: 7}
  both: {verb: merge, inputs: [first, second], out: tokens/both}
  blend: {verb: blend, sources: ["${first}=2", "${second}"]}
"""


def write_code(folder: Path, files: int = 12) -> Path:
    folder.mkdir(parents=True)
    for number in range(files):
        lines = [f"value_{n} = {number % 9} * {n} + {n * number}\n" for n in range(30)]
        (folder / f"{number:02d}.py").write_text("".join(lines))
    (folder / "copy.py").write_text((folder / "00.py").read_text())
    (folder / "bad.py").write_bytes(b"\xff\xfe")
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_code(tmp_path / "code")
    path = tmp_path / "recipe.yaml"
    text = RECIPE.replace("WORK", str(tmp_path / "work")).replace("CODE", str(tmp_path / "code"))
    path.write_text(text)
    return path


def run(*words: object) -> int:
    return main(["data", "run", *map(str, words), "--workers", "1"])


def report_of(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, dict[str, Any]]:
    capsys.readouterr()
    assert run(*words, "--json") == 0, capsys.readouterr().err
    stages = json.loads(capsys.readouterr().out)["stages"]
    return {row["stage"]: row for row in stages}


def outputs(work: Path) -> dict[str, str]:
    """SHA-256 of every file of a corpus; of a manifest, without what differs from run to run."""
    found = {}
    for path in sorted(work.rglob("*")):
        if path.is_file() and path.name != "run.json":
            data = path.read_bytes()
            if path.name == "manifest.json":
                kept = {k: v for k, v in json.loads(data).items() if k != "run"}
                data = json.dumps(kept).encode()
            if path.suffix == ".json":  # where it lies does not count
                data = data.replace(str(work).encode(), b"")
            found[str(path.relative_to(work))] = hashlib.sha256(data).hexdigest()
    return {k: v for k, v in found.items() if k not in ("blend.yaml",)}


def edit(recipe: Path, stage: str, **values: Any) -> None:
    tree = yaml.safe_load(recipe.read_text())
    tree["stages"].setdefault(stage, {}).update(values)
    recipe.write_text(yaml.safe_dump(tree, sort_keys=False))


# ---- what is wrong is said before anything runs -------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages: {a: {verb: ingets, sources: [x]}}", "stage a: unknown verb ingets; the nearest "),
        ("stages: {a: {verb: ingest, sources: [x], max_byte: 3}}", "known key is max-bytes"),
        ("stages: {a: {verb: dedup, inputs: [rwa]}, raw: {verb: ingest, sources: [x]}}", "is raw"),
        ("stages: {a: {verb: dedup, inputs: [b]}, b: {verb: dedup, inputs: [a]}}", "in a circle"),
        ("stages: {a: {verb: dedup, inputs: [a]}}", "in a circle: a -> a"),
        ("stages: {a: {verb: dedup}}", "stage a: records or inputs is missing"),
        ("stages: {a: {verb: dedup, inputs: [], records: [x], near: wide}}", "invalid float value"),
        (
            "stages: {a: {verb: dedup, records: [x], overwrite: true}}",
            "given by `megaphi data run`",
        ),
        ("stages: {a: {verb: dedup, records: [x], exact_only: 3}}", "exact_only is true or false"),
        ("stages: {a: {verb: ingest, sources: [x], limit: [1, 2]}}", "limit takes one value"),
        ("stages: {a: {verb: ingest, sources: ['${cod}']}}", "unknown name cod; the nearest"),
        ("stages: {a: {verb: ingest, sources: [x], out: ../b}}", "must lie within work"),
        ("stages: {a: {verb: ingest, sources: [x]}, a: {verb: dedup}}", "line 3: a is given twice"),
        (
            "stages: {a: {verb: ingest, sources: [x]}, b: {verb: ingest, sources: [x], out: a}}",
            "stages a and b make the same output",
        ),
        ("stages: {code: {verb: ingest, sources: [x]}}", "code is both a variable and a stage"),
        ("stages: {a: {verb: ingest, sources: [x], expect: {gigabyte: 1}}}", "is gigabytes"),
        (
            "stages: {a: {verb: filter, records: [x], filter: y}}",
            "one of threshold, keep_tokens and ",
        ),
        ("stages: {}\nstage: 3", "unknown section stage; the nearest known section is stages"),
        ("stages: [a]", "a corpus recipe is a mapping"),
        ("stages: {a: {verb: run, recipe: x}}", "unknown verb run"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_stage_and_key(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"work: {tmp_path}/work\nvariables: {{code: here}}\n{change}\n")
    assert run(path) == 2
    err = capsys.readouterr().err
    assert message in err
    assert str(path) in err
    assert err.count("\n") == 1
    assert not (tmp_path / "work").exists()


def test_a_missing_file_of_the_last_stage_stops_the_first(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(recipe, "last", verb="decontaminate", inputs=["unique"], against=["gone.jsonl"])
    assert run(recipe) == 2
    assert "stage last: against: gone.jsonl: no such file" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


# ---- the commands -------------------------------------------------------------------------------


def test_the_printed_commands_make_the_same_corpus(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    assert run(recipe, "--work", tmp_path / "by-hand", "--dry-run") == 0
    commands = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "by-hand").exists()
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "megaphi"
        assert main(words) == 0
    assert run(recipe) == 0
    assert outputs(tmp_path / "by-hand") == outputs(tmp_path / "work")
    assert "tokens/both.bin" in outputs(tmp_path / "work")
    table = capsys.readouterr().out.splitlines()[-9:]
    assert table[0].split()[:4] == ["stage", "verb", "documents", "size"]
    assert table[1].split()[:3] == ["raw", "ingest", "13"]


def test_engines_and_settings_reach_the_commands(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--set", "unique.near=0.7", "--set", "variables.code=other place", "--dry-run"]
    words += ["--engine", "slurm", "--slurm-option=--mem=4G"]
    assert run(recipe, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    work = recipe.parent / "work"
    engine = "--workers 1 --engine slurm --slurm-option=--mem=4G --submit --wait"
    assert lines[0] == (
        f"megaphi data ingest 'other place' --source test --out {work}/raw {engine}"
    )
    assert lines[1] == f"megaphi data dedup {work}/raw --near 0.7 --out {work}/unique {engine}"
    assert "slurm" not in lines[3]  # a tokenizer is trained by one process


@pytest.mark.parametrize("name", ["quickstart-data", "phi-1-data"])
def test_the_shipped_recipes_are_right(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "launch" / "recipes" / f"{name}.yaml"
    assert run(path, "--dry-run") == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == len(yaml.safe_load(path.read_text())["stages"])
    assert run(path, "--estimate", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["stages"]
    assert all(row["why"] for row in rows)


# ---- reuse and rebuilds -------------------------------------------------------------------------


def test_what_is_done_is_reused_and_what_changed_is_made_anew(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    first = report_of(capsys, recipe)
    assert {row["state"] for row in first.values()} == {"made"}
    again = report_of(capsys, recipe)
    states = {name: row["state"] for name, row in again.items()}
    assert states == dict.fromkeys(again, "reused")
    saved = json.loads((work / "run.json").read_text())["stages"]
    assert [row["stage"] for row in saved] == list(again)
    # another input: what lies downstream follows; the second token file depends on it, too
    (tmp_path / "code" / "new.py").write_text("new = 1\n" * 40)
    changed = report_of(capsys, recipe)
    assert {row["state"] for row in changed.values()} == {"made"}
    assert changed["both"]["documents"] == first["both"]["documents"] + 2
    fresh = tmp_path / "fresh"
    report_of(capsys, recipe, "--work", fresh)
    assert outputs(work) == outputs(fresh)
    # another option of one stage: what is before it stays
    states = {
        name: row["state"]
        for name, row in report_of(capsys, recipe, "--set", "second.shuffle_seed=8").items()
    }
    made = {name for name, state in states.items() if state == "made"}
    assert made == {"second", "both"}, "the weights are the same"


def test_outputs_that_the_recipe_did_not_make_are_never_replaced(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "work" / "unique"
    write_code(tmp_path / "other", 3)
    words = ["data", "ingest", str(tmp_path / "other"), "--out", str(theirs)]
    assert main(words) == 0
    before = outputs(theirs)
    for _ in range(2):  # also when the run knows of its own failure
        assert run(recipe) == 2
        assert "holds the output of other inputs or options" in capsys.readouterr().err
        assert outputs(theirs) == before
    shutil.rmtree(theirs)
    (tmp_path / "work" / "blend.yaml").write_text("mine")
    assert run(recipe) == 2
    assert (tmp_path / "work" / "blend.yaml").read_text() == "mine"


def test_only_and_from(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(report_of(capsys, recipe, "--only", "raw")) == ["raw"]
    assert run(recipe, "--only", "first") == 2
    assert "unique: not a records directory" in capsys.readouterr().err
    report_of(capsys, recipe)
    assert list(report_of(capsys, recipe, "--from", "first")) == ["first", "both", "blend"]
    assert run(recipe, "--from", "frist") == 2
    assert "unknown stage frist; the nearest known stage is first" in capsys.readouterr().err


def test_too_many_rejects_exit_with_3_and_keep_what_is_done(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe, "--set", "unique.max_reject=0.01") == 3
    captured = capsys.readouterr()
    assert "stage unique stopped" in captured.err
    assert "failed" in captured.out
    saved = json.loads((tmp_path / "work" / "run.json").read_text())["stages"]
    assert [(row["stage"], row["state"]) for row in saved] == [
        ("raw", "made"),
        ("unique", "failed"),
    ]
    assert report_of(capsys, recipe)["raw"]["state"] == "reused"


# ---- kill -9 ------------------------------------------------------------------------------------

DRIVER = """
import os, signal, sys, threading, time
import data_pipeline.ingest.stage, tools.data.command, tools.cli
import data_pipeline.dedup.stage, data_pipeline.report.build, data_pipeline.tokens.tokenize_records
data_pipeline.ingest.stage.SHARD_BYTES = 4000
os.fsync = lambda handle: None  # a killed process loses nothing that it wrote; saves much time
for line in sys.stdin:
    seconds, *words = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        os._exit(tools.cli.main(words))
    if float(seconds):
        timer = threading.Timer(float(seconds), os.kill, (child, signal.SIGKILL))
        timer.start()
    started = time.monotonic()
    status = os.waitpid(child, 0)[1]
    if float(seconds):
        timer.cancel()
    print(status, time.monotonic() - started, flush=True)
"""


def test_killed_at_random_instants_it_ends_with_the_same_bytes(
    recipe: Path, tmp_path: Path
) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "log").open("w"),
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert driver.stdin is not None
    assert driver.stdout is not None

    def attempt(work: Path, seconds: float) -> tuple[int, float]:
        words = ["data", "run", str(recipe), "--work", str(work), "--workers", "1"]
        driver.stdin.write("\t".join([str(seconds), *words]) + "\n")
        driver.stdin.flush()
        status, took = driver.stdout.readline().split()
        return int(status), float(took)

    try:
        status, whole = attempt(tmp_path / "whole", 0)
        assert status == 0, (tmp_path / "log").read_text()
        golden = outputs(tmp_path / "whole")
        assert {"first.bin", "first.idx", "tokens/both.bin", "tokens/both.idx"} <= set(golden)
        seed = random.SystemRandom().randrange(1_000_000)
        print(f"seed {seed}")
        rng = random.Random(seed)
        killed, rounds = 0, 0
        while killed < 3:
            rounds += 1
            assert rounds < 20, "the runs end before they can be killed"
            work = tmp_path / f"round-{rounds}"
            # several kills of one corpus, each at another instant, then on to the end
            for _ in range(3):
                status, _ = attempt(work, rng.uniform(0.05, 0.9) * whole)
                assert status in (0, signal.SIGKILL), (tmp_path / "log").read_text()[-2000:]
                killed += status == signal.SIGKILL
            status, _ = attempt(work, 0)
            assert status == 0, (tmp_path / "log").read_text()[-2000:]
            left = outputs(work)
            assert {k: v for k, v in left.items() if ".partial" not in k} == golden
            lines = (work / "first.documents.jsonl").read_text().splitlines()
            ids = [json.loads(line)["id"] for line in lines]
            assert len(ids) == len(set(ids)) == len(IndexedDataset(work / "first"))
    finally:
        driver.stdin.close()
        driver.wait(timeout=30)


# ---- estimates ----------------------------------------------------------------------------------


def test_an_estimate_is_size_over_the_measured_rate_times_the_users_price(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """
work: w
prices: {cpu_hour: 0.5}
stages:
  raw: {verb: ingest, sources: [x], expect: {gigabytes: 36}}
  clean: {verb: heuristics, inputs: [raw], expect: {gigabytes: 18}}
  unique: {verb: dedup, inputs: [clean]}
  plan: {verb: plan-generation, kind: exercises, samples: 10}
  made:
    verb: generate
    inputs: [plan]
    model: m
    base_url: http://127.0.0.1:1/v1
    price_in: 2
    price_out: 8
    tokens_per_minute: 1000000
    expect: {prompt_tokens: 30000000, completion_tokens: 90000000, tokens: 90000000}
  unpriced: {verb: generate, inputs: [plan], model: m, base_url: "http://127.0.0.1:1/v1"}
"""
    )
    assert main(["data", "run", str(path), "--estimate", "--workers", "10", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = {row["stage"]: row for row in result["stages"]}
    assert result["total"]["dollars"] == pytest.approx(
        sum(row["dollars"] for row in found.values() if row["dollars"] is not None)
    )
    assert "the dollars of 1 stages" in result["total"]["why"]
    rate = MB_PER_CPU_SECOND["heuristics"][0]
    assert found["clean"]["cpu_hours"] == pytest.approx(36_000 / rate / 3600)
    assert found["clean"]["hours"] == pytest.approx(3.6 / rate / 3.6)
    assert found["clean"]["dollars"] == pytest.approx(10 / rate * 0.5)
    # dedup reads what the heuristics leave
    assert found["unique"]["gigabytes"] == 18
    assert found["made"]["dollars"] == pytest.approx(30 * 2 + 90 * 8)
    assert found["made"]["hours"] == pytest.approx(2.0)
    assert found["unpriced"]["dollars"] is None
    for _, source in MB_PER_CPU_SECOND.values():
        assert (ROOT / source).is_file()
    table = (ROOT / "docs/benchmarks/data-stages-2core.txt").read_text()
    for verb, (rate, source) in MB_PER_CPU_SECOND.items():
        if source.endswith("data-stages-2core.txt"):
            line = next(line for line in table.splitlines() if line.startswith(f"{verb} "))
            assert float(line.split()[-1]) == rate


def test_what_is_not_known_is_not_counted_as_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No price means no sum of dollars; the sizes of sources that are here are read."""

    def estimate(*words: str) -> dict[str, Any]:
        assert run(recipe, "--estimate", "--json", *words) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    found = estimate()
    size = sum(path.stat().st_size for path in (tmp_path / "code").iterdir())
    assert found["stages"][0]["gigabytes"] == pytest.approx(size / 1e9)
    assert found["total"]["dollars"] is None
    rates = {row["verb"]: row["cpu_hours"] for row in found["stages"]}
    assert rates["ingest"] == pytest.approx(size / 1e6 / MB_PER_CPU_SECOND["ingest"][0] / 3600)
    assert found["total"]["cpu_hours"] == pytest.approx(
        sum(row["cpu_hours"] for row in found["stages"])
    )
    found = estimate("--set", "variables.code=gone")
    assert [found["total"][key] for key in ("cpu_hours", "hours", "dollars")] == [None] * 3


def test_two_runs_of_other_stages_both_remember_what_they_made(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--only` lets two processes work on a recipe; the later end must not forget the other's."""
    assert run(recipe, "--only", "raw") == 0
    verb = dedup_stage.dedup_run

    def slow(*arguments: Any) -> Any:
        assert run(recipe, "--only", "second", "--set", "second.tokenizer=codegen") == 0
        return verb(*arguments)

    monkeypatch.setattr(dedup_stage, "dedup_run", slow)
    assert run(recipe, "--only", "unique") == 0
    made = json.loads((tmp_path / "work" / "run.json").read_text())["made"]
    assert set(made) == {"raw", "second", "unique"}


def test_reading_a_recipe_does_not_need_its_work_directory(recipe: Path) -> None:
    calls = read_recipe(recipe).stages
    assert [call.name for call in calls][:2] == ["raw", "unique"]
    assert calls[2].inputs == ("unique", "raw")
