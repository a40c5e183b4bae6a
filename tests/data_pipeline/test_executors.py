"""Where shards run makes no difference: processes, Slurm with lost tasks, Ray with a lost node.

What is compared are the bytes of every part file, against the local engine's.
"""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.runner.executors import (
    LocalExecutor,
    PlanExecutor,
    ShardsPlanned,
    SliceDone,
    SliceExecutor,
)
from data_pipeline.runner.output import WorkDirectory, finish_shard, read_manifest, start_shard
from data_pipeline.runner.stage import Options, Stage, Work, run_stage
from megaphi.errors import RunError
from tests.data_pipeline import executor_shards
from tests.data_pipeline.record_files import write_records
from tools.cli import main
from tools.data.parser import STAGES, parse
from tools.data.slurm import HERE
from tools.data.stage_options import argv_of, changed


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file but the manifest, which says how long it took."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def corpus(root: Path, parts: int = 9) -> Path:
    rows = [
        [
            {"text": f"def f{n % 7}_{part % 3}():\n    return {' + '.join(['x'] * (40 + n))}\n"}
            for n in range(part, part + 5)
        ]
        for part in range(parts)
    ]
    return write_records(root, rows)


def numbers(count: int) -> tuple[Stage, Work]:
    return executor_shards.stage(count)


# ---- attempts -----------------------------------------------------------------------------------


def test_of_two_attempts_at_a_shard_the_first_that_is_done_is_taken(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "out.partial", "plan")
    shard = work.shard_directory(3)
    lost, again = start_shard(shard), start_shard(shard)
    assert lost != again
    (lost / "a").write_text("from the lost node")
    (again / "a").write_text("from the retry")
    result = {"part": [{"name": "a"}], "rejected": []}
    assert finish_shard(again, shard, {**result, "by": "retry"})["by"] == "retry"
    # the node that was taken for lost comes back, finishes late, and changes nothing
    (lost / "b").write_text("still writing")
    assert finish_shard(lost, shard, {**result, "by": "lost"})["by"] == "retry"
    assert (shard / "a").read_text() == "from the retry"
    assert sorted(path.name for path in shard.iterdir()) == ["a", "result.json"]
    assert [path.name for path in shard.parent.iterdir()] == ["00003"]
    work.release()


def test_a_straggler_cannot_write_into_what_was_published(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "out.partial", "plan")
    straggler = start_shard(work.shard_directory(0))
    open_file = (straggler / "open").open("w")
    (work.path / "manifest.json").write_text("{}")
    work.publish(tmp_path / "out")
    open_file.write("late")
    open_file.close()
    with pytest.raises(FileNotFoundError):
        (straggler / "new").write_text("late")
    with pytest.raises(FileNotFoundError):
        finish_shard(straggler, work.shard_directory(0), {"part": [], "rejected": []})
    with pytest.raises(RunError, match="share"):
        start_shard(work.shard_directory(0))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_killed_attempts_left_is_swept_and_finished_shards_stay(tmp_path: Path) -> None:
    first = WorkDirectory(tmp_path / "out.partial", "plan")
    start_shard(first.shard_directory(0))  # killed here
    done = start_shard(first.shard_directory(1))
    finish_shard(done, first.shard_directory(1), {"part": [], "rejected": []})
    torn = start_shard(first.shard_directory(2))
    finish_shard(torn, first.shard_directory(2), {"part": [{"name": "gone"}], "rejected": []})
    first.release()
    second = WorkDirectory(tmp_path / "out.partial", "plan")
    assert second.resumed
    assert [path.name for path in (second.path / "shards").iterdir()] == ["00001"]
    second.release()


# ---- slices -------------------------------------------------------------------------------------


def test_slices_share_the_shards_by_number_whatever_is_done_meanwhile(tmp_path: Path) -> None:
    stage, work = numbers(11)
    run_stage(stage, work, tmp_path / "whole", Options())
    out = tmp_path / "out"
    with pytest.raises(ShardsPlanned) as planned:
        run_stage(stage, work, out, Options(executor=PlanExecutor()))
    assert planned.value.missing == 11
    for index, expected in ((2, 3), (0, 4), (0, 0), (1, 4)):  # one of them twice
        options = Options(executor=SliceExecutor(1, index=index, slices=3))
        with pytest.raises(SliceDone) as done:
            run_stage(stage, work, out, options)
        assert (done.value.done, done.value.total) == (expected, 11)
        assert not out.exists()
    with pytest.raises(ShardsPlanned) as planned:
        run_stage(stage, work, out, Options(executor=PlanExecutor()))
    assert planned.value.missing == 0
    manifest, reused = run_stage(stage, work, out, Options())
    assert not reused
    assert manifest.run["resumed"]
    assert digests(out) == digests(tmp_path / "whole")


