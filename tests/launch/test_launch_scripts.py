"""The launch scripts with real processes on the CPU: statuses, signals, and Slurm by stand-ins."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaphi.formats.manifest import find_checkpoints
from megaphi.recipe_file import load_recipe
from tests.helpers import (
    REPOSITORY,
    child_environment,
    curve,
    metrics,
    toy_options,
    write_byte_tokenizer,
)
from tests.isolation import needs_sandbox
from tests.layouts import run_training

LAUNCH = REPOSITORY / "launch"
STEPS = 40
pytestmark = pytest.mark.skipif(shutil.which("setsid") is None, reason="util-linux is needed")

# One process a node, as srun starts them: forwards signals, returns the highest status.
FAKE_SRUN = """#!/usr/bin/env bash
while [ "${1#--}" != "$1" ]; do shift; done
nodes=()
trap 'kill -USR1 "${nodes[@]}"' USR1
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
    SLURM_NODEID=$node "$@" &
    nodes+=($!)
done
highest=0
for node in "${nodes[@]}"; do
    while kill -0 "$node" 2>/dev/null; do wait "$node"; done
    wait "$node"
    status=$?
    [ "$status" -le "$highest" ] || highest=$status
done
exit "$highest"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
case "$1" in
    show) echo 127.0.0.1; echo 127.0.0.1 ;;
    requeue) echo "requeue $2" >>"$REQUEUES" ;;
