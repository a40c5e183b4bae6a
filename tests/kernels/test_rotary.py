"""The Triton rotary kernel against float64, autograd's in-place rules and torch.compile.

The numerics need Triton's interpreter: `test_numerics_in_a_child` runs them in a process of its
own; the resource limits come from compiling ahead of time, in others.
"""

import importlib.util

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import interpreting
from tests.helpers import short_and_slow
from tests.kernels.compile_for_gpu import resources
from tests.kernels.interpreter import assert_passes_in_the_interpreter

if interpreting():
    from kernels.rotary import rotary_packed, rotary_packed_, turn_packed

interpreted = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

# batch, time, heads, head size, pairs
SHAPES = [
    (1, 1, 1, 2, 1),
    (1, 5, 3, 12, 3),
    (2, 3, 2, 20, 10),
    (1, 37, 1, 64, 8),
    (1, 2, 5, 256, 128),
    (1, 2, 3, 250, 60),
    (1, 3, 32, 64, 16),
]


def tables(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of random angles."""
    angles = 10 * torch.randn(shape)
    return angles.cos(), angles.sin()


def turned_in_float64(qkv: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The formula, as a complex rotation."""
    half = cosine.shape[-1]
    qkv = qkv.double()
    turn = torch.complex(cosine.double(), sine.double())[..., None, None, :]
    z = torch.complex(qkv[..., :2, :half], qkv[..., :2, half : 2 * half]) * turn
    turned = torch.cat((z.real, z.imag, qkv[..., :2, 2 * half :]), dim=-1)
    return torch.cat((turned, qkv[..., 2:, :]), dim=-2)


def close(actual: Tensor, exact: Tensor) -> None:
    """Within fp32 rounding, or two roundings of bf16 (the interpreter truncates)."""
    assert actual.isfinite().all()
    narrow = actual.dtype == torch.bfloat16
    tolerance = {"rtol": 2**-7, "atol": 1e-3} if narrow else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(actual.double(), exact, **tolerance)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_place_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, time, heads, size, half = shape
    cosine, sine = tables((time, half))
    qkv = torch.randn(batch, time, heads, 3, size).to(dtype)
    original = qkv.clone()
    out = rotary_packed(qkv, cosine, sine)
    assert out.data_ptr() == qkv.data_ptr()
    close(out, turned_in_float64(original, cosine, sine))
    assert torch.equal(out[..., 2, :], original[..., 2, :])
    assert torch.equal(out[..., 2 * half :], original[..., 2 * half :])
    if dtype == torch.float32:
        twin = reference.rotary_packed(original, cosine, sine)
        torch.testing.assert_close(out, twin, rtol=1e-6, atol=1e-6)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_copying_form_and_its_inverse(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A table for every sample; values and the rest of queries and keys come over bit for bit."""
    torch.manual_seed(1)
    batch, time, heads, size, half = shape
    cosine, sine = tables((batch, time, half))
    qkv = torch.randn(batch, time, heads, 3, size).to(dtype)
    qkv[0, 0, 0, 2, 0] = float("inf")
    original = qkv.clone()
    for inverse in (False, True):
        out = torch.full_like(qkv, float("nan"))
        turn_packed(qkv, out, cosine, sine, inverse)
        assert torch.equal(qkv, original)
        assert torch.equal(out[..., 2, :], original[..., 2, :])
        assert torch.equal(out[..., 2 * half :], original[..., 2 * half :])
        exact = turned_in_float64(original, cosine, -sine if inverse else sine)
        close(out[..., :2, :], exact[..., :2, :])


def gradients(function, x: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor) -> list[Tensor]:
    """Output of linear, rotary and a nonlinear head, and the gradients of x and the weight."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    heads = weight.shape[0] // (3 * 12)
    qkv = torch.nn.functional.linear(x, weight).view(*x.shape[:2], heads, 3, 12)
    q, k, v = function(qkv, cosine, sine).unbind(3)
    out = q.sin() * k + v.cos()
    out.square().sum().backward()
    return [out.detach(), x.grad, weight.grad]


@interpreted
def test_gradients_through_a_linear_layer_equal_float64() -> None:
    torch.manual_seed(2)
    cosine, sine = tables((7, 4))
    x, weight = torch.randn(2, 7, 24), torch.randn(5 * 3 * 12, 24) / 5
    ours = gradients(rotary_packed, x, weight, cosine, sine)
    exact = gradients(turned_in_float64, x.double(), weight.double(), cosine, sine)
    for actual, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@interpreted
def test_bfloat16_gradients_are_as_good_as_the_references() -> None:
    torch.manual_seed(3)
    cosine, sine = tables((7, 4))
    x, weight = torch.randn(2, 7, 24), torch.randn(5 * 3 * 12, 24) / 5
    exact = gradients(turned_in_float64, x.double(), weight.double(), cosine, sine)
    errors = []
    for function in (rotary_packed, reference.rotary_packed):
        results = gradients(function, x.bfloat16(), weight.bfloat16(), cosine, sine)
        errors.append(
            [float((a - b).norm() / b.norm()) for a, b in zip(results, exact, strict=True)]
        )
    for ours, theirs in zip(*errors, strict=True):
        assert ours < 2 * theirs + 1e-3


@interpreted
def test_the_write_is_in_place_and_costs_no_copies_of_the_gradient() -> None:
    """Autograd sees the write on the projection's whole output, not on a view of it."""
    cosine, sine = tables((3, 2))
    output = torch.nn.Linear(4, 2 * 3 * 4)(torch.randn(1, 3, 4))
    qkv = output.view(1, 3, 2, 3, 4)
    out = rotary_packed(qkv, cosine, sine)
    assert out.data_ptr() == output.data_ptr()
    names = []
    node = out.grad_fn
    while node is not None:
        names.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    assert "_InPlaceBackward" in names
    assert "CopySlices" not in names


@interpreted
def test_earlier_views_see_the_new_history() -> None:
    """What else looks at the projection's output means the turned values, gradients included."""
    torch.manual_seed(4)
    cosine, sine = tables((3, 2))
    x, factor = torch.randn(1, 3, 4), torch.randn(1, 3, 24)
    results = []
    for function in (rotary_packed, turned_in_float64):
        weight = (
            torch.linspace(-1, 1, 24 * 4)
            .view(24, 4)
            .to(torch.float32 if function is rotary_packed else torch.float64)
        )
        weight.requires_grad_()
        flat = torch.nn.functional.linear(x.to(weight.dtype), weight)
        turned = function(flat.view(1, 3, 2, 3, 4), cosine, sine)
        other = flat if function is rotary_packed else turned.reshape(1, 3, 24)
        (turned.square().sum() + (other * factor).sum()).backward()
        results.append(weight.grad.double())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@interpreted
def test_a_producer_that_saved_its_output_is_an_error_not_a_wrong_gradient() -> None:
    cosine, sine = tables((3, 2))
    x = torch.randn(1, 3, 2, 3, 4, requires_grad=True)
    out = rotary_packed(x.sigmoid(), cosine, sine)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class _ReturnsAView(torch.autograd.Function):
    """A custom linear layer's habit: the result is a view made out of autograd's sight."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return (2 * x.flatten()).view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * grad


def _view_under_no_grad(x: Tensor) -> Tensor:
    """A view without a history of a tensor that has one."""
    with torch.no_grad():
        return x.view(x.shape)


@interpreted
@pytest.mark.parametrize(
    "kind", ["leaf", "slice", "custom view", "made under no_grad", "not contiguous"]
)
def test_what_may_not_be_written_over_is_left_alone(kind: str) -> None:
    torch.manual_seed(5)
    cosine, sine = tables((3, 2))
    x = torch.randn(2, 3, 2, 3, 4, requires_grad=True)
    make = {
        "leaf": lambda x: x,
        "slice": lambda x: (x * 2)[1:],
        "custom view": _ReturnsAView.apply,
        "made under no_grad": lambda x: _view_under_no_grad(2 * x),
        "not contiguous": lambda x: (x.transpose(0, 1) * 2).transpose(0, 1),
    }[kind]
    qkv = make(x)
    before = qkv.detach().clone()
    out = rotary_packed(qkv, cosine, sine)
    assert torch.equal(qkv, before)
    if kind == "made under no_grad":
        return  # no gradient reaches x, with either implementation
    upstream = torch.randn_like(out)
    (actual,) = torch.autograd.grad(out, x, upstream)
    expected_out = reference.rotary_packed(make(x), cosine, sine)
    (expected,) = torch.autograd.grad(expected_out, x, upstream)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(actual, expected)


@interpreted
@pytest.mark.parametrize("leaf", [True, False])
def test_the_gradient_handed_in_is_not_written_over(leaf: bool) -> None:
    cosine, sine = tables((3, 2))
    x = torch.randn(1, 3, 2, 3, 4, requires_grad=True)
    out = rotary_packed(x if leaf else 2 * x, cosine, sine)
    upstream = torch.randn_like(out)
    before = upstream.clone()
    out.backward(upstream)
    assert torch.equal(upstream, before)


@interpreted
def test_without_gradients() -> None:
    cosine, sine = tables((3, 2))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            qkv = torch.randn(1, 3, 2, 3, 4)
            expected = reference.rotary_packed(qkv, cosine, sine)
            version = None if qkv.is_inference() else qkv._version
            out = rotary_packed(qkv, cosine, sine)
            assert out.data_ptr() == qkv.data_ptr()
            torch.testing.assert_close(out, expected)
            assert version is None or qkv._version > version
    empty = torch.randn(0, 3, 2, 3, 4)
    assert rotary_packed(empty, cosine, sine).shape == empty.shape


@interpreted
def test_under_activation_checkpointing() -> None:
    torch.manual_seed(6)
    cosine, sine = tables((3, 2))
    linear, x = torch.nn.Linear(4, 24), torch.randn(1, 3, 4)

    def run(x: Tensor) -> Tensor:
        return rotary_packed(linear(x).view(1, 3, 2, 3, 4), cosine, sine).sin()

    run(x).sum().backward()
    expected = linear.weight.grad.clone()
    linear.zero_grad()
    torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False).sum().backward()
    assert torch.equal(linear.weight.grad, expected)


@interpreted
def test_operator_registration() -> None:
    cosine, sine = tables((3, 2))
    for inverse in (False, True):
        arguments = (torch.randn(2, 3, 2, 3, 4), cosine, sine, inverse)
        torch.library.opcheck(rotary_packed_, arguments)


@interpreted
def test_compiled_equals_eager() -> None:
    torch.manual_seed(7)
    cosine, sine = tables((7, 4))
    x, weight = torch.randn(2, 7, 24), torch.randn(5 * 3 * 12, 24)
    compiled = torch.compile(rotary_packed, fullgraph=True, backend="aot_eager")
    eager = gradients(rotary_packed, x, weight, cosine, sine)
    for actual, expected in zip(gradients(compiled, x, weight, cosine, sine), eager, strict=True):
        assert torch.equal(actual, expected)


@interpreted
@pytest.mark.parametrize(
    ("qkv", "cosine", "sine"),
    [
        ((1, 3, 2, 2, 4), (3, 2), (3, 2)),
        ((1, 3, 2, 3, 4), (3, 3), (3, 3)),
        ((1, 3, 2, 3, 258), (3, 2), (3, 2)),
        ((1, 3, 2, 3, 4), (4, 2), (4, 2)),
        ((1, 3, 2, 3, 4), (3, 2), (3, 1)),
    ],
)
def test_what_does_not_fit_is_refused(qkv, cosine, sine) -> None:
    with pytest.raises(ValueError, match="rotary"):
        rotary_packed(torch.zeros(qkv), torch.zeros(cosine), torch.zeros(sine))
    with pytest.raises(ValueError, match="float32"):
        rotary_packed(torch.zeros(1, 3, 2, 3, 4), *[torch.zeros(3, 2).double()] * 2)


@needs_triton
def test_numerics_in_a_child() -> None:
    assert_passes_in_the_interpreter(
        [__file__, "-k", "not child and not ahead_of_time"], at_least=49
    )


@needs_triton
@pytest.mark.parametrize("capability", short_and_slow([90], [80, 100]))
@pytest.mark.parametrize("copy", [False, True])
def test_compiled_ahead_of_time_at_phi1_width(capability: int, copy: bool) -> None:
    """In place: four 16-byte loads of the tables, two of the projection; nothing spills."""
    signature = {"qkv": "*bf16", "out": "*bf16", "cosine": "*fp32", "sine": "*fp32"}
    constants = {
        "HEADS": 32,
        "HEAD_SIZE": 64,
        "HALF": 16,
        "INVERSE": copy,
        "COPY": copy,
        "BLOCK_SLOTS": 64,
        "BLOCK_PAIRS": 16,
        "BLOCK_REST": 32,
    }
    found = resources(
        "kernels.rotary",
        "rotary_packed_kernel",
        {**signature, "table_rows": "i32", **dict.fromkeys(constants, "constexpr")},
        constants,
        capability=capability,
        num_warps=4,
    )
    assert found.spill_bytes == 0
    assert found.registers <= (48 if copy else 40)
    assert found.shared_bytes == 0
    assert found.vector_loads >= (8 if copy else 6)
