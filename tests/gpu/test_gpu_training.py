"""Training on the device: no waiting for the host, and the same losses whatever computes them."""

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megaphi.config import Recipe
from megaphi.data.loader import Loader
from megaphi.metrics.logger import RunLogger
from megaphi.model.phi import num_parameters
from megaphi.parallel.mesh import processes
from megaphi.recipe_file import load_recipe
from megaphi.training.trainer import Trainer
from tests.gpu.device import (  # noqa: F401
    DEVICE,
    DRY_RUN,
    HAS_TRITON,
    ON_GPU,
    has_fp8,
    needs_gpu,
    needs_triton,
    pytestmark,
)
from tests.helpers import metrics, toy_options

Train = Callable[[list[str]], Recipe]


def options_of(prefix: Path, run_dir: Path, **overrides: object) -> list[str]:
    """A small phi with heads of 64, or on a CPU a toy."""
    shape: dict[str, object] = {
        "model__num_layers": 4,
        "model__hidden_size": 256,
        "model__num_heads": 4,
        "model__max_sequence_length": 256,
        "data__sequence_length": 256,
        "train__micro_batch_size": 8,
        "train__global_batch_size": 16,
        "data__split": "null",
        "checkpoint__interval": 1000,
        "model__attention_dropout": 0,
        "precision__dtype": "bf16",
    }
    if DRY_RUN:
        small = {"train__micro_batch_size": 1, "train__global_batch_size": 2}
        shape = {"data__split": "null", "model__attention_dropout": 0, **small}
        shape |= {"data__sequence_length": 16, "checkpoint__interval": 1000}
    return toy_options(prefix, run_dir, **(shape | overrides))


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in metrics(run_dir) if "loss" in row]


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("compiled", ["false", "true"])
@needs_gpu
def test_a_step_never_waits_for_the_device(
    toy_tokens: Path, tmp_path: Path, monkeypatch, kernels: str, compiled: str
) -> None:
    monkeypatch.setenv("MEGAPHI_KERNELS", kernels)
    words = options_of(toy_tokens, tmp_path, compute__compile=compiled)
    done = []

    class Watched(Trainer):
        def loop(self, loader: Loader, logger: RunLogger | None) -> None:
            for _ in range(4):  # compiles, fills caches of tables, lets the allocator settle
                self.train_step(loader)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                done.extend(self.train_step(loader) for _ in range(3))
            finally:
                torch.cuda.set_sync_debug_mode("default")

    with processes() as mesh:
        Watched(load_recipe(words), mesh).run()
    assert len(done) == 3
    number = torch.ones(1, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):  # the watch does see a wait
            number.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_triton
@pytest.mark.parametrize(("dtype", "most"), [("fp32", 1e-3), ("bf16", 2e-2)])
def test_triton_kernels_train_as_the_plain_definitions(
    toy_tokens: Path, tmp_path: Path, monkeypatch, train_here: Train, dtype: str, most: float
) -> None:
    steps = 2 if DRY_RUN else 30
    for kernels in ("torch", "triton"):
        monkeypatch.setenv("MEGAPHI_KERNELS", kernels)
        extra = {"train__steps": steps, "precision__dtype": dtype}
        train_here(options_of(toy_tokens, tmp_path / kernels, **extra))
    plain, triton = losses(tmp_path / "torch"), losses(tmp_path / "triton")
    assert len(plain) == steps
    for step, (a, b) in enumerate(zip(plain, triton, strict=True), start=1):
        assert b == pytest.approx(a, abs=most), step


def test_fp8_learns_as_bf16(
    toy_tokens: Path, tmp_path: Path, monkeypatch, train_here: Train
) -> None:
    if ON_GPU and not has_fp8():
        pytest.skip("needs a GPU of compute capability 8.9 or higher")
    monkeypatch.setenv("MEGAPHI_KERNELS", "triton" if ON_GPU and HAS_TRITON else "torch")
    steps = 30 if DRY_RUN else 300
    # on a CPU fp8-auto is bf16: the body is proven, not the format
    for name, dtype in (("bf16", "bf16"), ("fp8", "fp8" if ON_GPU else "fp8-auto")):
        extra = {"train__steps": steps, "precision__dtype": dtype}
        train_here(options_of(toy_tokens, tmp_path / name, **extra))
    ends = {}
    for name in ("bf16", "fp8"):
        curve = losses(tmp_path / name)
        ends[name] = statistics.fmean(curve[-steps // 10 :])
        assert ends[name] < (0.97 if DRY_RUN else 0.7) * curve[0], name
    assert abs(ends["fp8"] - ends["bf16"]) < 0.1


@pytest.mark.parametrize("backend", ["auto", "flash4", "flash3", "flash2", "te", "cudnn", "flash"])
def test_attention_backends_agree_with_the_plain_formula(
    toy_tokens: Path, tmp_path: Path, train_here: Train, backend: str
) -> None:
    steps = 2 if DRY_RUN else 20
    try:
        extra = {"train__steps": steps, "compute__attention": backend}
        train_here(options_of(toy_tokens, tmp_path / backend, **extra))
    except ValueError as error:  # what cannot run here is refused with the reason
        assert backend != "auto"
        pytest.skip(str(error))
    plain = {"train__steps": steps, "compute__attention": "plain"}
    train_here(options_of(toy_tokens, tmp_path / "plain", **plain))
    pairs = zip(losses(tmp_path / backend), losses(tmp_path / "plain"), strict=True)
    for step, (ours, exact) in enumerate(pairs, start=1):
        assert ours == pytest.approx(exact, abs=2e-2), step


def test_a_resumed_run_is_the_same_run(
    toy_tokens: Path, tmp_path: Path, monkeypatch, train_here: Train
) -> None:
    monkeypatch.setenv("MEGAPHI_KERNELS", "triton" if ON_GPU and HAS_TRITON else "torch")
    fixed = {"schedule__decay_steps": 8, "data__planned_samples": 256}
    fixed |= {"compute__attention": "plain", "model__attention_dropout": 0.1}
    for run, stops in (("whole", [6]), ("again", [6]), ("halves", [3, 6])):
        for steps in stops:
            extra = fixed | {"train__steps": steps}
            train_here(options_of(toy_tokens, tmp_path / run, **extra))
    whole = losses(tmp_path / "whole")
    assert len(whole) == 6
    assert losses(tmp_path / "again") == whole
    assert losses(tmp_path / "halves") == whole


@needs_gpu
def test_peak_memory_of_a_step(
    toy_tokens: Path, tmp_path: Path, train_here: Train, record_property
) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    recipe = train_here(options_of(toy_tokens, tmp_path, train__steps=5, model__residual_dropout=0))
    peak = torch.cuda.max_memory_allocated() - before
    model, rows = recipe.model, recipe.train.micro_batch_size * recipe.data.sequence_length
    # fp32 weights, moments and gradients; bf16 weights; the optimizer's temporaries
    state = num_parameters(model) * (16 + 4 + 12)
    # of 15 bf16 vectors a layer that backward needs, and room for as many again
    activations = 30 * 2 * rows * model.hidden_size * model.num_layers
    logits = 4 * rows * model.vocab_size * 4
    record_property("peak_mib", peak / 2**20)
    record_property("bound_mib", (state + activations + logits) / 2**20)
    assert 0 < peak < state + activations + logits + (64 << 20)
