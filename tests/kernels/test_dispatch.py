"""Which implementation runs, that a wrong wish fails loudly, and that the choice changes no run."""

import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch

from kernels import ops, reference, reference_fp8, reference_vocabulary
from kernels.dispatch import use_triton
from tests.helpers import child_environment, curve, toy_options, train_command

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_the_plain_definitions_run_unless_triton_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MEGAPHI_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not use_triton(CPU)
    assert not use_triton(CUDA)
    monkeypatch.setenv("MEGAPHI_KERNELS", "torch")
    assert not use_triton(CUDA)


def test_what_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("MEGAPHI_KERNELS", "cuda")
    with pytest.raises(ValueError, match="MEGAPHI_KERNELS=cuda"):
        use_triton(CPU)
    monkeypatch.setenv("MEGAPHI_KERNELS", "triton")
    if importlib.util.find_spec("triton") is None:
        with pytest.raises(RuntimeError, match="not installed"):
            use_triton(CUDA)
        return
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        ops.layer_norm(torch.zeros(1, 4), torch.ones(4), torch.zeros(4), 1e-5)
    assert use_triton(CUDA)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton(CPU)


def test_every_operation_of_the_reference_is_offered() -> None:
    for name in ops.__all__:
        twins = (reference, reference_fp8, reference_vocabulary)
        assert any(hasattr(module, name) for module in twins), name


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_run_through_the_kernels_gives_the_losses_of_the_plain_definitions(
    toy_tokens: Path, tmp_path: Path
) -> None:
    """Every kernel, forward and backward, in a real run, in the interpreter; dropout on."""
    for name, variables in (
        ("plain", {}),
        ("triton", {"TRITON_INTERPRET": "1", "MEGAPHI_KERNELS": "triton"}),
    ):
        options = toy_options(
            toy_tokens,
            tmp_path / name,
            train__steps=3,
            train__micro_batch_size=1,
            train__global_batch_size=2,
            data__sequence_length=8,
            model__attention_dropout=0,
            checkpoint__interval=100,
            schedule__warmup_steps=1,
        )
        options = [option for option in options if "data.split" not in option]
        done = subprocess.run(
            [*train_command(options)],
            env={**child_environment(), **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    plain, kernels = curve(tmp_path / "plain"), curve(tmp_path / "triton")
    assert plain.keys() == kernels.keys()
    assert len(plain) == 3
    for key in plain:
        assert kernels[key] == pytest.approx(plain[key], rel=1e-5), key
