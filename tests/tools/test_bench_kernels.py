"""`megaphi bench kernels`: counts by hand, what fails, a tiny run; no time is asserted."""

import dataclasses
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tools.bench.plot
from tools.bench.kernels.cases import CASES, Case, Inputs, Sizes, full_sizes, small_sizes
from tools.bench.kernels.command import (
    changed,
    floors_ms,
    measure_case,
    operations_with_kernel,
    operations_without_case,
    results,
)
from tools.bench.kernels.table import table, verdict
from tools.bench.kernels.timing import summarize
from tools.bench.kernels.variants import VARIANTS
from tools.cli import main

CPU = torch.device("cpu")
BY_NAME = {case.name: case for case in CASES}
PHI_1 = Sizes()
CEILINGS = {"copy_gbps": 4000.0, "matmul_tflops": 800.0}


def test_counts_at_the_shapes_of_phi_1() -> None:
    """16,384 tokens of width 2,048, inner width 8,192, 51,200 ids; 2 bytes an element."""
    token = 2048 * 2
    expected = {
        "layer_norm": (2 * 16384 * token + 2 * token, 3 * 16384 * token + 3 * token),
        "block end": (5 * 16384 * token + 4 * token, 4 * 16384 * token + 5 * token),
        "block end, dropout 0.1": (5 * 16384 * token + 4 * token, 6 * 16384 * token + 5 * token),
        "bias_dropout_add": (3 * 16384 * token + 2 * token,) * 2,
        # 4,096 rows of half the ids: read; read and written
        "vocabulary_statistics": (4096 * (51200 + 20), None),
        "vocabulary_gradient_": (4096 * (2 * 51200 + 16), None),
        # 32 heads, q and k, 32 of 64 elements: half a token vector each way, and the tables
        "rotary_packed": (2 * 16384 * token + 262_144, 2 * 16384 * token + 262_144),
        "bias_gelu": (2 * 268_435_456 + 16_384, 3 * 268_435_456 + 2 * 16_384),
        "fp8_cast_transpose": (16384 * 8192 * 4, None),
        "sum_of_squares": (4 * 1_418_270_720, None),
        "adamw_step_": (28 * 1_418_270_720, None),
    }
    for name, (forward, backward) in expected.items():
        case = BY_NAME[name]
        assert case.forward_bytes(PHI_1, 2) == forward, name
        assert (case.backward_bytes and case.backward_bytes(PHI_1, 2)) == backward, name
    head = BY_NAME["linear_cross_entropy"]
    assert head.forward_flops(PHI_1) == 3_435_973_836_800
    assert head.backward_flops(PHI_1) == 2 * 3_435_973_836_800


def test_floor_is_the_larger_of_two_times() -> None:
    floors = floors_ms(BY_NAME["layer_norm"], PHI_1, torch.bfloat16, CEILINGS)
    assert floors["forward"]["ms"] == pytest.approx(134_225_920 / 4e12 * 1e3)
    assert floors["both"]["ms"] == pytest.approx((134_225_920 + 201_338_880) / 4e12 * 1e3)
    floors = floors_ms(BY_NAME["linear_cross_entropy"], PHI_1, torch.bfloat16, CEILINGS)
    assert floors["both"]["ms"] == pytest.approx(3 * 3_435_973_836_800 / 800e12 * 1e3)


def test_adamw_takes_as_many_layers_as_fit() -> None:
    assert full_sizes(16384, 140 << 30).optimizer_layers == 24
    fewer = full_sizes(16384, 40 << 30)
    assert 1 < fewer.optimizer_layers < 24
    assert fewer.parameters * 64 < 40 << 30
    assert fewer.rows == 16384


def test_every_operation_of_the_model_is_measured() -> None:
    assert {"layer_norm", "adamw_step_", "linear_cross_entropy"} <= operations_with_kernel()
    assert operations_without_case() == []


def test_summary_of_repeats() -> None:
    found = summarize([5.0, 1.0, 4.0, 2.0, 3.0, 100.0])
    assert (found["ms"], found["p20"], found["p80"]) == (3.5, 2.0, 5.0)
    assert found["repeats_ms"] == [5.0, 1.0, 4.0, 2.0, 3.0, 100.0]


