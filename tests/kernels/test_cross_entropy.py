"""The cross-entropy kernel against float64 formulas and its plain twin, and what it compiles to.

The numerics run in Triton's interpreter, in a child process that the last test starts.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import reference, softmax
from kernels.cross_entropy import cross_entropy_, linear_cross_entropy
from kernels.dispatch import interpreting
from kernels.matmul import HAS_FP32_OUTPUT
from tests.helpers import short_and_slow
from tests.kernels.compile_for_gpu import resources
from tests.kernels.interpreter import assert_passes_in_the_interpreter

interpreted = pytest.mark.skipif(not interpreting(), reason="runs in the child process")
NAN = float("nan")


def random_head(
    rows: int, hidden: int, vocab: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """Hidden states, weight and bias that want gradients, and labels."""
    shapes = [(rows, hidden), (vocab, hidden), (vocab,)]
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    return tensors, torch.randint(0, vocab, (rows,))


def doubles_of(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def loss_in_float64(doubles: list[Tensor], labels: Tensor) -> Tensor:
    x, weight, bias = doubles
    log_probabilities = torch.log_softmax(x @ weight.T + bias, dim=-1)
    return -log_probabilities.gather(1, labels[:, None]).sum()


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


@interpreted
@pytest.mark.parametrize(
    ("rows", "hidden", "vocab", "chunk_rows"),
    [
        (1, 6, 23, None),
        (5, 6, 23, 2),
        (37, 16, 1000, 8),
        (5, 32, 51200, 3),
    ],
)
def test_equals_float64(rows: int, hidden: int, vocab: int, chunk_rows: int | None) -> None:
    torch.manual_seed(rows)
    tensors, labels = random_head(rows, hidden, vocab)
    doubles = doubles_of(tensors)
    loss = linear_cross_entropy(*tensors, labels, chunk_rows)
    expected = loss_in_float64(doubles, labels)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (loss * 0.37).backward()
    (expected * 0.37).backward()
    for tensor, double in zip(tensors, doubles, strict=True):
        assert relative_error(tensor.grad, double.grad) < 1e-5
        torch.testing.assert_close(tensor.grad.double(), double.grad, rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab"), [(37, 1000), (5, 51200)])
def test_narrow_types_equal_the_twin(dtype: torch.dtype, rows: int, vocab: int) -> None:
    torch.manual_seed(1)
    tensors, labels = random_head(rows, 16, vocab, dtype)
    twins = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    loss = linear_cross_entropy(*tensors, labels, chunk_rows=16)
    expected = reference.linear_cross_entropy(*twins, labels, chunk_rows=16)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (loss / rows).backward()
    (expected / rows).backward()
    for tensor, twin in zip(tensors, twins, strict=True):
        assert tensor.grad.dtype == dtype
        assert relative_error(tensor.grad, twin.grad) < 1e-2  # the interpreter truncates bf16


def softmax_minus_onehot(logits: Tensor, labels: Tensor) -> Tensor:
    gradient = torch.softmax(logits.double(), dim=-1)
    gradient[torch.arange(len(labels)), labels] -= 1.0
    return gradient


@interpreted
@pytest.mark.parametrize("vocab", [1, 23, 8192, 8193])
def test_in_place_rows_of_a_wider_buffer(vocab: int) -> None:
    """Neither the padding of a row nor the rows around it are touched; fp32 and bf16."""
    torch.manual_seed(vocab)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        buffer = torch.full((7, vocab + 9), NAN, dtype=dtype)
        logits = buffer[1:6, :vocab]
        logits.copy_(torch.randn(5, vocab) * 3)
        labels = torch.randint(0, vocab, (5,))
        expected = softmax_minus_onehot(logits, labels)
        losses = torch.full((5,), NAN)
        cross_entropy_(logits, labels, losses, with_gradient=True)
        torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance / 8)
        assert bool(torch.isfinite(losses).all())
        assert bool(buffer[:, vocab:].isnan().all())
        assert bool(buffer[[0, 6]].isnan().all())


@interpreted
def test_large_and_infinite_logits() -> None:
    logits = torch.randn(4, 9000)
    logits[0] *= 1e4
    logits[1, :8500] = float("-inf")  # a whole block without a finite logit
    logits[2] += 3e38
    logits[3] -= 1e5
    labels = torch.tensor([7, 8700, 0, 8999])
    expected_losses = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    expected = softmax_minus_onehot(logits, labels)
    losses = torch.full((4,), NAN)
    cross_entropy_(logits, labels, losses, with_gradient=True)
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-6)


@interpreted
def test_target_is_rounded_once() -> None:
    """At a probability of 0.9995 bf16 would round to 1, and the gradient to 0."""
    logits = torch.zeros(1, 64, dtype=torch.bfloat16)
    logits[0, 5] = 11.75
    expected = float(torch.softmax(logits.double(), dim=-1)[0, 5] - 1.0)
    cross_entropy_(logits, torch.tensor([5]), torch.empty(1), with_gradient=True)
    assert -6e-4 < expected < -4e-4
    assert float(logits[0, 5]) == pytest.approx(expected, rel=2**-7)


@interpreted
@pytest.mark.parametrize("label", [-1, -100, 23, 10**6, 2**40, -(2**62)])
def test_label_out_of_range_is_nan_and_stays_in_bounds(label: int) -> None:
    buffer = torch.full((5, 23), 77.0)
    logits = buffer[1:4]
    logits.copy_(torch.randn(3, 23))
    labels = torch.tensor([3, label, 22])
    expected = softmax_minus_onehot(logits[[0, 2]], labels[[0, 2]])
    losses = torch.zeros(3)
    cross_entropy_(logits, labels, losses, with_gradient=True)
    assert losses.isnan().tolist() == [False, True, False]
    assert bool(logits[1].isnan().all())
    torch.testing.assert_close(logits[[0, 2]].double(), expected, rtol=1e-5, atol=1e-6)
    assert bool((buffer[[0, 4]] == 77.0).all())
    tensors, _ = random_head(3, 4, 23)
    assert bool(linear_cross_entropy(*tensors, labels).isnan())


@interpreted
def test_without_gradients_logits_stay() -> None:
    torch.manual_seed(2)
    tensors, labels = random_head(5, 8, 1000)
    with torch.no_grad():
        loss = linear_cross_entropy(*tensors, labels, 2)
    assert not loss.requires_grad
    assert torch.equal(loss, linear_cross_entropy(*tensors, labels, 2))
    logits, losses = torch.randn(5, 1000), torch.full((5,), NAN)
    before = logits.clone()
    cross_entropy_(logits, labels, losses, with_gradient=False)
    assert torch.equal(logits, before)
    expected = torch.nn.functional.cross_entropy(before.double(), labels, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)


@interpreted
def test_layouts_partial_gradients_and_no_rows() -> None:
    torch.manual_seed(3)
    (x, weight, bias), labels = random_head(6, 4, 23)
    strided = torch.randn(4, 12).t()[::2].detach().requires_grad_()
    both = torch.stack((labels, labels + 99), dim=1)
    double = strided.detach().double().requires_grad_()
    loss = linear_cross_entropy(strided, weight.detach(), bias.detach(), both[:, 0], 4)
    expected = loss_in_float64([double, weight.detach().double(), bias.detach().double()], labels)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(strided.grad.double(), double.grad, rtol=1e-4, atol=1e-6)
    nothing = linear_cross_entropy(x[:0], weight, bias, labels[:0])
    nothing.backward()
    assert nothing.item() == 0.0
    assert bool((weight.grad == 0).all())


@interpreted
def test_same_bits_every_time_and_backward_twice() -> None:
    torch.manual_seed(4)
    tensors, labels = random_head(9, 8, 1000)
    results = []
    for _ in range(2):
        loss = linear_cross_entropy(*tensors, labels, 4)
        first = torch.autograd.grad(loss, tensors, retain_graph=True)
        second = torch.autograd.grad(loss, tensors)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        results.append((loss, *first))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@interpreted
def test_operator_is_well_formed() -> None:
    tensors, labels = random_head(3, 4, 23)
    arguments = (*tensors, labels, 2)
    operator = torch.ops.megaphi.linear_cross_entropy.default
    torch.library.opcheck(operator, (*arguments, True))
    torch.library.opcheck(operator, (*(t.detach() for t in tensors), labels, 2, False))


@interpreted
@pytest.mark.parametrize("trained", [True, False])
def test_compiled_equals_eager(trained: bool) -> None:
    torch.manual_seed(5)
    tensors, labels = random_head(5, 4, 23)
    if not trained:
        tensors = [tensor.detach() for tensor in tensors]

    def scaled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(x * 2, weight, bias, labels, 2) * 0.5

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(*tensors), scaled(*tensors)
    assert torch.equal(ours, expected)
    assert ours.requires_grad is trained
    if trained:
        gradients = torch.autograd.grad(ours, tensors)
        for gradient, other in zip(gradients, torch.autograd.grad(expected, tensors), strict=True):
            assert torch.equal(gradient, other)


def test_fp32_accumulation_of_narrow_products_has_this_signature() -> None:
    """Only a CUDA build can run it; the operator's schema has the arguments of the call."""
    assert HAS_FP32_OUTPUT
    names = [argument.name for argument in torch.ops.aten.addmm.dtype_out._schema.arguments]
    assert names[:4] == ["self", "mat1", "mat2", "out_dtype"]
    assert names[-1] == "out"


