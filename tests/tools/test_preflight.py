"""The preflight: what it reads, how it judges, and that it finds faults that were planted."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megaphi.config import Precision
from megaphi.recipe_file import load_recipe
from tests.helpers import REPOSITORY, child_environment, toy_options
from tools.cli import main
from tools.machine.preflight import (
    check_devices,
    check_health,
    check_same,
    clock_skew,
    render,
    slow_ones,
)
from tools.machine.preflight_measures import checkpoint_bytes, parse_smi

# in the form of `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`
SMI = """\
GPU-1a2b3c4d-0000-1111-2222-333344445555, 550.54.15, 0x0000000000000000, 0
GPU-9f8e7d6c-0000-1111-2222-333344445555, 550.54.15, 0x0000000000000068, 3
GPU-00000000-0000-1111-2222-333344445555, 550.54.15, 0x0000000000000004, [N/A]
"""


def test_nvidia_smi_is_read() -> None:
    found = parse_smi(SMI)
    first, second, third = found.values()
    assert next(iter(found)) == "1a2b3c4d-0000-1111-2222-333344445555"
    assert first == {"driver": "550.54.15", "slowdowns": [], "ecc_errors": 0}
    assert second["slowdowns"] == [
        "hardware slowdown", "software thermal slowdown", "hardware thermal slowdown",
    ]  # fmt: skip
    assert second["ecc_errors"] == 3
    # the power cap is usual under load, and some GPUs have no ECC
    assert third == {"driver": "550.54.15", "slowdowns": [], "ecc_errors": None}
    assert parse_smi("No devices were found\n") == {}


def test_slow_is_a_tenth_below_the_median() -> None:
    assert slow_ones([100, 101, 99, 91, 89, 102, 100, 100]) == [4]
    assert slow_ones([100.0]) == []
    # a mean would be drawn down by the slow ones and hide the milder of them
    assert slow_ones([10, 100, 100, 85, 100]) == [0, 3]


def test_disk_of_phi_1s_checkpoints() -> None:
    """1,418,270,720 parameters, as the published phi-1 has; the recipe keeps 2 and 1 permanent."""
    recipe = load_recipe([str(REPOSITORY / "launch/recipes/phi-1-base.yaml")])
    one = 1_418_270_720 * 12
    assert checkpoint_bytes(recipe, 0) == pytest.approx((2 + 1 + 1) * one * 1.1)
    assert checkpoint_bytes(recipe, 2) == pytest.approx(2 * one * 1.1)
    assert checkpoint_bytes(recipe, 9) == pytest.approx(one * 1.1)


def process(rank: int, **facts: Any) -> dict[str, Any]:
    """Facts of a healthy process on a node with two A100s."""
    return {
        "rank": rank,
        "host": f"node{rank // 2}",
        "local_rank": rank % 2,
        "processes_on_node": 2,
        "gpus": 2,
        "torch": "2.13.0",
        "device": "NVIDIA A100-SXM4-80GB",
        "capability": [8, 0],
        "driver": "550.54.15",
        "memory_in_use_gib": 0.5,
        "slowdowns": [],
        "ecc_errors": 0,
        "sums_right": True,
        **facts,
    }


def test_each_fault_is_named_with_its_place() -> None:
    healthy = [process(rank) for rank in range(4)]
    assert check_same(healthy, "torch", "torch version") == []
    assert check_devices(healthy, Precision()) == []
    assert check_health(healthy) == []

    (line,) = check_same([*healthy[:3], process(3, torch="2.12.0")], "torch", "torch version")
    assert "rank 3 (node1, NVIDIA A100-SXM4-80GB 1): torch version 2.12.0, most have 2.13.0" in line
    bad = {
        "driver 535.1": {"driver": "535.1"},
        "20.0 GiB": {"memory_in_use_gib": 20.0},
        "hardware power brake": {"slowdowns": ["hardware power brake"]},
        "2 uncorrected": {"ecc_errors": 2},
        "wrong sum": {"sums_right": False},
    }
    for words, fact in bad.items():
        (line,) = check_health([*healthy[:2], process(2, **fact), healthy[3]])
        assert "rank 2 (node1" in line
        assert words in line


def test_devices_must_fit_processes_and_precision() -> None:
    (line,) = check_devices([process(0, gpus=1), process(1, gpus=1)], None)
    assert "node0: 1 GPU(s) for 2 processes" in line
    lines = check_devices([process(0), process(1)], Precision(dtype="fp8"))
    assert len(lines) == 2
    assert "precision.dtype=fp8 needs compute capability 8.9, this is 8.0" in lines[0]
    alone = process(0, processes_on_node=1)
    assert check_devices([alone], Precision(dtype="bf16")) == []


def test_clocks_are_compared_between_hosts_only() -> None:
    assert clock_skew([("a", 100.0), ("a", 100.5), ("b", 107.0)]) == 7.0
    assert clock_skew([("a", 100.0), ("a", 107.0)]) == 0.0


def test_one_process_alone(
    toy_tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main(["preflight", *toy_options(toy_tokens, run_dir), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["failures"] == []
    (facts,) = report["processes"]
    assert facts["tflops"] > 0
    assert facts["copy_gb_s"] > 0
    assert facts["sums_right"] is True
    assert facts["all_reduce_gb_s"] is None
    assert list(run_dir.iterdir()) == []
    assert "preflight: ready" in render(report)


def test_wrong_calls_exit_2_and_bad_storage_exits_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preflight", "--train.stepz=3"]) == 2
    assert main(["preflight", str(tmp_path / "none.yaml")]) == 2
    file = tmp_path / "file"
    file.touch()
    assert main(["preflight", "--out-dir", str(file)]) == 1
    assert f"{file} does not take a run's files" in capsys.readouterr().out


PLANTED = """
import json, os, sys
from pathlib import Path
from megaphi.recipe_file import load_recipe
from tools.machine.preflight import examine, joined

base, rank = Path(sys.argv[1]), os.environ["RANK"]
recipe = load_recipe(sys.argv[2:])
with joined():
    shared = examine(recipe, base / "shared", free_bytes=10**9 if rank == "0" else 10**3)
    apart = examine(None, base / rank, visible_within=0.5)
(base / f"report-{rank}.json").write_text(json.dumps([shared, apart]))
"""


def test_planted_faults_are_found_by_every_process(toy_tokens: Path, tmp_path: Path) -> None:
    """Two processes: a full disk on one of them, then directories that are not shared."""
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    options = toy_options(toy_tokens, tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), str(tmp_path), *options],
        env=child_environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reports = [json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in (0, 1)]
    assert reports[0] == reports[1]  # the verdict is one, whoever asks
    shared, apart = reports[0]
    (line,) = shared["failures"]
    assert line.startswith("rank 1 (")
    assert "checkpoints need" in line
    assert all(facts["sums_right"] for facts in shared["processes"])
    assert all(facts["all_reduce_gb_s"] > 0 for facts in shared["processes"])
    assert list((tmp_path / "shared").iterdir()) == []
    assert [line.split(" (")[0] for line in apart["failures"]] == ["rank 0", "rank 1"]
    assert f"rank(s) 1 in {tmp_path / '0'}" in apart["failures"][0]
    assert f"rank(s) 0 in {tmp_path}" in apart["failures"][1]
    assert "failed" in render(apart)
