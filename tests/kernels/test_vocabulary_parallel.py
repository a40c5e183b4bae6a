"""Cross-entropy over parts of the vocabulary against float64, and what its kernels compile to.

The numerics run twice: the plain definitions here, the kernels in a child process with Triton's
interpreter, since it and the compiler cannot share a process.
"""

import importlib.util

import pytest
import torch
from torch import Tensor

from kernels import ops
from kernels.dispatch import interpreting
from tests.helpers import short_and_slow
from tests.kernels.compile_for_gpu import resources
from tests.kernels.interpreter import assert_passes_in_the_interpreter

with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
in_interpreter = pytest.mark.skipif(not interpreting(), reason="runs in the interpreter's process")


def through_parts(logits_nv: Tensor, labels_n: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Losses and gradients with the vocabulary cut into parts, as processes do it."""
    pieces = [piece.clone() for piece in logits_nv.chunk(parts, dim=1)]
    width = pieces[0].shape[1]
    ids = [labels_n - part * width for part in range(parts)]
    statistics = [ops.vocabulary_statistics(piece, i) for piece, i in zip(pieces, ids, strict=True)]
    maximum_rn, total_rn, target_rn = torch.stack(statistics).transpose(0, 1).unbind()
    maximum_n = maximum_rn.amax(0)
    total_n = (total_rn * (maximum_rn - maximum_n).exp()).sum(0)
    for piece, i in zip(pieces, ids, strict=True):
        ops.vocabulary_gradient_(piece, i, maximum_n, total_n)
    return maximum_n + total_n.log() - target_rn.amax(0), torch.cat(pieces, dim=1)


def in_float64(logits_nv: Tensor, labels_n: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's own cross-entropy of the whole vocabulary."""
    exact = logits_nv.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, labels_n, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), exact)
    return losses.detach(), gradient


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize(
    ("rows", "width", "offset"), [(1, 8, 0.0), (5, 92, 50.0), (7, 1000, -80.0), (3, 51200, 0.0)]
)
def test_equals_float64(rows: int, width: int, offset: float, parts: int) -> None:
    torch.manual_seed(rows)
    logits = 4 * torch.randn(rows, width) + offset
    labels = torch.randint(width, (rows,))
    labels[0] = width - 1
    losses, gradient = through_parts(logits, labels, parts)
    exact_losses, exact_gradient = in_float64(logits, labels)
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_take_the_place_of_the_logits(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits, labels = (3 * torch.randn(6, 400)).to(dtype), torch.randint(400, (6,))
    losses, gradient = through_parts(logits, labels, 2)
    exact_losses, exact_gradient = in_float64(logits, labels)
    assert (losses.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-5, atol=1e-5)
    assert float((gradient.double() - exact_gradient).norm() / exact_gradient.norm()) < 5e-3


def test_rows_of_a_wider_buffer_and_blocks_of_minus_infinity() -> None:
    """Only the columns of the logits are read and written; a masked block has no weight."""
    torch.manual_seed(2)
    buffer = torch.full((4, 90), 77.0)
    logits = buffer[:, 3:67]
    logits.copy_(torch.randn(4, 64))
    logits[1, :63] = float("-inf")
    ids = torch.tensor([5, 63, -1, 64])
    before = logits.clone()
    statistics = ops.vocabulary_statistics(logits, ids)
    assert torch.equal(logits, before)
    assert torch.equal(statistics[0], before.amax(1))
    torch.testing.assert_close(statistics[1], (before - before.amax(1)[:, None]).exp().sum(1))
    expected = [float(before[0, 5]), float(before[1, 63]), float("-inf"), float("-inf")]
    assert statistics[2].tolist() == expected
    ops.vocabulary_gradient_(logits, ids, statistics[0], statistics[1])
    sums = logits.double().sum(1)
    torch.testing.assert_close(sums, torch.tensor([0.0, 0.0, 1.0, 1.0]).double(), atol=1e-5, rtol=0)
    assert bool((buffer[:, :3] == 77.0).all())
    assert bool((buffer[:, 67:] == 77.0).all())


def test_a_row_without_a_total_is_nan() -> None:
    logits, ids = torch.randn(2, 40), torch.tensor([3, 4])
    maximum, total, _ = ops.vocabulary_statistics(logits, ids)
    total[1] = float("nan")
    ops.vocabulary_gradient_(logits, ids, maximum, total)
    assert logits.isnan().any(dim=1).tolist() == [False, True]
    assert bool(logits[1].isnan().all())


@in_interpreter
def test_operators() -> None:
    """Schema and fake tensors of the registered operators, and the compiled form."""
    logits, ids = torch.randn(5, 30), torch.randint(-10, 40, (5,))
    operators = torch.ops.megaphi
    maximum, total, _ = ops.vocabulary_statistics(logits, ids)
    torch.library.opcheck(operators.vocabulary_statistics.default, (logits, ids))
    torch.library.opcheck(
        operators.vocabulary_gradient_.default, (logits.clone(), ids, maximum, total)
    )

    def both(logits: Tensor) -> tuple[Tensor, Tensor]:
        from kernels.vocabulary_parallel import vocabulary_gradient_, vocabulary_statistics

        logits = logits * 2
        statistics = vocabulary_statistics(logits, ids)
        vocabulary_gradient_(logits, ids, statistics[0], statistics[1])
        return statistics, logits

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(both(logits), compiled(logits), strict=True))


@with_triton
@pytest.mark.skipif(interpreting(), reason="the interpreter and the compiler share no process")
@pytest.mark.parametrize("capability", short_and_slow([90], [80, 100]))
@pytest.mark.parametrize(
    ("kernel", "pointers", "registers", "loads"),
    [
        ("statistics_kernel", {"statistics_ptr": "*fp32"}, 40, 2),
        ("gradient_kernel", {"maximum_ptr": "*fp32", "total_ptr": "*fp32"}, 40, 2),
    ],
)
def test_compiles_for(
    capability: int, kernel: str, pointers: dict[str, str], registers: int, loads: int
) -> None:
    """At a part of phi-1's vocabulary: three programs a multiprocessor, wide loads, no spills."""
    signature = {"logits_ptr": "*bf16", "ids_ptr": "*i64", **pointers}
    signature |= {"row_stride": "i32", "num_columns": "i32", "block": "constexpr"}
    needs = resources(
        "kernels.vocabulary_parallel",
        kernel,
        signature,
        {"block": 8192},
        capability=capability,
        num_warps=16,
    )
    assert needs.registers <= registers
    assert needs.spill_bytes == 0
    assert needs.vector_loads >= loads


@with_triton
@pytest.mark.skipif(interpreting(), reason="this is the child process")
def test_numerics_in_the_interpreter() -> None:
    """Runs the tests above through the kernels."""
    assert_passes_in_the_interpreter(
        [__file__, "-k", "not compiles_for and not numerics_in"], at_least=17
    )
