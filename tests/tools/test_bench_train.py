"""`megaphi bench train`: the pure parts by hand, and tiny runs; no time is asserted."""

import itertools
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaphi.config import Data, Recipe, Train
from megaphi.data.indexed import IndexedDataset
from tests.helpers import REPOSITORY
from tools.bench.command import build_parser
from tools.bench.train.command import (
    Configuration,
    compare,
    configurations_of,
    failures,
    rates,
    reason,
    run_worker,
    table,
    write_language,
)
from tools.bench.train.profile import (
    CATEGORIES,
    Event,
    busy_time,
    category,
    device_events,
    host_events,
    split,
)
from tools.cli import main

# names as profilers show them on an H100, H200 or A100
KERNELS = {
    "GEMM": [
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1",
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
        "triton_tem_fused_mm_3",
        "aten::addmm",
        "aten::mm",
    ],
    "attention": [
        "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>",
        "void flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<64, 128>>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_128x64x64_4x1x1",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90>>",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)",
    ],
    "elementwise+norm": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16>",
        "triton_red_fused_native_layer_norm_native_layer_norm_backward_12",
        "triton_poi_fused__to_copy_add_gelu_mul_4",
        "cross_entropy_kernel",
        "bias_gelu_backward_kernel",
        "rotary_packed_kernel",
    ],
    "optimizer": [
        "adamw_kernel",
        "sum_of_squares_kernel",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>",
        "void at::native::multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor<float>>",
    ],
    "copies+cast": [
        "Memcpy DtoD (Device -> Device)",
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        "void at::native::elementwise_kernel<128, 4, bfloat16_copy_kernel_cuda>",
        "void at::native::multi_tensor_apply_kernel<TensorListMetadata<2>, CopyFunctor<float>>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
        "void at::native::CatArrayBatchedCopy<c10::BFloat16, unsigned int, 5, 128, 1>",
        "cast_kernel",
        "scale_kernel",
        "triton_poi_fused__to_copy_7",
        "triton_poi_fused_clone_transpose_2",
    ],
    "communication": [
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL",
    ],
}


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in KERNELS.items() for n in names])
def test_kind_of_a_kernel(kind: str, name: str) -> None:
    assert category(name) == kind


def test_overlapping_events_are_busy_once() -> None:
    events = [Event("a", 0, 10), Event("b", 5, 10), Event("c", 6, 1), Event("d", 20, 5)]
    assert busy_time(events) == 20
    assert busy_time([]) == 0


def test_split_of_two_steps() -> None:
    events = [
        Event("nvjet_tst_128x256", 0, 6000),
        Event("flash_fwd_kernel", 6000, 2000),
        Event("nvjet_tst_128x256", 9000, 4000),
        Event("adamw_kernel", 13000, 1000),
    ]
    found = split(events, 14000, steps=2)
    expected = {"GEMM": 5.0, "attention": 1.0, "optimizer": 0.5, "idle": 0.5}
    assert found["ms"] == {kind: expected.get(kind, 0.0) for kind in CATEGORIES}
    assert found["top"][0] == {
        "name": "nvjet_tst_128x256",
        "category": "GEMM",
        "ms": 5.0,
        "calls": 1.0,
    }


def test_only_the_work_of_a_trace_counts() -> None:
    def entry(cat: str, name: str, ts: float, dur: float, tid: int = 1) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid}

    trace = {
        "traceEvents": [
            entry("kernel", "gemm", 5, 2),
            entry("gpu_user_annotation", "FSDP::all_gather", 0, 100),
            entry("gpu_memcpy", "Memcpy DtoH", 8, 1),
            entry("cpu_op", "aten::linear", 0, 10),
            entry("cpu_op", "aten::addmm", 2, 6),
            entry("cpu_op", "aten::copy_", 3, 1),
            entry("cpu_op", "aten::add", 10, 4),
            entry("cpu_op", "aten::mul", 1, 3, tid=2),
            {"ph": "i", "cat": "kernel", "name": "marker", "ts": 1},
        ]
    }
    assert device_events(trace) == [Event("gemm", 5, 2), Event("Memcpy DtoH", 8, 1)]
    own = {event.name: event.duration for event in host_events(trace)}
    expected = {"linear": 4, "addmm": 5, "copy_": 1, "add": 4, "mul": 3}
    assert own == {f"aten::{name}": duration for name, duration in expected.items()}


def options(*words: str) -> Any:
    return build_parser().parse_args(["train", "--out", "x", *words])


