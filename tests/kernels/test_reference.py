"""The reference operations against float64 formulas, other libraries and published vectors."""

import dataclasses
import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels import adamw_cpu, reference
from kernels.reference import (
    DropoutSeed,
    bias_dropout_add_layer_norm,
    bias_gelu,
    dropout_masks,
    linear_cross_entropy,
    philox_4x32,
    rotary_packed,
    sum_of_squares,
)
from tests.helpers import child_environment

CPU = torch.device("cpu")


def words(seed: int, counter: int, *rounds: int) -> list[int]:
    """Philox of a counter whose four words are all `counter`."""
    first = torch.tensor([counter])
    return [int(w) for w in philox_4x32(seed, (first, counter, counter, counter), *rounds)]


def test_philox_known_answers() -> None:
    """The known-answer vectors of the Random123 library."""
    ones = 0xFFFFFFFF
    assert words(0, 0, 7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert words(0, 0) == words(0, 0, 7)
    assert words(0, 0, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words(2**64 - 1, ones, 7) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]
    assert words(2**64 - 1, ones, 10) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_philox_equals_tritons(tmp_path: Path) -> None:
    """The masks of the Triton kernels will be those of the reference."""
    program = """
import torch, triton, triton.language as tl
from kernels.reference import philox_4x32

@triton.jit
def draw(out, seed, c2, c3, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    zero = i * 0
    words = tl.philox(seed, i.to(tl.uint32), zero + 5, zero + c2, zero + c3, n_rounds=7)
    for k in tl.static_range(4):
        tl.store(out + k * BLOCK + i, words[k].to(tl.int32, bitcast=True))

out = torch.full((4, 64), -1, dtype=torch.int32)
seed = 0x123456789ABCDEF
draw[(1,)](out, seed, 3, 9, 64)
ours = torch.stack(philox_4x32(seed, (torch.arange(64), 5, 3, 9), 7))
assert torch.equal(out.to(torch.int64) & 0xFFFFFFFF, ours)
print("equal")
"""
    # a JIT function reads its own source, so it needs a file
    path = tmp_path / "philox.py"
    path.write_text(program)
    environment = {**child_environment(), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_dropout_masks_keep_the_right_share_and_are_independent() -> None:
    seed = DropoutSeed(seed=11, step=3, first_token=0)
    a, b = dropout_masks(torch.Size((4096, 64)), 0.1, seed, 0, CPU)
    kept_a, kept_b = (a > 0).double(), (b > 0).double()
    sigma = math.sqrt(0.1 * 0.9 / a.numel())
    for kept in (kept_a, kept_b):
        assert abs(float(kept.mean()) - 0.9) < 4 * sigma
        assert (
            abs(torch.corrcoef(torch.stack((kept.flatten()[:-1], kept.flatten()[1:])))[0, 1]) < 0.01
        )
    assert abs(torch.corrcoef(torch.stack((kept_a.flatten(), kept_b.flatten())))[0, 1]) < 0.01
    assert float(a.mean()) == pytest.approx(1.0, abs=0.01)
    assert a.unique().tolist() == pytest.approx([0.0, 1 / 0.9], rel=1e-4)


def test_dropout_masks_of_scattered_rows_are_those_of_their_tokens() -> None:
    """A process that holds some rows of a sequence draws what another would for them."""
    shape, seed = torch.Size((10, 6)), DropoutSeed(seed=1, step=2, first_token=100)
    tokens_n = torch.tensor([7, 2, 9])
    some = dataclasses.replace(seed, tokens_n=tokens_n)
    whole = dropout_masks(shape, 0.5, seed, 4, CPU)
    scattered = dropout_masks(torch.Size((3, 6)), 0.5, some, 4, CPU)
    for all_rows, rows in zip(whole, scattered, strict=True):
        assert torch.equal(all_rows[tokens_n], rows)


def test_dropout_masks_depend_on_position_not_on_the_cut() -> None:
    """One call over all rows equals calls over parts; other steps and sites differ."""
    size = 6  # not a multiple of four
    whole, _ = dropout_masks(
        torch.Size((10, size)), 0.5, DropoutSeed(seed=1, step=2, first_token=100), 4, CPU
    )
    parts = [
        dropout_masks(
            torch.Size((count, size)),
            0.5,
            DropoutSeed(seed=1, step=2, first_token=100 + start),
            4,
            CPU,
        )[0]
        for start, count in ((0, 3), (3, 7))
    ]
    assert torch.equal(whole, torch.cat(parts))
    for other, site in (
        (DropoutSeed(seed=2, step=2, first_token=100), 4),
        (DropoutSeed(seed=1, step=3, first_token=100), 4),
        (DropoutSeed(seed=1, step=2, first_token=101), 4),
        (DropoutSeed(seed=1, step=2, first_token=100), 5),
    ):
        assert not torch.equal(
            whole, dropout_masks(torch.Size((10, size)), 0.5, other, site, CPU)[0]
        )


def test_dropout_masks_beyond_32_bits_of_position() -> None:
    """A step of phi-1 has more attention probabilities than a counter word can number."""
    groups = 2**20
    first_token = 2**12 - 1  # the second row starts at index 2^32
    seed = DropoutSeed(seed=1, step=2, first_token=first_token)
    mask, _ = dropout_masks(torch.Size((2, 4 * groups)), 0.5, seed, 3, CPU)
    words = philox_4x32(1, (torch.arange(2), 1, 3, 2))
    expected = [float(int(words[k][g]) & 0xFFFF >= 32768) * 2 for g in range(2) for k in range(4)]
    assert mask[1, :8].tolist() == expected
    assert not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize("probability", [0.0, 0.25])
def test_block_end_equals_float64_formula(probability: float) -> None:
    torch.manual_seed(0)
    shapes = [(2, 5, 12), (12,), (2, 5, 12), (12,), (2, 5, 12), (12,), (12,)]
    values = [torch.randn(shape, requires_grad=True) for shape in shapes]
    doubles = [value.detach().double().requires_grad_() for value in values]
    seed = DropoutSeed(seed=5, step=1, first_token=40)
    y, r = bias_dropout_add_layer_norm(*values, 1e-5, probability, seed, site=2)
    masks = [torch.ones(2, 5, 12).double()] * 2
    if probability:
        drawn = dropout_masks(torch.Size((10, 12)), probability, seed, 2, CPU)
        masks = [mask.double().view(2, 5, 12) for mask in drawn]
        assert 0 < int((masks[0] == 0).sum()) < 120
    a, bias_a, m, bias_m, x, weight, bias = doubles
    r64 = x + masks[0] * (a + bias_a) + masks[1] * (m + bias_m)
    centred = r64 - r64.mean(-1, keepdim=True)
    y64 = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    torch.testing.assert_close(y.double(), y64, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(r.double(), r64, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(y)
    (y * upstream + r * upstream.flip(0)).sum().backward()
    (y64 * upstream.double() + r64 * upstream.double().flip(0)).sum().backward()
    for value, double in zip(values, doubles, strict=True):
        torch.testing.assert_close(value.grad.double(), double.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [1, 3, 5])
def test_rotary_equals_complex_rotation(half: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 4, 3, 10)
    for shape in ((7, half), (2, 7, half)):
        angles = torch.randn(shape).double()
        turned = rotary_packed(x, angles.cos().float(), angles.sin().float()).double()
        z = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
        z = z * torch.polar(torch.ones_like(angles), angles)[..., None, None, :]
        expected = torch.cat((z.real, z.imag, x[..., 2 * half :].double()), dim=-1)
        expected[:, :, :, 2] = x[:, :, :, 2].double()
        torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(turned[:, :, :, 2], x[:, :, :, 2].double())


def test_rotary_turns_the_gradient_back() -> None:
    """A rotation keeps scalar products, so its backward is the rotation by the opposite angles."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    angles = torch.randn(5, 3)
    upstream = torch.randn_like(x)
    rotary_packed(x, angles.cos(), angles.sin()).backward(upstream)
    back = rotary_packed(upstream, angles.cos(), -angles.sin())
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad, back, rtol=2**-7, atol=1e-2)


def test_bias_gelu_equals_its_formula() -> None:
    x, bias = torch.randn(4, 9), torch.randn(9)
    z = (x + bias).double()
    inner = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    torch.testing.assert_close(
        bias_gelu(x, bias).double(), 0.5 * z * (1 + inner.tanh()), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("chunk_rows", [1, 4, 7, 100])
def test_linear_cross_entropy_equals_float64(chunk_rows: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(11, 6), torch.randn(23, 6), torch.randn(23)
    labels = torch.randint(0, 23, (11,))
    singles = [t.clone().requires_grad_() for t in (x, weight, bias)]
    doubles = [t.double().requires_grad_() for t in (x, weight, bias)]
    loss = linear_cross_entropy(*singles, labels, chunk_rows)
    expected = torch.nn.functional.cross_entropy(
        doubles[0] @ doubles[1].T + doubles[2], labels, reduction="sum"
    )
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    (loss * 0.37).backward()
    (expected * 0.37).backward()
    for single, double in zip(singles, doubles, strict=True):
        torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-4, atol=1e-6)


def test_linear_cross_entropy_in_bf16_sums_weight_gradients_in_fp32() -> None:
    """Many chunks must not lose small contributions to bf16 rounding."""
    torch.manual_seed(0)
    x, weight = torch.randn(512, 16).bfloat16(), torch.randn(40, 16).bfloat16()
    labels = torch.randint(0, 40, (512,))
    gradients = []
    for dtype, chunk in ((torch.bfloat16, 2), (torch.float64, 512)):
        w = weight.to(dtype, copy=True).requires_grad_()
        bias = torch.zeros(40, dtype=dtype)
        linear_cross_entropy(x.to(dtype), w, bias, labels, chunk).backward()
        gradients.append(w.grad.double())
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert float(error) < 0.01


def test_linear_cross_entropy_scales_bf16_gradients_exactly() -> None:
    """1 / 120 is 0.3% off as a bf16 number; the gradients must not be."""
    torch.manual_seed(0)
    weight, labels = torch.randn(40, 16).bfloat16(), torch.randint(0, 40, (64,))
    x, bias = torch.randn(64, 16).bfloat16(), torch.zeros(40).bfloat16()
    gradients = []
    for scale in (1.0, 1 / 120):
        w = weight.clone().requires_grad_()
        (linear_cross_entropy(x, w, bias, labels) * scale).backward()
        gradients.append(w.grad.double())
    ratio = float((gradients[1] * gradients[0]).sum() / gradients[0].square().sum())
    assert ratio * 120 == pytest.approx(1.0, abs=1e-3)


UPDATES = [reference.adamw_step_, adamw_cpu.adamw_step_]
"""The plain definition, and what runs on a CPU."""


def adamw_pair(
    update_: Callable[..., None], decay: float, clip_scale: float, epsilon: float, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same updates by ours in fp32 and by PyTorch's AdamW in float64."""
    torch.manual_seed(0)
    start = torch.randn(7, 5)
    ours, first, second = start.clone(), torch.zeros(7, 5), torch.zeros(7, 5)
    theirs = torch.nn.Parameter(start.double())
    optimizer = torch.optim.AdamW(
        [theirs], lr=0.01, betas=(0.9, 0.95), eps=epsilon, weight_decay=decay
    )
    for step in range(1, steps + 1):
        gradient = torch.randn(5, 7).t()  # not contiguous
        theirs.grad = gradient.double() * clip_scale
        optimizer.step()
        update_(
            [ours],
            [gradient.clone()],
            [first],
            [second],
            torch.tensor(float(step)),
            torch.tensor(True),
            torch.tensor(clip_scale),
            learning_rate=0.01,
            beta1=0.9,
            beta2=0.95,
            epsilon=epsilon,
            weight_decay=decay,
        )
    return ours, theirs.detach()


@pytest.mark.parametrize("update_", UPDATES)
@pytest.mark.parametrize(
    ("decay", "scale", "epsilon"),
    # without a large epsilon the update hardly depends on the size of the gradients
    [(0.0, 1.0, 1e-8), (0.1, 1.0, 1e-8), (0.1, 0.3, 0.1)],
)
def test_adamw_equals_pytorchs_in_float64(
    update_: Callable[..., None], decay: float, scale: float, epsilon: float
) -> None:
    ours, theirs = adamw_pair(update_, decay, scale, epsilon, steps=25)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("update_", UPDATES)
def test_adamw_changes_nothing_on_a_non_finite_step(update_: Callable[..., None]) -> None:
    torch.manual_seed(0)
    state = [torch.randn(5), torch.randn(5), torch.rand(5)]
    before = [value.clone() for value in state]
    gradient = torch.tensor([1.0, float("nan"), float("inf"), -1.0, 2.0])
    update_(
        [state[0]],
        [gradient],
        [state[1]],
        [state[2]],
        torch.tensor(3.0),
        torch.tensor(False),
        torch.tensor(float("nan")),
        learning_rate=0.1,
        beta1=0.9,
        beta2=0.95,
        epsilon=1e-8,
        weight_decay=0.1,
    )
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_sum_of_squares_over_tensors() -> None:
    tensors = [torch.randn(3, 4), torch.randn(7), torch.zeros(0)]
    expected = sum(float(t.double().square().sum()) for t in tensors)
    assert float(sum_of_squares(tensors)) == pytest.approx(expected, rel=1e-6)
