"""The choice of number formats, over devices that are not here."""

import dataclasses
import importlib.metadata
from types import SimpleNamespace

import pytest
import torch

from megaphi.config import Data, Parallel, Precision, Recipe, Train
from megaphi.precision.policy import (
    DeviceFacts,
    check_pipeline,
    facts_of,
    resolve,
    why_not_fp8,
)
from megaphi.training.engine import Engine


def gpu(name: str, capability: tuple[int, int], cuda: tuple[int, int] = (12, 9)) -> DeviceFacts:
    return DeviceFacts(name=name, capability=capability, cuda=cuda)


A100 = gpu("NVIDIA A100", (8, 0))
H100 = gpu("NVIDIA H100 80GB HBM3", (9, 0))
H200 = gpu("NVIDIA H200", (9, 0))
B200 = gpu("NVIDIA B200", (10, 0))
L40S = gpu("NVIDIA L40S", (8, 9))
RTX4090 = gpu("NVIDIA GeForce RTX 4090", (8, 9))
RTX5090 = gpu("NVIDIA GeForce RTX 5090", (12, 0))
V100 = gpu("Tesla V100-SXM2-16GB", (7, 0))
P100 = gpu("Tesla P100", (6, 0))
M40 = gpu("Tesla M40", (5, 2))
CPU = DeviceFacts(name="CPU", cpu_has_bf16=True)
OLD_CPU = DeviceFacts(name="CPU")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
REFUSED = None


@pytest.mark.parametrize(
    ("facts", "auto", "bf16", "fp16", "fp8", "fp8_auto"),
    [
        (H100, BF16, BF16, FP16, "native", "native"),
        (H200, BF16, BF16, FP16, "native", "native"),
        (B200, BF16, BF16, FP16, "native", "native"),
        (RTX5090, BF16, BF16, FP16, "native", "native"),
        (L40S, BF16, BF16, FP16, "native", "native"),
        (RTX4090, BF16, BF16, FP16, "native", "native"),
        (A100, BF16, BF16, FP16, REFUSED, BF16),
        (V100, FP32, REFUSED, FP16, REFUSED, REFUSED),
        (P100, FP32, REFUSED, FP16, REFUSED, REFUSED),
        (M40, FP32, REFUSED, REFUSED, REFUSED, REFUSED),
        (CPU, BF16, BF16, FP16, REFUSED, BF16),
        (OLD_CPU, FP32, BF16, FP16, REFUSED, BF16),
    ],
    ids=lambda value: value.name if isinstance(value, DeviceFacts) else None,
)
def test_what_each_device_runs(facts, auto, bf16, fp16, fp8, fp8_auto) -> None:
    expected = {"auto": auto, "bf16": bf16, "fp16": fp16, "fp8": fp8, "fp8-auto": fp8_auto}
    for dtype, wanted in {**expected, "fp32": FP32}.items():
        precision = Precision(dtype=dtype)
        if wanted is REFUSED:
            with pytest.raises(ValueError, match=r"precision\.dtype="):
                resolve(precision, facts)
            continue
        policy = resolve(precision, facts)
        assert policy.fp8 == ("native" if wanted == "native" else None)
        assert policy.compute_dtype == (BF16 if wanted == "native" else wanted)
        assert policy.loss_scaling == (dtype == "fp16")
        assert policy.reason


def test_the_messages_for_an_a100() -> None:
    missing = (
        "FP8 needs compute capability >= 8.9 (Ada/Hopper/Blackwell); "
        "this device is NVIDIA A100 (8.0)"
    )
    with pytest.raises(ValueError, match="FP8") as caught:
        resolve(Precision(dtype="fp8"), A100)
    assert str(caught.value) == (
        f"{missing}. Use precision.dtype=bf16, or precision.dtype=fp8-auto to fall back."
    )
    assert resolve(Precision(dtype="fp8-auto"), A100).reason == f"bf16, not fp8: {missing}"


def test_a_gpu_without_bf16_is_not_told_to_use_it() -> None:
    for dtype in ("bf16", "fp8", "fp8-auto"):
        with pytest.raises(ValueError, match=r"V100.*[Uu]se precision\.dtype=fp16") as caught:
            resolve(Precision(dtype=dtype), V100)
        assert "dtype=bf16, or" not in str(caught.value)
        with pytest.raises(ValueError, match=r"[Uu]se precision\.dtype=fp32"):
            resolve(Precision(dtype=dtype), M40)


