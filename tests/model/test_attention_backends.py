"""The choice of an attention backend, for cards and packages that this machine does not have."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megaphi.model.attention_backends import (
    Capabilities,
    Need,
    choose,
    find_package,
    probe,
    training_need,
)
from megaphi.recipe_file import load_recipe
from tests.helpers import toy_options

CPU = Capabilities(device_type="cpu")
PHI = Need(dtype=torch.bfloat16, head_size=64, sequence_length=2048)


def card(name: str, major: int, minor: int, **more: Any) -> Capabilities:
    """A card with a recent PyTorch and no other package."""
    values = {"cuda_version": "12.9", "cudnn_version": 91900, "torch_varlen": True, **more}
    return Capabilities(
        device_type="cuda", device_name=name, compute_capability=(major, minor), **values
    )


A100 = card("NVIDIA A100-SXM4-80GB", 8, 0)
L40S = card("NVIDIA L40S", 8, 9)
RTX_4090 = card("NVIDIA GeForce RTX 4090", 8, 9)
H100 = card("NVIDIA H100 80GB HBM3", 9, 0)
H200 = card("NVIDIA H200", 9, 0)
B200 = card("NVIDIA B200", 10, 0)
RTX_5090 = card("NVIDIA GeForce RTX 5090", 12, 0)
V100 = card("Tesla V100-SXM2-32GB", 7, 0)
ALL_PACKAGES = {"flash2": "2.8.3", "flash3": "3.0.0", "flash4": "4.0.0", "te": "2.9"}


def need(**changes: Any) -> Need:
    return dataclasses.replace(PHI, **changes)


def having(capabilities: Capabilities, *packages: str, **more: Any) -> Capabilities:
    found = {package: ALL_PACKAGES[package] for package in packages}
    versions = {**capabilities.versions, **found}
    return dataclasses.replace(capabilities, versions=versions, **more)


def everything(capabilities: Capabilities) -> Capabilities:
    return having(capabilities, *ALL_PACKAGES)


CHOICES = [
    # no dropout: the fastest of the card
    (CPU, PHI, "sdpa"),
    (A100, PHI, "flash"),
    (having(A100, "flash2"), PHI, "flash2"),
    (everything(A100), PHI, "flash2"),
    (having(A100, "te"), PHI, "flash"),
    (L40S, PHI, "flash"),
    (everything(L40S), PHI, "flash2"),
    (RTX_4090, PHI, "flash"),
    (RTX_5090, PHI, "flash"),
    (everything(RTX_5090), PHI, "flash2"),
    (H100, PHI, "cudnn"),
    (H200, PHI, "cudnn"),
    (having(H200, "flash2", "te"), PHI, "cudnn"),
    (having(H200, "flash3"), PHI, "flash3"),
    (having(H200, "flash4"), PHI, "cudnn"),
    (everything(H200), PHI, "flash3"),
    (B200, PHI, "cudnn"),
    (having(B200, "flash3", "flash2"), PHI, "cudnn"),
    (everything(B200), PHI, "flash4"),
    (V100, need(dtype=torch.float16), "sdpa"),
    # phi-1's dropout of 0.1: neither flash-attn 3 and 4 nor cuDNN
    (CPU, need(dropout=0.1), "plain"),
    (everything(A100), need(dropout=0.1), "flash2"),
    (A100, need(dropout=0.1), "flash"),
    (H200, need(dropout=0.1), "flash"),
    (everything(H200), need(dropout=0.1), "flash2"),
    (having(H200, "flash3", "te"), need(dropout=0.1), "flash"),
    (everything(B200), need(dropout=0.1), "flash2"),
    (B200, need(dropout=0.1), "flash"),
    # a multiple of 1/16, which cuDNN can drop, unless it is one of the broken versions
    (everything(H200), need(dropout=0.125), "cudnn"),
    (having(H200, cudnn_version=91200), need(dropout=0.125), "flash"),
    (having(H200, cudnn_version=91200), PHI, "cudnn"),
    # cuDNN and lengths
    (having(H200, cudnn_version=91002), need(sequence_length=1000), "flash"),
    (having(H200, cudnn_version=91501), need(sequence_length=1000), "cudnn"),
    (having(H200, cudnn_version=89000), PHI, "flash"),
    (having(H200, cudnn_version=None), PHI, "flash"),
    # documents: variable lengths
    (CPU, need(documents=True), "sdpa"),
    (CPU, need(documents=True, dropout=0.1), "plain"),
    (H200, need(documents=True), "flash"),
    (having(H200, torch_varlen=False), need(documents=True), "sdpa"),
    (having(H200, "te", torch_varlen=False), need(documents=True), "te"),
    (having(H200, "flash2"), need(documents=True), "flash2"),
    (everything(H200), need(documents=True), "flash3"),
    (everything(B200), need(documents=True), "flash4"),
    (everything(A100), need(documents=True), "flash2"),
    (A100, need(documents=True, dropout=0.1), "sdpa"),
    (having(A100, "te"), need(documents=True, dropout=0.1), "sdpa"),
    (having(A100, "te"), need(documents=True, dropout=0.125), "te"),
    (everything(H200), need(documents=True, dropout=0.1), "flash2"),
    # number formats
    (everything(H200), need(dtype=torch.float32), "sdpa"),
    (everything(H200), need(dtype=torch.float16), "flash3"),
    # heads
    (everything(B200), need(head_size=192), "flash2"),
    (everything(H200), need(head_size=256), "flash3"),
    (H200, need(head_size=256), "flash"),
    (A100, need(head_size=256), "flash"),
    (L40S, need(head_size=256), "sdpa"),
    (everything(A100), need(head_size=288), "sdpa"),
    (everything(A100), need(head_size=60), "sdpa"),
    # a CPU
    (CPU, need(sequence_length=512), "short"),
    (CPU, need(sequence_length=513), "sdpa"),
    (CPU, need(sequence_length=512, dtype=torch.float32), "sdpa"),
    (CPU, need(sequence_length=512, documents=True), "sdpa"),
    (CPU, need(sequence_length=512, dropout=0.1), "plain"),
    (CPU, need(sequence_length=512, decoding=True), "sdpa"),
    # generation
    (everything(H200), need(decoding=True), "sdpa"),
]


@pytest.mark.parametrize(("capabilities", "what", "backend"), CHOICES)
def test_fastest_that_can(capabilities: Capabilities, what: Need, backend: str) -> None:
    choice = choose(what, capabilities)
    assert choice.backend == backend
    assert choice.reason


def test_every_choice_may_also_be_asked_for() -> None:
    """Asking for what auto takes is never refused: both follow the same limits."""
    cards = (A100, L40S, H100, B200, RTX_5090)
    packages = itertools.chain.from_iterable(
        itertools.combinations(ALL_PACKAGES, count) for count in range(5)
    )
    seen = set()
    for capabilities, present in itertools.product(cards, list(packages)):
        machine = having(capabilities, *present)
        for dropout, documents in itertools.product((0.0, 0.1, 0.125), (False, True)):
            what = need(dropout=dropout, documents=documents)
            backend = choose(what, machine).backend
            seen.add(backend)
            if backend != "sdpa":
                assert choose(what, machine, backend).backend == backend
            if dropout:
                assert backend not in ("flash3", "flash4")
            if documents:
                assert backend != "cudnn"
    assert seen == {"flash4", "flash3", "flash2", "te", "cudnn", "flash", "sdpa"}


def test_reasons_name_the_kernel_and_what_faster_ones_lack() -> None:
    reason = choose(need(dropout=0.1), everything(H200)).reason
    assert reason == (
        "flash-attn 2 (2.8.3) on compute capability 9.0; flash-attn 3 has no dropout; "
        "cuDNN through PyTorch drops in steps of 1/16 (cuDNN), so not 0.1"
    )
    broken = having(H200, problems={"flash3": "cannot be imported: undefined symbol: x"})
    assert "flash-attn 3 cannot be imported: undefined symbol: x" in choose(PHI, broken).reason
    assert "cuDNN 9.19.0" in choose(PHI, H200).reason
    assert "explicit mask" in choose(need(documents=True, dropout=0.1), A100).reason
    assert "float32" in choose(need(dtype=torch.float32), A100).reason


REFUSED = [
    ("flash3", everything(H200), need(dropout=0.1), "flash-attn 3 has no dropout", "flash2"),
    ("flash4", everything(H200), need(dropout=0.1), "flash-attn 4 has no dropout", "flash2"),
    ("cudnn", everything(H200), need(dropout=0.1), "steps of 1/16", "flash2"),
    ("te", everything(H200), need(dropout=0.1), "steps of 1/16", "flash2"),
    ("flash3", everything(A100), PHI, "9.x, not on NVIDIA A100-SXM4-80GB (8.0)", "flash2"),
    ("flash3", everything(B200), PHI, "9.x, not on NVIDIA B200 (10.0)", "flash4"),
    ("flash2", H200, PHI, "flash-attn 2 is not installed", "cudnn"),
    ("cudnn", H200, need(documents=True), "has no variable lengths", "flash"),
    ("flash", A100, need(documents=True, dropout=0.1), "no dropout with data.mask_doc", "sdpa"),
    ("flash2", everything(A100), need(dtype=torch.float32), "not in float32", "sdpa"),
    ("flash", CPU, PHI, "needs a CUDA device", "sdpa"),
    ("cudnn", H200, need(head_size=136), "up to 128 elements, not 136", "flash"),
    ("flash4", having(B200, "flash4"), need(head_size=136), "up to 128 elements", "flash"),
    ("flash2", everything(L40S), need(head_size=256), "up to 192 elements", "sdpa"),
    ("flash2", everything(A100), need(head_size=60), "a multiple of 8", "sdpa"),
    ("flash2", everything(A100), need(decoding=True), "a cache or padding", "sdpa"),
    ("cudnn", having(H200, cudnn_version=None), PHI, "has no cuDNN", "flash"),
    ("cudnn", having(H200, cudnn_version=91200), need(dropout=0.125), "9.12.0", "flash"),
    ("cudnn", having(H200, cudnn_version=91002), need(sequence_length=200), "9.10.2", "flash"),
]


@pytest.mark.parametrize(("asked", "capabilities", "what", "missing", "instead"), REFUSED)
def test_asking_for_what_cannot_be(asked, capabilities, what, missing, instead) -> None:
    with pytest.raises(ValueError, match=r"compute\.attention") as error:
        choose(what, capabilities, asked)
    message = str(error.value)
    assert message.startswith(f"compute.attention={asked}: ")
    assert missing in message
    assert message.endswith(f"set compute.attention to auto, which takes {instead} here")
    assert "\n" not in message


def test_asking_for_what_can_be() -> None:
    assert choose(PHI, everything(H200), "flash4").backend == "flash4"
    assert choose(need(head_size=256), everything(H200), "flash4").backend == "flash4"
    assert choose(PHI, A100, "cudnn").backend == "cudnn"
    assert choose(PHI, everything(H200), "te").reason.startswith("asked for; Transformer Engine")
    for machine in (CPU, V100, A100, H200):
        assert choose(need(dropout=0.1, documents=True), machine, "plain").backend == "plain"
    with pytest.raises(ValueError, match=r"compute\.attention=fast is not one of flash4"):
        choose(PHI, H200, "fast")


def test_need_of_a_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(toy_options(tmp_path / "t", tmp_path / "run", data__mask_documents="true"))
    assert training_need(recipe, torch.bfloat16) == Need(
        dtype=torch.bfloat16, head_size=32, sequence_length=32, dropout=0.1, documents=True
    )


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to import from; what is imported from it is forgotten afterwards."""
    names = ("flash_attn", "flash_attn_interface", "transformer_engine")
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(names)}
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in list(sys.modules):
        if name.startswith(names):
            del sys.modules[name]
    sys.modules.update(before)