def raising(error: Exception) -> Callable[[], Any]:
    def make() -> Any:
        raise error

    return make


def test_what_fails_is_a_row_with_its_reason() -> None:
    def doubled(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        return 2 * torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, epsilon)

    def unwritten(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        return x * float("nan") + weight + bias

    peers = {
        "absent": raising(ModuleNotFoundError("No module named 'absent'", name="absent")),
        "broken": raising(RuntimeError("CUDA error:\n  misaligned address")),
        "unfit": raising(ValueError("only on Hopper")),
        "wrong": lambda: doubled,
        "unwritten": lambda: unwritten,
    }
    case = dataclasses.replace(BY_NAME["layer_norm"], peers=peers)
    names = ["eager", "triton", *peers]
    group = measure_case(case, small_sizes(32), "fp32", CPU, CEILINGS, names, [])
    rows = {row["provider"]: row for row in group["rows"]}
    assert list(rows) == names
    assert rows["eager"]["error"] == 0
    assert rows["eager"]["passes"]["both"]["ms"] > 0
    problems = {name: row["problem"] for name, row in rows.items() if "problem" in row}
    assert problems["absent"] == "not installed: absent"
    assert problems["broken"] == "failed: RuntimeError: CUDA error: misaligned address"
    assert problems["unfit"] == "only on Hopper"
    assert problems["wrong"] == "wrong: relative error 1"
    assert problems["unwritten"] == "wrong: relative error nan"
    if not torch.cuda.is_available():
        assert problems["triton"] == "needs a GPU"
    assert all("passes" not in rows[name] for name in problems)
    late = measure_case(case, small_sizes(32), "fp32", CPU, CEILINGS, names, [], deadline=0.0)
    assert {row["problem"] for row in late["rows"]} == {"no time left"}


def test_a_wrong_result_of_ours_fails_the_call(monkeypatch, tmp_path: Path, capsys) -> None:
    def halved(x: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x + bias, approximate="tanh") / 2

    monkeypatch.setattr(
        "tools.bench.kernels.command.providers_of", lambda *_: {"eager": lambda: halved}
    )
    words = ["bench", "kernels", "--out", str(tmp_path), "--operations", "bias_gelu"]
    assert main(words) == 1
    assert "FAILED bias_gelu: eager: wrong: relative error 0.5" in capsys.readouterr().out
    assert (tmp_path / "kernels.json").is_file()


def timed(provider: str, ms: float, peak: float | None = None) -> dict[str, Any]:
    entry = {"ms": 9.0, "device_ms": ms}
    return {"provider": provider, "passes": {"both": entry}, "peak_mib": peak}


def test_verdict() -> None:
    rows = [timed("compile", 3.0, 4000.0), timed("triton", 2.0, 1000.0), timed("liger", 2.5)]
    text = "FASTER than compile: 1.50x; peak 1,000 MiB against 4,000; 1.25x liger"
    assert verdict(rows) == text
    rows = [timed("compile", 1.0), timed("triton", 2.0), timed("triton, 4 warps", 1.6)]
    assert verdict(rows) == "SLOWER than compile: 0.50x; best variant 4 warps: 1.25x"
    rows = [{"provider": "compile", "problem": "failed: X"}, timed("triton", 2.0)]
    assert verdict(rows) == "compile not measured: failed: X"
    rows = [timed("compile", 1.0), {"provider": "triton", "problem": "needs a GPU"}]
    assert verdict(rows) == "triton not measured: needs a GPU"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.case}: {v.label}")
def test_variants_change_what_the_kernels_read(variant) -> None:
    pytest.importorskip("triton")
    import importlib

    assert variant.case in BY_NAME
    for module_name, values in variant.settings.items():
        module = importlib.import_module(f"kernels.{module_name}")
        before = {name: getattr(module, name) for name in values}
        with changed(variant):
            assert {name: getattr(module, name) for name in values} == values
        assert {name: getattr(module, name) for name in values} == before