@pytest.mark.skipif(interpreting(), reason="the interpreter and the compiler share no process")
@pytest.mark.parametrize("capability", short_and_slow([90], [80, 100]))
@pytest.mark.parametrize(("gradient", "registers", "loads"), [(True, 40, 4), (False, 40, 2)])
def test_compiles_for(capability: int, gradient: bool, registers: int, loads: int) -> None:
    """At phi-1's vocabulary: three programs of 16 warps share a multiprocessor, wide loads."""
    needs = resources(
        "kernels.cross_entropy",
        "cross_entropy_kernel",
        {
            "logits_ptr": "*bf16",
            "labels_ptr": "*i64",
            "losses_ptr": "*fp32",
            "row_stride": "i32",
            "vocab_size": "i32",
            "with_gradient": "constexpr",
            "block": "constexpr",
        },
        {"with_gradient": gradient, "block": softmax.BLOCK},
        capability=capability,
        num_warps=softmax.NUM_WARPS,
    )
    assert needs.registers <= registers
    assert needs.spill_bytes == 0
    assert needs.vector_loads >= loads


@pytest.mark.skipif(interpreting(), reason="this is the child process")
def test_numerics_in_the_interpreter() -> None:
    """Runs the tests above that need the interpreter."""
    assert_passes_in_the_interpreter(
        [__file__, "-k", "not compiles_for and not numerics_in"], at_least=25
    )