def test_a_slice_refuses_another_plan_and_a_directory_that_nothing_planned(tmp_path: Path) -> None:
    out, slice_ = tmp_path / "out", Options(executor=SliceExecutor(1, index=0, slices=2))
    with pytest.raises(RunError, match="nothing is planned"):
        run_stage(*numbers(4), out, slice_)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ShardsPlanned):
        run_stage(*numbers(4), out, Options(executor=PlanExecutor()))
    with pytest.raises(RunError, match="other inputs"):
        run_stage(*numbers(5), out, slice_)


def test_slices_work_side_by_side_and_keep_a_whole_run_out(tmp_path: Path) -> None:
    WorkDirectory(tmp_path / "w", "plan").release()
    one = WorkDirectory(tmp_path / "w", "plan", shared=True)
    two = WorkDirectory(tmp_path / "w", "plan", shared=True)
    with pytest.raises(RunError, match="another process"):
        WorkDirectory(tmp_path / "w", "plan")
    one.release()
    two.release()
    WorkDirectory(tmp_path / "w", "plan").release()


@pytest.mark.parametrize("text", ["3", "2/2", "-1/2", "a/b", "1/0"])
def test_a_slice_is_i_of_n(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    argv = ["data", "ingest", str(tmp_path), "--out", str(tmp_path / "o"), f"--slice={text}"]
    assert main(argv) == 2
    assert "--slice" in capsys.readouterr().err


def test_options_of_another_engine_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    argv = ["data", "ingest", str(tmp_path), "--out", str(tmp_path / "o")]
    assert main([*argv, "--submit"]) == 2
    assert "--submit belongs to --engine slurm, not local" in capsys.readouterr().err
    assert main([*argv, "--engine", "slurm", "--slice", "0/2"]) == 2
    assert "--slice belongs to --engine local" in capsys.readouterr().err


# ---- Slurm, with an sbatch that runs jobs as processes ------------------------------------------

SBATCH = """#!{python}
import itertools, os, pathlib, re, subprocess, sys
options = dict((word.lstrip("-").partition("=")[::2]) for word in sys.argv[1:])
state = pathlib.Path(os.environ["FAKE_SLURM"])
number = len(list(state.glob("job-*"))) + 100
job = state / f"job-{{number}}"
after = re.fullmatch("afterok:([0-9]+)", options.get("dependency", "afterok:0"))[1]
if after != "0" and (state / f"job-{{after}}").read_text() != "0":
    job.write_text("cancelled")
    print(number)
    sys.exit(1 if "wait" in options else 0)
tasks = [None]
if "array" in options:
    first, last = options["array"].split("-")
    tasks = range(int(first), int(last) + 1)
worst = 0
processes = []
for task in tasks:
    env = dict(os.environ) | ({{}} if task is None else {{"SLURM_ARRAY_TASK_ID": str(task)}})
    kill = os.environ.get("FAKE_KILL")
    log = options["output"].replace("%A", str(number)).replace("%j", str(number))
    log = open(log.replace("%a", str(task)), "w")
    command = options["wrap"]
    if kill is not None and str(task) == kill:
        command = "kill -9 $$"
    processes.append(subprocess.Popen(["sh", "-c", command], env=env, stdout=log, stderr=log))
worst = max(abs(process.wait()) for process in processes)
job.write_text(str(worst))
print(f"{{number}};cluster")
sys.exit(worst if "wait" in options else 0)
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the jobs; job N's file holds its exit status."""
    programs, state = tmp_path / "bin", tmp_path / "slurm"
    programs.mkdir()
    state.mkdir()
    (programs / "sbatch").write_text(SBATCH.format(python=sys.executable))
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(state))
    return state


