"""The adapter to Transformer Engine, with a stand-in that has its signatures.

The signatures are those of release 2.9 and of the development version 2.20; the stand-in computes
in PyTorch and refuses what the library would refuse.
"""

import contextlib
import importlib.metadata
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from megaphi.config import Model, Precision
from megaphi.model.execution import Execution
from megaphi.model.linear import Linear
from megaphi.model.phi import Phi
from megaphi.precision.fp8_choice import fp8_layers
from megaphi.precision.policy import DeviceFacts, resolve
from megaphi.precision.transformer_engine import TransformerEngineFp8, TransformerEngineLinear

HYBRID = object()
CALLS: list[bool | None] = []
ACTIVE: list[object] = []


@dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: object = None
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"


@dataclass
class Float8CurrentScaling:
    fp8_format: object = None


class StandInLinear(nn.Module):
    """Takes the arguments that the library's layer has, and no others."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__()
        self.use_bias = bias
        empty = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
        self.weight = nn.Parameter(empty)
        self.cached: Tensor | None = None

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Tensor:
        assert ACTIVE, "called outside autocast: the library would compute in bf16"
        assert self.weight.device == inp.device
        # the library's own check of set_activation_dtype
        assert all(p.dtype == inp.dtype for p in self.parameters())
        CALLS.append(is_first_microbatch)
        if is_first_microbatch is not False:
            self.cached = self.weight.detach().clone()
        assert torch.equal(self.cached, self.weight), "stale copy of the weight"
        return inp @ self.weight.t()


@contextlib.contextmanager
def autocast(
    enabled: bool = True,
    calibrating: bool = False,
    recipe: object = None,
    amax_reduction_group: object = None,
    _graph: bool = False,
) -> Iterator[None]:
    assert enabled
    ACTIVE.append(recipe)
    yield
    ACTIVE.pop()


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`transformer_engine` as far as the adapter uses it."""
    CALLS.clear()
    pytorch = ModuleType("transformer_engine.pytorch")
    vars(pytorch).update(Linear=StandInLinear, autocast=autocast)
    recipe = ModuleType("transformer_engine.common.recipe")
    vars(recipe).update(
        DelayedScaling=DelayedScaling,
        Float8CurrentScaling=Float8CurrentScaling,
        Format=SimpleNamespace(HYBRID=HYBRID),
    )
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, pytorch.__name__, pytorch)
    monkeypatch.setitem(sys.modules, recipe.__name__, recipe)
    return pytorch


SHAPE = Model(num_layers=2, hidden_size=64, num_heads=2, vocab_size=64, max_sequence_length=32)


def test_the_model_has_the_same_parameters_and_the_same_loss() -> None:
    torch.manual_seed(0)
    plain = Phi(SHAPE)
    fp8 = TransformerEngineFp8(["qkv", "fc1", "fc2"])
    model = Phi(SHAPE, Execution(make=fp8.make))
    assert type(model.blocks[0].out) is Linear
    assert isinstance(model.blocks[0].qkv, TransformerEngineLinear)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.load_state_dict(plain.state_dict())
    tokens = torch.randint(0, 64, (2, 16))
    losses, gradients = [], []
    for network in (plain, model):
        with fp8.forward_pass(True):
            loss = network(tokens, tokens)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert CALLS == [True] * 6


def test_micro_batches_say_which_they_are_and_weights_are_lent_anew() -> None:
    fp8 = TransformerEngineFp8(["fc1"])
    layer = fp8.make("fc1", 32, 16)
    x = torch.randn(4, 32)
    for step in range(2):
        for first in (True, False, False):
            with fp8.forward_pass(first):
                expected = x @ layer.weight.t() + layer.bias
                torch.testing.assert_close(layer(x), expected)
        # another tensor, as FSDP2 may gather it
        layer.weight = nn.Parameter(torch.full((16, 32), float(step)))
    with fp8.forward_pass(), torch.no_grad():
        assert torch.equal(layer.product(x), x @ layer.weight.t())
    assert CALLS == [True, False, False] * 2 + [None]


@pytest.mark.parametrize(
    ("scaling", "recipe"), [("current", Float8CurrentScaling), ("delayed", DelayedScaling)]
)
def test_recipe(scaling: str, recipe: type) -> None:
    precision = Precision(dtype="fp8", fp8_backend="te", fp8_scaling=scaling)
    facts = DeviceFacts(
        name="NVIDIA H200", capability=(9, 0), cuda=(12, 8), transformer_engine="2.9.0"
    )
    fp8 = fp8_layers(resolve(precision, facts), precision)
    assert isinstance(fp8, TransformerEngineFp8)
    with fp8.forward_pass():
        (active,) = ACTIVE
        assert active == recipe(fp8_format=HYBRID)
    assert not ACTIVE
    assert fp8.state_tensors() == {}


def test_outside_a_forward_pass_is_an_error_not_bf16() -> None:
    layer = TransformerEngineFp8(["fc1"]).make("fc1", 16, 16)
    with pytest.raises(AssertionError, match="forward_pass"):
        layer(torch.randn(1, 16))


def test_what_the_library_cannot_do_is_said(
    library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"fc1.*24 x 32.*16"):
        TransformerEngineFp8(["fc1"]).make("fc1", 24, 32)
    monkeypatch.delattr(library, "autocast")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.5.0")
    with pytest.raises(ValueError, match=r"2\.9 or later, not 2\.5\.0"):
        TransformerEngineFp8(["fc1"])
    monkeypatch.setitem(sys.modules, library.__name__, None)
    with pytest.raises(ValueError, match="fp8_backend=native"):
        TransformerEngineFp8(["fc1"])