esac
"""
FAKE_SQUEUE = """#!/usr/bin/env bash
echo "${JOB_STATE:-RUNNING}"
"""


def options_of(toy_tokens: Path, run_dir: Path, **overrides: object) -> list[str]:
    """A run that is saved only at its end or when it is stopped."""
    return toy_options(
        toy_tokens, run_dir, train__steps=STEPS, checkpoint__interval=STEPS, **overrides
    )


@pytest.fixture(scope="module")
def straight(toy_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run of two processes that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    done = run_training(options_of(toy_tokens, run_dir), 2)
    assert done.returncode == 0, done.stderr
    return run_dir


def start(command: list[str], tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a script as a cluster would: its own session, temporary files of its own."""
    temporary = tmp_path / "tmp"
    temporary.mkdir(exist_ok=True)
    own = {"PYTHON": sys.executable, "TMPDIR": str(temporary), "PREFLIGHT": "0", **environment}
    return subprocess.Popen(
        ["bash", *command],
        env={**child_environment(), **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_steps(process: subprocess.Popen[str], run_dir: Path, number: int) -> None:
    """Wait until the run has reported so many steps."""
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < number:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def trainers(run_dir: Path) -> list[int]:
    """Process numbers of the ranks that train into a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if words[1:3] == ["-m", "megaphi.train"] and f"--train.run_dir={run_dir}" in words:
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("name", sorted(path.name for path in LAUNCH.glob("*.s*")))
def test_scripts_parse(name: str) -> None:
    done = subprocess.run(
        ["bash", "-n", LAUNCH / name], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "command", [["train_node.sh"], ["finetune_node.sh", "no-such-base", "recipe.yaml"],
                ["finetune_node.sh", ".", "--train.steps=1"], ["train_slurm.sbatch"]],
)  # fmt: skip
def test_a_wrong_call_exits_2(command: list[str], tmp_path: Path) -> None:
    process = start([str(LAUNCH / command[0]), *command[1:]], tmp_path)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output + errors


def test_node_stops_with_75_and_goes_on(straight: Path, toy_tokens: Path, tmp_path: Path) -> None:
    """SIGTERM reaches the ranks, torchrun's status does not hide theirs, nothing is left behind."""
    run_dir = tmp_path / "run"
    command = [str(LAUNCH / "train_node.sh"), *options_of(toy_tokens, run_dir)]
    process = start(command, tmp_path, GPUS="2", PREFLIGHT="1")
    wait_for_steps(process, run_dir, 2)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "preflight: ready" in output
    saved = int(find_checkpoints(run_dir)[0].name.removeprefix("step-"))
    assert saved < STEPS
    assert trainers(run_dir) == []
    assert list((tmp_path / "tmp").glob("megaphi-node.*")) == []

    process = start(command, tmp_path, GPUS="2")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"step-{saved:08d}" in output
    assert curve(run_dir) == curve(straight)


@needs_sandbox
def test_checkpoints_are_scored_beside_the_training(toy_tokens: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "toy"
    for suffix in (".bin", ".idx"):
        shutil.copyfile(f"{toy_tokens}{suffix}", f"{prefix}{suffix}")
    write_byte_tokenizer(tmp_path / "toy.tokenizer")
    suite = tmp_path / "short.jsonl"
    test = "def check(candidate):\n    assert candidate() == 1\n"
    problem = {"task_id": "toy/1", "prompt": "def f():", "entry_point": "f", "test": test}
    suite.write_text(json.dumps(problem) + "\n")

    run_dir = tmp_path / "run"
    options = toy_options(prefix, run_dir, train__steps=4, checkpoint__interval=2)
    process = start(
        [str(LAUNCH / "train_node.sh"), *options], tmp_path, GPUS="1", EVALUATE=str(suite)
    )
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    rows = (run_dir / "evaluations" / "short" / "scores.jsonl").read_text().splitlines()
    scores = [json.loads(row) for row in rows]
    # the first may be gone before it can be scored; the last always is
    assert scores[-1]["tokens"] == 4 * 8 * 32
    assert (run_dir / "evaluations" / "short" / "step-00000004" / "results.jsonl").exists()


def test_the_trainers_status_2_is_the_nodes(tmp_path: Path) -> None:
    process = start([str(LAUNCH / "train_node.sh"), "--train.stepz=3"], tmp_path, GPUS="1")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count("nearest known key is train.steps") == 1  # no restart


def test_a_killed_rank_is_a_failed_run(toy_tokens: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [str(LAUNCH / "train_node.sh"), *options_of(toy_tokens, run_dir)]
    process = start(command, tmp_path, GPUS="1", RESTARTS="0")
    wait_for_steps(process, run_dir, 1)
    (rank,) = trainers(run_dir)
    os.kill(rank, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "was killed by signal 9" in errors
    assert "not started again after status 1: RESTARTS=0" in errors


def test_finetuning_starts_from_the_base(straight: Path, toy_tokens: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(load_recipe(toy_options(toy_tokens, run_dir, train__steps=1)).to_yaml())
    command = [str(LAUNCH / "finetune_node.sh"), str(straight), str(recipe), "--train.seed=5"]
    process = start(command, tmp_path, GPUS="1")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"new run from the weights of {find_checkpoints(straight)[0]}" in output
    assert "seed: 5" in (run_dir / "config.yaml").read_text()


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Environment of a batch script of job 4242, with stand-ins for Slurm's commands."""
    commands = tmp_path / "bin"
    commands.mkdir()
    stubs = {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL, "squeue": FAKE_SQUEUE}
    for name, text in stubs.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "REQUEUES": str(tmp_path / "requeues"),
        "GPUS": "1",
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_JOB_ID": str(20000 + os.getpid() % 10000),  # its port is this test's own
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "127.0.0.[1,1]",
        "SLURM_CPUS_ON_NODE": "1",
    }


def test_slurm_saves_requeues_and_ends(
    straight: Path, toy_tokens: Path, tmp_path: Path, slurm: dict[str, str]
) -> None:
    run_dir, requeues = tmp_path / "run", tmp_path / "requeues"
    command = [str(LAUNCH / "train_slurm.sbatch"), *options_of(toy_tokens, run_dir)]
    process = start(command, tmp_path, **slurm)
    wait_for_steps(process, run_dir, 2)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert requeues.read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    assert find_checkpoints(run_dir)[0].name < f"step-{STEPS:08d}"

    process = start(command, tmp_path, **slurm, SLURM_RESTART_COUNT="1")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert requeues.read_text().count("requeue") == 1
    assert curve(run_dir) == curve(straight)


@pytest.mark.parametrize(
    ("status", "job_state", "requeued"),
    [
        (75, "RUNNING", True),
        (75, "COMPLETING", False),
        (1, "RUNNING", False),
        (0, "RUNNING", False),
    ],
)
def test_slurm_requeues_a_running_job_that_saved(
    status: int, job_state: str, requeued: bool, tmp_path: Path, slurm: dict[str, str]
) -> None:
    """Not a failed job, and not one that its user cancels; the nodes are stand-ins here."""
    (tmp_path / "launch").mkdir()
    node = f'echo "$NODE $NODES $RENDEZVOUS $PORT $@" >>{tmp_path}/nodes; exit {status}\n'
    (tmp_path / "launch/train_node.sh").write_text(node)
    command = [str(LAUNCH / "train_slurm.sbatch"), "recipe.yaml", "--train.steps=3"]
    environment = {**slurm, "MEGAPHI_ROOT": str(tmp_path), "JOB_STATE": job_state}
    process = start(command, tmp_path, **environment)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert (tmp_path / "requeues").exists() == requeued
    port = 10000 + int(slurm["SLURM_JOB_ID"]) % 10000 * 2
    assert sorted((tmp_path / "nodes").read_text().splitlines()) == [
        f"{number} 2 127.0.0.1 {port} recipe.yaml --train.steps=3" for number in (0, 1)
    ]