def result_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(argv) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_an_array_that_lost_a_task_is_submitted_again_and_publishes(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = corpus(tmp_path)
    base = ["data", "dedup", str(records), "--json"]
    result_of([*base, "--out", str(tmp_path / "local"), "--workers", "1"], capsys)
    out = tmp_path / "out"
    submit = [*base, "--out", str(out), "--engine", "slurm", "--submit", "--workers", "3"]
    monkeypatch.setenv("FAKE_KILL", "1")
    first = result_of(submit, capsys)
    assert first["shards"] == 9
    assert len(first["jobs"]) == 2
    assert (slurm / f"job-{first['jobs'][0]}").read_text() == "9"
    assert (slurm / f"job-{first['jobs'][1]}").read_text() == "cancelled"
    assert not out.exists()
    done = sorted(path.name for path in tmp_path.glob("out.index.partial/shards/*"))
    assert done == [f"{n:05d}" for n in range(9) if n % 3 != 1]
    monkeypatch.delenv("FAKE_KILL")
    second = result_of([*submit, "--wait"], capsys)
    assert second["verb"] == "dedup"
    assert second["reused"]
    assert digests(out) == digests(tmp_path / "local")
    assert not list(tmp_path.glob("out.*partial*"))
    # finished: nothing to submit
    assert result_of(submit, capsys)["reused"]
    assert len(list(slurm.iterdir())) == 4


def test_the_printed_script_is_what_would_be_submitted(
    tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = corpus(tmp_path, parts=3)
    out = tmp_path / "it's out"
    argv = ["data", "heuristics", str(records), "--no-detect-secrets", "--out", str(out)]
    argv += [
        "--engine=slurm",
        "--workers=2",
        "--slurm-option=--partition=cpu only",
        "--max-reject=1",
    ]
    assert main(argv) in (0, 1)
    script = capsys.readouterr().out
    assert "--array=0-1" in script
    assert shlex.quote("--partition=cpu only") in script
    assert not list(slurm.iterdir())  # nothing is submitted unasked
    subprocess.run(["bash", "-c", script], check=True, timeout=120)
    logs = "\n".join(path.read_text() for path in (tmp_path / "it's out.slurm").iterdir())
    assert "slice 0/2" in logs
    assert "slice 1/2" in logs
    assert len(list(slurm.iterdir())) == 2


def test_words_that_say_where_to_run_are_not_passed_on() -> None:
    argv = ["dedup", "a", "--engine", "slurm", "--out=b", "--workers=3", "--submit", "--near", ".9"]
    argv += ["--slurm-option=--mem=1", "--slurm-option", "x", "--json", "--wait"]
    options, as_json = parse(STAGES["dedup"], argv)
    assert as_json
    assert argv_of(changed(options, **HERE)) == ["a", "--near", "0.9", "--out", "b"]


# ---- Ray ----------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Any]:
    """A Ray cluster of two nodes, each a raylet and workers of its own."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'megaphi[ray]'")
    environment = {
        "RAY_health_check_period_ms": "300",
        "RAY_health_check_timeout_ms": "300",
        "RAY_health_check_failure_threshold": "3",
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_MEMORY_MONITOR": "1",
        "PYTHONPATH": f"{os.getcwd()}:{os.environ.get('PYTHONPATH', '')}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        import ray
        from ray.cluster_utils import Cluster

        started = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20},
        )
        lost = started.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        started.lost = lost  # type: ignore[attr-defined]
        try:
            yield started
        finally:
            ray.shutdown()
            started.shutdown()


def test_a_ray_node_killed_in_the_middle_changes_nothing(tmp_path: Path, cluster: Any) -> None:
    from data_pipeline.runner.ray_executor import RayExecutor

    nodes = tmp_path / "nodes"
    stage, work = executor_shards.stage(16, nodes)
    whole, _ = run_stage(stage, work, tmp_path / "local", Options(executor=LocalExecutor(2)))
    for path in nodes.iterdir():
        path.unlink()
    executor = RayExecutor(cluster.address)
    assert executor.workers == 2
    raylet = cluster.lost.all_processes["raylet"][0].process.pid

    def kill() -> None:
        # once the node is in the middle of a shard, and some are done
        deadline = time.monotonic() + 60
        workers: set[int] = set()
        while time.monotonic() < deadline:
            done = {int(path.name) for path in (tmp_path / "ray.partial/shards").glob("?????")}
            begun = [path.name.split("-") for path in nodes.glob(f"{raylet}-*")]
            workers = {int(worker) for _, _, worker in begun}
            if len(done) > 2 and any(int(number) not in done for _, number, _ in begun):
                break
            time.sleep(0.01)
        for process in (raylet, *workers):
            os.kill(process, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    made, reused = run_stage(stage, work, tmp_path / "ray", Options(executor=executor))
    thread.join()
    tried = [int(path.name.split("-")[1]) for path in nodes.iterdir()]
    assert not reused
    assert made.run["engine"] == "ray"
    assert made.records_sha256 == whole.records_sha256
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")
    assert read_manifest(tmp_path / "ray").key == whole.key
    assert len(set(tried)) == 16 < len(tried), "no shard of the killed node was run again"
    # an error of a shard keeps its kind and its one line
    broken, one = executor_shards.stage(3, None, fails=True)
    with pytest.raises(RunError, match=r"^shard 1 is broken$"):
        run_stage(broken, one, tmp_path / "broken", Options(executor=executor))


def test_without_ray_one_line_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "a.py").write_text("x = 1\n")
    argv = ["data", "ingest", str(tmp_path), "--out", str(tmp_path / "o"), "--engine", "ray"]
    assert main(argv) == 2
    assert "pip install 'megaphi[ray]'" in capsys.readouterr().err
