"""Kill -9 at every step: nothing looks finished, and the next run gives the very same bytes.

A driver process imports everything once and forks a child for each trial. An audit hook in the
child counts the file operations on the output (open, mkdir, rename, remove) and kills the process
at the k-th. All stages share one engine: it is killed at every operation of `ingest`, and at three
random ones of each other stage.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

DRIVER = """
import contextlib, hashlib, json, os, random, shutil, signal, sys
from pathlib import Path
import data_pipeline.runner.stage, data_pipeline.ingest.stage, data_pipeline.tokens.tokenize_records
import tools.cli
with contextlib.suppress(ImportError):  # once here, and not in every child
    import awkward.contents, awkward.operations, gigatoken, tqdm

data_pipeline.ingest.stage.SHARD_BYTES = 3000
os.fsync = lambda handle: None  # a killed process loses nothing that it wrote; saves much time
root, out, seed, marker = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
argv = sys.argv[5:]
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}

count, counted = os.pipe()

def child(kill_at):
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1]
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in EVENTS and out in str(arguments[0]):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    status = tools.cli.main(argv)
    os.write(counted, seen.to_bytes(4, "little"))
    os._exit(status)

def outputs():
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if name.startswith(out) and path.is_file():
            data = path.read_bytes()
            if path.name == "manifest.json":  # seconds and the like differ from run to run
                kept = {k: v for k, v in json.loads(data).items() if k != "run"}
                data = json.dumps(kept).encode()
            found[name] = hashlib.sha256(data).hexdigest()
    return found

def clean():
    for path in root.iterdir():
        if path.name.startswith(out):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

assert child(0) == 0
operations = int.from_bytes(os.read(count, 4), "little")
golden = outputs()
clean()
points, killed, finished_early = range(1, operations + 1), 0, 0
if seed:
    points = sorted(random.Random(seed).sample(points, 3))
for kill_at in points:
    status = child(kill_at)
    if status == 0:  # the number of operations may differ by a few: threads, temporary names
        assert kill_at > 0.9 * operations, (kill_at, operations)
        clean()
        continue
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    killed += 1
    left = outputs()
    if marker in left:  # looks finished: then it has to be
        finished_early += 1
        assert {k: v for k, v in left.items() if ".partial" not in k} == golden, (kill_at, left)
    assert child(0) == 0, kill_at
    again = {k: v for k, v in outputs().items() if ".partial" not in k}
    assert again == golden, (kill_at, again, golden)
    clean()
print(json.dumps({"killed": killed, "finished_early": finished_early, "files": sorted(golden)}))
"""


def drive(
    root: Path, out: str, marker: str, argv: list[str], *, every: bool = False
) -> dict[str, Any]:
    """Kill a command at every file operation on what starts with `out`, or at three of them.

    Args:
        root: where the outputs are.
        out: how their names start.
        marker: the file that says that the output is complete.
        argv: the command.
        every: all operations; else three random ones, whose seed is printed.

    Returns:
        `killed`, how often; `finished_early`, how often the output was complete by then; `files`.
    """
    seed = 0 if every else random.SystemRandom().randrange(1, 1_000_000)
    print(f"seed {seed}")
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, str(root), out, str(seed), marker, *argv],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return report


def corpus(root: Path, files: int, size: int) -> Path:
    (root / "tree").mkdir(parents=True)
    for number in range(files):
        line = f"value_{number} = [{number * 7919 % 1009}, 'text {number}']  # comment\n"
        text = line * (size // len(line)) if number % 5 else "\0"
        (root / "tree" / f"{number:03d}.py").write_text(text)
    return root / "tree"


def test_ingest_killed_at_every_file_operation(tmp_path: Path) -> None:
    tree = corpus(tmp_path, 20, 1000)
    argv = ["data", "ingest", str(tree), "--out", str(tmp_path / "out"), "--workers", "1"]
    report = drive(tmp_path, "out", "out/manifest.json", argv, every=True)
    assert report["killed"] > 40
    assert "out/part-00003.jsonl" in str(report["files"])


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records in several parts, and a small tokenizer beside them."""
    from data_pipeline.ingest import stage as ingest
    from data_pipeline.ingest.stage import IngestOptions, plan_ingest
    from data_pipeline.runner.stage import Options, run_stage
    from data_pipeline.tokens.train_tokenizer import train_tokenizer

    root = tmp_path_factory.mktemp("records")
    tree = corpus(root, 20, 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "SHARD_BYTES", 5000)
        run_stage(*plan_ingest([str(tree)], IngestOptions()), root / "records", Options())
    train_tokenizer([root / "records"], root / "tokenizer", 320)
    return root


def test_tokenize_killed_at_any_file_operation(tmp_path: Path, records: Path) -> None:
    argv = ["data", "tokenize", str(records / "records"), "--tokenizer"]
    argv += [str(records / "tokenizer"), "--out", str(tmp_path / "out"), "--workers", "1"]
    report = drive(tmp_path, "out", "out.json", argv)
    assert report["killed"] >= 1
    assert sorted(str(name) for name in report["files"]) == [
        *("out.bin", "out.documents.jsonl", "out.idx", "out.json"),
        *("out.tokenizer/tokenizer.json", "out.tokenizer/tokenizer_config.json"),
    ]


def children_of(process: int) -> list[int]:
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(child) for child in text.split()]


def is_alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_killed_parent_takes_its_workers_along_and_the_next_run_goes_on(tmp_path: Path) -> None:
    tree = corpus(tmp_path, 400, 40_000)
    code = (
        "import sys, data_pipeline.ingest.stage as i, tools.cli; i.SHARD_BYTES = 400_000\n"
        "if __name__ == '__main__': sys.exit(tools.cli.main(sys.argv[1:]))"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}

    def command(out: str) -> list[str]:
        arguments = ["data", "ingest", str(tree), "--out", str(tmp_path / out), "--workers", "2"]
        return [sys.executable, str(script), *arguments, "--json"]

    whole = subprocess.run(
        command("whole"), env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    process = subprocess.Popen(command("killed"), env=environment, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("killed.partial/shards/00*/result.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    workers = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    assert len(workers) >= 2
    deadline = time.monotonic() + 30
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.01)
    again = subprocess.run(
        command("killed"), env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    digests = [json.loads(run.stdout)["records_sha256"] for run in (whole, again)]
    assert digests[0] == digests[1]
    for path in sorted((tmp_path / "whole").glob("*.jsonl")):
        other = tmp_path / "killed" / path.name
        assert (
            hashlib.sha256(path.read_bytes()).digest()
            == hashlib.sha256(other.read_bytes()).digest()
        )
    manifest = json.loads((tmp_path / "killed" / "manifest.json").read_text())
    assert manifest["run"]["resumed"] is True