def head_inputs() -> tuple[Inputs, list[Tensor], Case]:
    torch.manual_seed(0)
    case = BY_NAME["linear_cross_entropy"]
    inputs = case.inputs(small_sizes(64), torch.float32, CPU)
    x, weight, bias, labels = (tensor.detach().double() for tensor in inputs.args)
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    logits = tensors[0] @ tensors[1].t() + tensors[2]
    loss = torch.nn.functional.cross_entropy(logits, labels.long(), reduction="sum")
    return inputs, [loss.detach(), *torch.autograd.grad(loss, tensors)], case


def test_liger_is_called_as_its_source_says(monkeypatch) -> None:
    """The order of arguments is that of liger-kernel 0.8.2, ops/fused_linear_cross_entropy.py."""

    class Stub:
        @staticmethod
        def apply(
            _input: Tensor,
            weight: Tensor,
            target: Tensor,
            bias: Tensor,
            ce_weight: None,
            ignore_index: int,
            lse_square_scale: float,
            label_smoothing: float,
            reduction: str,
            softcap: None,
            return_z_loss: bool,
            accum_dtype: torch.dtype,
        ) -> tuple[Tensor, None, None, None]:
            assert ce_weight is None
            assert softcap is None
            assert not return_z_loss
            assert lse_square_scale == 0
            assert accum_dtype == torch.float32
            loss = torch.nn.functional.cross_entropy(
                _input @ weight.t() + bias,
                target,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                reduction=reduction,
            )
            return loss, None, None, None

    module = types.ModuleType("liger_kernel.ops.fused_linear_cross_entropy")
    module.LigerFusedLinearCrossEntropyFunction = Stub  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    inputs, exact, case = head_inputs()
    found = results(case, case.peers["liger"](), inputs, [torch.ones(())])
    for ours, right in zip(found, exact, strict=True):
        assert float((ours - right).norm() / right.norm()) < 1e-5


def test_fused_adamw_of_torch_does_the_same_update() -> None:
    case = BY_NAME["adamw_step_"]
    names = ["eager", "torch fused AdamW"]
    group = measure_case(case, small_sizes(32), "fp32", CPU, CEILINGS, names, [])
    assert [row.get("problem") for row in group["rows"]] == [None, None]
    assert group["rows"][1]["error"] < 1e-6


@pytest.mark.slow
def test_bench_kernels(tmp_path: Path, capsys, monkeypatch) -> None:
    out = tmp_path / "new" / "out"
    chosen = ["--operations", "bias_gelu,rotary_packed", "--dtype", "fp32", "--quick"]
    assert main(["bench", "kernels", "--out", str(out), "--json", *chosen]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "kernels.json").read_text())
    assert report["settings"]["shapes"] == "small"
    assert [group["name"] for group in report["groups"]] == ["rotary_packed", "bias_gelu"]
    for group in report["groups"]:
        eager, compiled = group["rows"][:2]
        for row in (eager, compiled):
            assert row["error"] < 1e-5
            for name, entry in row["passes"].items():
                ordered = sorted(entry["repeats_ms"])
                assert ordered[0] <= entry["p20"] <= entry["ms"] <= entry["p80"] <= ordered[-1]
                decisive = entry["device_ms"] or entry["ms"]
                floor = group["floors_ms"][name]
                assert entry["gbps"] == pytest.approx(floor["bytes"] / decisive / 1e6)
    text = (out / "kernels.txt").read_text()
    assert all(line in text for line in table(report))
    assert math.isfinite(report["ceilings"]["copy_gbps"])
    if "no plot" in text:
        assert not (out / "kernels.png").exists()
    else:
        assert (out / "kernels.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(tools.bench.plot.importlib.util, "find_spec", lambda name: None)
    words = ["bench", "kernels", "--out", str(tmp_path / "b"), "--result-name", "plain"]
    assert main([*words, "--operations", "bias_gelu", "--providers", "eager"]) == 0
    assert "no plot: matplotlib is not installed" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert names == ["plain.json", "plain.txt"]


def test_wrong_calls(tmp_path: Path, capsys) -> None:
    words = ["bench", "kernels", "--out", str(tmp_path), "--quick"]
    assert main([*words, "--operations", "softmax"]) == 2
    assert "--operations softmax: must be one of adamw_step_" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--dtype", "fp12"])
