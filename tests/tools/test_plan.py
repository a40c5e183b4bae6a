"""`megaphi plan` as people and scripts call it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import megaphi.config
import tools.planning.command
from megaphi.config import Data, Recipe, Train
from tests.helpers import REPOSITORY
from tools.bench.train.command import Configuration
from tools.cli import main
from tools.planning.devices import DEVICES
from tools.planning.layout import Layout, Recompute

RECIPE = str(REPOSITORY / "launch" / "recipes" / "phi-1-base.yaml")


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", RECIPE, "--json", *words]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_phi1_on_eight_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    report = plan(capsys, "--gpu", "a100-80gb", "--gpus", "8")
    assert report["recipe"]["parameters"] == 1_418_270_720
    assert report["recipe"]["tokens"] == 36000 * 1024 * 2048
    own = report["own"]
    assert own["fits"]
    assert own["runs_today"]
    assert own["micro_batches"] == 16
    assert own["memory_kinds_gib"]["weights"] == pytest.approx(2.64, abs=0.005)
    assert own["memory_gib"] == pytest.approx(sum(own["memory_kinds_gib"].values()))
    assert own["step_seconds"] == pytest.approx(sum(own["step_kinds_seconds"].values()))
    assert own["days"] == pytest.approx(36000 * own["step_seconds"] / 86400)
    assert own["gpu_hours"] == pytest.approx(own["days"] * 24 * 8)
    assert own["tokens_per_second"] == pytest.approx(1024 * 2048 / own["step_seconds"])
    assert own["days_calibrated"] > own["days"]
    assert report["warnings"] == []
    assert report["measured"] == []


def test_best_layouts_fit_and_are_sorted(capsys: pytest.CaptureFixture[str]) -> None:
    report = plan(capsys, "--gpu", "a100-40gb", "--gpus", "16", "--top", "7")
    best = report["best"]
    assert len(best) == 7
    seconds = [row["step_seconds"] for row in best]
    assert seconds == sorted(seconds)
    assert any(row["runs_today"] for row in best)
    for row in best:
        assert row["fits"]
        assert row["memory_gib"] <= 39.4
        assert row["problems"] == []
        layout = row["layout"]
        size = layout["pipeline"] * layout["data"] * layout["context"] * layout["tensor"]
        assert size == 16
    assert seconds[0] <= report["own"]["step_seconds"]


def test_what_does_not_fit_comes_with_changes_that_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--gpu", "a100-40gb", "--gpus", "8")
    report = plan(capsys, *words, "--train.micro_batch_size=32")
    assert not report["own"]["fits"]
    [text] = report["warnings"]
    assert "needs" in text
    assert "train.micro_batch_size=" in text
    size = text.split("train.micro_batch_size=")[1].split(" ")[0]
    again = plan(capsys, *words, f"--train.micro_batch_size={size}")
    assert again["own"]["fits"]
    promised = float(text.split(f"micro_batch_size={size} (")[1].split(" GiB")[0])
    assert again["own"]["memory_gib"] == pytest.approx(promised, abs=0.06)
    # the next larger power of two would not do
    more = plan(capsys, *words, f"--train.micro_batch_size={2 * int(size)}")
    assert not more["own"]["fits"]


def test_a_layout_that_cannot_be_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    report = plan(capsys, "--gpu", "h100", "--gpus", "24")
    assert report["own"]["problems"]
    assert "memory_gib" not in report["own"]
    assert "not a multiple of 192" in report["warnings"][0]
    # 3 divides the layers only
    assert all(row["layout"]["pipeline"] % 3 == 0 for row in report["best"])


def test_what_this_version_cannot_run_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the configuration itself, whatever it accepts by now."""

    def only_tensor(**values: Any) -> None:
        if values["pipeline"] * values["context"] > 1 or values["recompute"] == "full":
            raise ValueError("not built")

    monkeypatch.setattr(megaphi.config, "Parallel", only_tensor)
    assert tools.planning.command.runs_today(Layout(tensor=2, reshard_after_forward=True))
    assert not tools.planning.command.runs_today(Layout(context=2))
    assert not tools.planning.command.runs_today(Layout(recompute=Recompute.FULL))


def test_small_models_are_bound_by_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--gpu", "h100", "--gpus", "1", "--train.micro_batch_size=1")
    assert plan(capsys, *words)["warnings"] == []
    small = ("--model.hidden_size=256", "--model.num_heads=4")
    [text] = plan(capsys, *words, *small)["warnings"]
    assert "faster than a host launches" in text