def write_module(folder: Path, name: str, text: str) -> None:
    path = folder / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_absent_and_broken_packages_say_so(packages: Path) -> None:
    assert find_package("flash3") == (None, "is not installed")
    for error in ("ImportError", "OSError", "RuntimeError"):
        write_module(packages, "flash_attn_interface", f"raise {error}('undefined symbol: x\\ny')")
        sys.modules.pop("flash_attn_interface", None)
        found = find_package("flash3")
        assert found == (None, "cannot be imported: undefined symbol: x")
    write_module(packages, "transformer_engine/pytorch", "import not_a_package_of_anyone")
    version, why = find_package("te")
    assert version is None
    assert why == "cannot be imported: No module named 'not_a_package_of_anyone'"


def test_flash_attention_4_alone_is_not_flash_attention_2(packages: Path) -> None:
    """Its folder makes `import flash_attn` succeed, as a namespace package without functions."""
    write_module(packages, "flash_attn/cute/__init__", "")
    assert find_package("flash4") == ("of an unknown version", "")
    assert find_package("flash2") == (None, "is not installed")
    write_module(packages, "flash_attn/flash_attn_interface", "")
    metadata = packages / "flash_attn-2.8.3.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    assert find_package("flash2") == ("2.8.3", "")


def test_probe(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe(torch.device("cpu")) == CPU
    write_module(packages, "flash_attn_interface", "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    found = probe(torch.device("cuda", 0))
    assert (found.device_name, found.compute_capability) == ("NVIDIA H200", (9, 0))
    assert (found.cuda_version, found.cudnn_version) == ("12.8", 91501)
    assert found.torch_varlen
    assert found.versions == {"flash3": "of an unknown version"}
    assert set(found.problems) == {"flash2", "flash4", "te"}
    assert choose(PHI, found).backend == "flash3"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert probe(torch.device("cuda", 0)).cudnn_version is None