def test_configurations_are_a_product_and_peers_come_last() -> None:
    chosen = ["--precisions", "bf16,fp8", "--dropout", "0,0.1", "--compile", "off,on"]
    found = configurations_of(options(*chosen, "--peer", "transformers"), cuda=True)
    assert len(found) == 2 * 2 * 2 * 2 + 2
    assert found[0] == Configuration(micro_batch=8, dropout=0, precision="bf16", kernels="triton")
    assert [c.label for c in found[:4]] == [
        "bf16, triton",
        "bf16, triton, compile",
        "bf16, torch",
        "bf16, torch, compile",
    ]
    assert [c.peer for c in found[-3:]] == [None, "transformers", "transformers"]
    assert [c.precision for c in found[-2:]] == ["bf16", "bf16"]
    (only,) = configurations_of(options("--attention", "plain"), cuda=False)
    assert (only.label, only.micro_batch) == ("fp32, torch, plain", 2)
    for word, value in (("--peer", "nanochat"), ("--compile", "maybe")):
        with pytest.raises(ValueError, match=f"{word} {value}"):
            configurations_of(options(word, value), cuda=True)


def test_language_can_be_learned(tmp_path: Path) -> None:
    write_language(tmp_path / "a", 300, 60_000, seed=3)
    write_language(tmp_path / "b", 300, 60_000, seed=3)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    data = IndexedDataset(tmp_path / "a")
    assert sum(len(data[i]) for i in range(len(data))) >= 60_000
    pairs: dict[int, dict[int, int]] = {}
    for document in (data[i].astype(np.int64) for i in range(len(data))):
        assert 0 <= document.min() <= document.max() < 300
        for token, following in itertools.pairwise(document):
            count = pairs.setdefault(int(token), {})
            count[int(following)] = count.get(int(following), 0) + 1
    assert max(map(len, pairs.values())) <= 4
    # entropy of the next token given this one, in nats, against ln 300 = 5.7 of a guess
    total = sum(sum(count.values()) for count in pairs.values())
    bits = sum(
        -n * math.log(n / sum(count.values())) for count in pairs.values() for n in count.values()
    )
    assert 0.5 < bits / total < 1.1


def test_rates_by_hand() -> None:
    recipe = Recipe(
        train=Train(run_dir="r", steps=4, micro_batch_size=8, global_batch_size=8),
        data=Data(train="t"),
    )
    result = {
        "losses": [4.0, 3.0],
        "wall_seconds": 0.5,
        "step_seconds": [0.2, 0.26],
        "device": "NVIDIA H200",
    }
    found = rates(recipe, result)
    assert found["tokens_per_second"] == 2 * 8 * 2048 / 0.5
    assert found["step_ms"] == pytest.approx(230)
    # 9.085 and 8.481 GFLOP a token (6 N + 12 L d s), 989.4 TFLOP/s
    assert found["mfu"] == pytest.approx(65536 * 9.0848e9 / 989.4e12, rel=1e-3)
    assert found["mfu_causal"] == pytest.approx(65536 * 8.4809e9 / 989.4e12, rel=1e-3)
    assert found["final_loss"] == 3.0
    assert rates(recipe, result | {"device": "Unknown"})["mfu"] is None


def row(
    name: str, rate: float | None, dropout: float = 0.0, peer: str | None = None, **more: Any
) -> dict[str, Any]:
    chosen = {"micro_batch": 8, "dropout": dropout, "peer": peer}
    base: dict[str, Any] = {"name": name, "configuration": chosen}
    if rate is None:
        return base | {"problem": "out of memory"}
    numbers = {"tokens_per_second": rate, "step_ms": 1e6 / rate, "mfu": 0.5, "mfu_causal": None}
    numbers |= {"peak_memory_gib": 61.25, "warmup_seconds": 2.0, "final_loss": 2.5}
    return base | numbers | {"losses": [4.0, 3.5, 3.0, 2.5], "warmup_losses": []} | more


def report_of(rows: list[dict[str, Any]], curve: bool = False) -> dict[str, Any]:
    compare(rows)
    settings = {"layers": 24, "hidden_size": 2048, "sequence_length": 2048, "accumulate": 1}
    settings |= {"steps": 4, "warmup_steps": 1, "curve": curve}
    return {"settings": settings, "rows": rows, "failed": failures(rows)}


def test_ratios_and_table() -> None:
    rows = [
        row("bf16, triton", 60_000.0),
        row("fp8, triton", 75_000.0, final_loss=2.625),
        row("bf16, torch", None),
        row("transformers, torch.compile", 50_000.0, peer="transformers"),
        row("bf16, triton", 55_000.0, dropout=0.1),
    ]
    report = report_of(rows)
    assert rows[1]["over_base"] == 1.25
    assert rows[1]["over_peer"] == 1.5
    assert rows[1]["loss_difference"] == 0.125
    assert rows[4]["over_base"] == 1.0
    assert "over_peer" not in rows[4]
    assert "over_peer" not in rows[3]
    assert report["failed"] == []
    text = table(report)
    (line,) = [line for line in text if line.startswith("fp8, triton")]
    expected = ["fp8,", "triton", "8", "0", "75,000", "13.3", "50.0%", "n/a", "61.2", "2.500"]
    assert line.split() == [*expected, "2.0", "1.25", "1.50"]
    (line,) = [line for line in text if line.startswith("bf16, torch")]
    assert line.endswith("out of memory")
    (line,) = [t for t in table(report_of(rows, curve=True)) if t.startswith("fp8, triton")]
    values = ["4.0000", "3.5000", "3.0000", "2.6250", "+0.1250", "75,000"]
    assert line.split() == ["fp8,", "triton", "8", "0", *values]