def test_a_model_that_is_too_large_for_everything(capsys: pytest.CaptureFixture[str]) -> None:
    report = plan(
        capsys,
        "--gpu",
        "a100-40gb",
        "--gpus",
        "1",
        "--model.num_layers=96",
        "--model.hidden_size=4096",
    )
    assert report["best"] == []
    assert "no single change makes it fit" in report["warnings"][0]
    assert "take more or larger GPUs" in report["warnings"][1]


def test_fp8_is_said_to_be_planned_as_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--gpus", "8", "--precision.dtype=fp8")
    assert "planned as bf16" in plan(capsys, "--gpu", "h100", *words)["warnings"][0]
    assert "needs another GPU" in plan(capsys, "--gpu", "a100-80gb", *words)["warnings"][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "v100", "--gpus", "8"], "known are a100-40gb, a100-80gb, h100, h200, b200"),
        (["--gpu", "h100", "--gpus", "0"], "--gpus must be positive"),
        (["--gpu", "h100", "--gpus", "8", "--model.num_layer=3"], "model.num_layers"),
        (["--gpu", "h100", "--gpus", "8", "--precision.dtype=fp32"], "precision.dtype=bf16"),
    ],
)
def test_wrong_calls(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["plan", RECIPE, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_missing_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "no.yaml", "--gpu", "h100", "--gpus", "8"]) == 2
    assert "no.yaml" in capsys.readouterr().err


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", RECIPE, "--gpu", "h100", "--gpus", "8", "--assumptions"]
    assert main(words) == 0
    text = capsys.readouterr().out
    for word in (
        "1,418,270,720 parameters",
        "75.5 B tokens",
        "gradients",
        "attention",
        "bubble",
        "GPU-hours",
        "not measured yet",
        "45,455",
        "MEGAPHI_KERNELS=triton",
    ):
        assert word in text
    assert max(map(len, text.splitlines())) < 220


def test_measured_runs_are_compared(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report as `megaphi bench train` writes it; rows that say nothing of us are left out."""
    recipe = Recipe(train=Train(run_dir="run", steps=10), data=Data(train="tokens"))
    chosen = dataclasses.asdict(
        Configuration(micro_batch=4, dropout=0.1, precision="bf16", kernels="triton")
    )
    row = {"name": "bf16, triton", "configuration": chosen}
    row |= {"tokens_per_second": 50000.0, "peak_memory_gib": 30.0}
    report = {
        "machine": {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]},
        "settings": {"curve": False, "accumulate": 2},
        "recipe": recipe.to_dict(),
        "rows": [
            row,
            row | {"problem": "out of memory"},
            row | {"configuration": chosen | {"peer": "transformers"}},
            row | {"configuration": chosen | {"precision": "fp8"}},
        ],
    }
    (tmp_path / "train-h100.json").write_text(json.dumps(report))
    (tmp_path / "data.json").write_text(json.dumps({"machine": {}, "groups": []}))
    monkeypatch.setattr(tools.planning.command, "BENCHMARKS", tmp_path)
    assert tools.planning.command.measured(DEVICES["a100-80gb"]) == []
    [found] = tools.planning.command.measured(DEVICES["h100"])
    assert (found["tokens_per_second"], found["peak_memory_gib"]) == (50000.0, 30.0)
    # on one GPU: weights in bf16, four fp32 numbers a parameter, 4 x 2,048 tokens of activations
    assert found["predicted_memory_gib"] > (2 + 16) * 1_418_270_720 / 2**30 + 10
    words = ["plan", RECIPE, "--gpu", "h100", "--gpus", "1", "--train.micro_batch_size=4"]
    assert main([*words, "--train.global_batch_size=8"]) == 0
    text = capsys.readouterr().out
    assert "bf16, triton, micro-batch 4, dropout 0.1): 50,000 tokens/s, predicted " in text
    assert f"predicted {found['predicted']:,.0f} (" in text
    # the recipe is the measured run itself, so that its plan must say the same
    assert f" to {found['predicted']:,.0f} tokens/s/GPU" in text


def test_devices_know_their_names() -> None:
    names = {
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA A100-SXM4-80GB": "a100-80gb",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": None,
        "NVIDIA H200": "h200",
        "NVIDIA B200": "b200",
    }
    for name, expected in names.items():
        found = [d.name for d in DEVICES.values() if all(mark in name for mark in d.marks)]
        assert found == ([] if expected is None else [expected])