def test_a_cpu_is_refused_fp8() -> None:
    with pytest.raises(ValueError, match=r"CPU.*precision\.dtype=bf16"):
        resolve(Precision(dtype="fp8"), CPU)


@pytest.mark.parametrize(
    ("capability", "too_old", "first"),
    [((8, 9), (12, 0), (12, 1)), ((9, 0), (11, 7), (11, 8)), ((10, 0), (12, 6), (12, 8))],
)
def test_cuda_must_know_the_device(capability, too_old, first) -> None:
    assert why_not_fp8(gpu("it", capability, first)) is None
    old = why_not_fp8(gpu("it", capability, too_old))
    assert old is not None
    assert f"CUDA >= {first[0]}.{first[1]}" in old
    assert f"with CUDA {too_old[0]}.{too_old[1]}" in old
    rocm = why_not_fp8(DeviceFacts(name="it", capability=capability))
    assert rocm is not None
    assert "without CUDA" in rocm


def test_transformer_engine_is_used_only_where_it_is_asked_for_and_installed() -> None:
    engine = dataclasses.replace(H100, transformer_engine="2.9.0")
    assert resolve(Precision(dtype="fp8"), engine).fp8 == "native"
    asked = Precision(dtype="fp8", fp8_backend="te")
    policy = resolve(asked, engine)
    assert policy.fp8 == "te"
    assert "2.9.0" in policy.reason
    for precision in (asked, Precision(dtype="fp8-auto", fp8_backend="te")):
        with pytest.raises(ValueError, match=r"pip install .*transformer_engine\[pytorch\]"):
            resolve(precision, H100)
    # what the device cannot do comes before what is not installed
    assert resolve(Precision(dtype="fp8-auto", fp8_backend="te"), A100).fp8 is None


TE, DELAYED = {"fp8_backend": "te"}, {"fp8_scaling": "delayed"}


@pytest.mark.parametrize(
    ("options", "refused", "instead"),
    [
        (TE, "fp8_backend=te", "fp8_backend=native"),
        ({**TE, **DELAYED}, "fp8_backend=te", "fp8_backend=native"),
        (DELAYED, "fp8_scaling=delayed", "fp8_scaling=current"),
    ],
)
def test_a_pipeline_is_refused_what_needs_whole_forward_passes(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, str], refused: str, instead: str
) -> None:
    facts = dataclasses.replace(H100, transformer_engine="2.9.0")
    monkeypatch.setattr("megaphi.training.engine.facts_of", lambda device: facts)
    recipe = Recipe(
        train=Train(run_dir="run", steps=1),
        data=Data(train="tokens"),
        parallel=Parallel(pipeline=2),
        precision=Precision(dtype="fp8", **options),
    )
    with pytest.raises(ValueError, match="pipeline") as caught:
        Engine(recipe, SimpleNamespace(data_size=1, device=torch.device("cpu")))
    assert str(caught.value) == (
        f"precision.{refused} does not work with parallel.pipeline above 1; use precision.{instead}"
    )


def test_a_pipeline_takes_what_does_not_end_up_in_fp8() -> None:
    check_pipeline(resolve(Precision(dtype="fp8"), H100), Precision(dtype="fp8"))
    fallback = Precision(dtype="fp8-auto", **TE, **DELAYED)
    check_pipeline(resolve(fallback, A100), fallback)


def test_facts_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    facts = facts_of(cpu)
    assert facts.capability is None
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert facts.native_bf16 == has_bf16
    assert resolve(Precision(dtype="auto"), facts).compute_dtype == (BF16 if has_bf16 else FP32)
    assert resolve(Precision(dtype="fp16"), facts).compute_dtype == FP16
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{name} 2.9")
    assert facts_of(cpu).transformer_engine == "transformer_engine 2.9"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    expected = dataclasses.replace(H200, cuda=(12, 8), transformer_engine="transformer_engine 2.9")
    assert facts_of(torch.device("cuda", 0)) == expected