def test_what_counts_as_a_failure() -> None:
    broken = row("bf16", 1.0, problem="a loss is not finite", nonfinite=True)
    assert failures([row("a", 1.0), broken]) == ["bf16: a loss is not finite"]
    assert failures([row("a", None)]) == ["nothing was measured; a: out of memory"]
    assert failures([row("a", 1.0), row("b", None)]) == []
    crashed = row("b", None) | {"crashed": True}
    assert failures([row("a", 1.0), crashed]) == ["b: out of memory"]
    theirs = row("c", None, peer="transformers") | {"crashed": True}
    assert failures([row("a", 1.0), theirs]) == []


def test_reason_of_a_process() -> None:
    raised = ["Traceback", "  File x", "[rank0]: ValueError: no fp8 here", "  note"]
    assert reason(raised, 1) == "failed: ValueError: no fp8 here"
    assert reason(["torch.OutOfMemoryError: CUDA out of memory. Tried", "z"], 1) == "out of memory"
    assert reason(["anything"], -9) == "killed by SIGKILL"


def test_a_configuration_that_fails_is_a_row(tmp_path: Path) -> None:
    chosen = Configuration(micro_batch=2, dropout=0.0, precision="fp32")
    request = {"options": ["--train.stepz=3"], "peer": None}
    found = run_worker(request, chosen, tmp_path, 120)
    assert found["problem"].startswith("failed: ValueError: unknown key train.stepz")
    assert found["stderr"]
    assert found["crashed"] is False
    found = run_worker({"peer": None}, chosen, tmp_path, 120)
    assert (found["problem"], found["crashed"]) == ("failed: KeyError: 'options'", True)
    assert run_worker(request, chosen, tmp_path, 1.0) == {"problem": "no time left"}


@pytest.mark.slow
def test_bench_train(tmp_path: Path, capsys) -> None:
    sizes = ["--steps", "2", "--warmup-steps", "1", "--profile-steps", "1", "--work", str(tmp_path)]
    words = ["bench", "train", "--out", str(tmp_path / "out"), "--json", *sizes]
    assert main([*words, "--kernels", "torch,triton", "--peer", "transformers-eager"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "out" / "train.json").read_text())
    ours, triton, theirs = report["rows"]
    for measured in (ours, theirs):
        assert len(measured["step_seconds"]) == 2
        losses = [*measured["warmup_losses"], *measured["losses"]]
        # the first is that of guessing among 512 ids, and all batches are the same for both
        assert losses[0] == pytest.approx(math.log(512), abs=0.1)
        assert measured["profile"]["of"] == "CPU operators"
        assert measured["profile"]["ms"]["GEMM"] > 0
        seconds = measured["wall_seconds"]
        assert measured["tokens_per_second"] == pytest.approx(2 * 2 * 32 / seconds)
    rate = theirs["tokens_per_second"]
    assert ours["over_peer"] == pytest.approx(ours["tokens_per_second"] / rate)
    assert triton["problem"] == "needs a GPU"
    assert ours["formats"].startswith("fp32")
    assert report["recipe"]["model"]["num_layers"] == 2
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names - {"train.png"} == {"train.json", "train.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing is left behind


@pytest.mark.slow
def test_curve(tmp_path: Path, capsys) -> None:
    words = ["bench", "train", "--out", str(tmp_path), "--result-name", "curve", "--curve", "25"]
    assert main([*words, "--precisions", "fp32,bf16", "--set", "train.seed=7"]) == 0
    report = json.loads((tmp_path / "curve.json").read_text())
    exact, rounded = report["rows"]
    assert report["recipe"]["train"]["seed"] == 7
    assert len(exact["losses"]) == len(rounded["losses"]) == 25
    assert exact["final_loss"] < exact["losses"][0] - 1.0
    assert exact["loss_difference"] == 0
    assert 0 < abs(rounded["loss_difference"]) < 0.1
    assert "difference" in capsys.readouterr().out


def test_the_node_script_asks_for_a_place() -> None:
    script = REPOSITORY / "launch" / "benchmark_node.sh"
    for words in ([], ["--dry-run"]):
        done = subprocess.run(["bash", str(script), *words], capture_output=True, check=False)
        assert done.returncode == 2
        assert b"usage: bash launch/benchmark_node.sh OUT" in done.stderr
