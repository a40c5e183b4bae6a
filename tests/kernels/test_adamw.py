"""The AdamW and norm kernels against torch.optim.AdamW in float64, and what they compile to.

The numerics run in Triton's interpreter, in a child process that the last test starts.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import adamw, reference
from kernels.adamw import BLOCK, adamw_step_, sum_of_squares
from kernels.dispatch import interpreting
from tests.helpers import short_and_slow
from tests.kernels.compile_for_gpu import resources
from tests.kernels.interpreter import assert_passes_in_the_interpreter

interpreted = pytest.mark.skipif(not interpreting(), reason="runs in the child process")
NAN = float("nan")
RAGGED = [(7,), (0,), (1,), (3, 5), (BLOCK,), (0, 4), (BLOCK + 1,), (2 * BLOCK - 1,), (41, 53)]
OPTIONS = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}


def random_state(shapes: list[tuple[int, ...]]) -> list[list[Tensor]]:
    """Parameters, gradients, first and second moments."""
    parameters, gradients, first, second = (
        [torch.randn(shape) for shape in shapes] for _ in range(4)
    )
    return [parameters, gradients, first, [v.square() for v in second]]


def step_(state: list[list[Tensor]], step: float = 3.0, **overrides: Any) -> None:
    """One update by the kernel; overrides of scalars and options."""
    finite = torch.tensor(overrides.pop("finite", True))
    scale = torch.tensor(overrides.pop("scale", 1.0))
    options = {"weight_decay": 0.1, **OPTIONS, **overrides}
    adamw_step_(*state, torch.tensor(step), finite, scale, **options)


@interpreted
@pytest.mark.parametrize(
    ("decay", "scale", "betas"),
    [(0.0, 1.0, (0.9, 0.95)), (0.1, 1.0, (0.9, 0.999)), (0.1, 0.3, (0.0, 0.95))],
)
def test_equals_pytorchs_in_float64(decay: float, scale: float, betas: tuple[float, float]) -> None:
    torch.manual_seed(0)
    parameters = random_state(RAGGED)[0]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    theirs = [torch.nn.Parameter(p.double()) for p in parameters]
    optimizer = torch.optim.AdamW(theirs, lr=0.01, betas=betas, eps=1e-8, weight_decay=decay)
    for step in range(1, 6):
        gradients = [torch.randn_like(p) for p in parameters]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.double() * scale
        optimizer.step()
        step_(
            [parameters, gradients, first, second],
            float(step),
            scale=scale,
            weight_decay=decay,
            beta1=betas[0],
            beta2=betas[1],
        )
    for i, parameter in enumerate(theirs):
        torch.testing.assert_close(parameters[i].double(), parameter.detach(), rtol=1e-5, atol=1e-6)
        moments = optimizer.state[parameter]
        for ours, name in ((first[i], "exp_avg"), (second[i], "exp_avg_sq")):
            torch.testing.assert_close(ours.double(), moments[name], rtol=1e-5, atol=1e-6)


@interpreted
def test_equals_the_twin_late_in_a_run() -> None:
    torch.manual_seed(1)
    ours = random_state(RAGGED)
    twin = [[tensor.clone() for tensor in tensors] for tensors in ours]
    step_(ours, 30_000.0, scale=0.5)
    reference.adamw_step_(
        *twin,
        torch.tensor(30_000.0),
        torch.tensor(True),
        torch.tensor(0.5),
        **OPTIONS,
        weight_decay=0.1,
    )
    for k in (0, 2, 3):
        for a, b in zip(ours[k], twin[k], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@interpreted
def test_first_step_with_a_beta_near_one_keeps_its_digits() -> None:
    """The first update is lr in size whatever the gradient; 1 - beta2 in fp32 would miss it."""
    state = [[torch.zeros(9)], [torch.randn(9)], [torch.zeros(9)], [torch.zeros(9)]]
    step_(state, 1.0, beta2=0.9999, epsilon=1e-30)
    torch.testing.assert_close(state[0][0], -0.01 * state[1][0].sign(), rtol=1e-6, atol=0.0)


@interpreted
def test_a_non_finite_step_changes_no_bit() -> None:
    torch.manual_seed(2)
    state = random_state([(5,), (BLOCK + 3,)])
    state[1][0][1], state[1][1][0], state[1][1][-1] = NAN, math.inf, NAN
    before = [[tensor.clone() for tensor in tensors] for tensors in state]
    step_(state, finite=False, scale=NAN)
    step_(state, NAN, finite=False)
    for k in (0, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(state[k], before[k], strict=True))


@interpreted
@pytest.mark.parametrize("offset", [1, 4])
def test_slices_of_a_buffer_leave_their_neighbours(offset: int) -> None:
    """Tensors at addresses that are, or are not, multiples of 16 bytes, with guards around."""
    torch.manual_seed(3)
    size = BLOCK + 5
    buffers = [torch.full((size + 12,), NAN) for _ in range(4)]
    slices = [buffer[offset : offset + size] for buffer in buffers]
    for part in slices:
        part.copy_(torch.rand(size))
    assert (slices[0].data_ptr() % 16 == 0) is (offset == 4)
    assert adamw.addresses_of(slices).aligned is (offset == 4)
    twin = [[part.clone()] for part in slices]
    step_([[part] for part in slices])
    step_(twin)
    squares = sum_of_squares(slices[:1])
    for buffer, part, (other,) in zip(buffers, slices, twin, strict=True):
        assert torch.equal(part, other)
        assert bool(buffer[:offset].isnan().all())
        assert bool(buffer[offset + size :].isnan().all())
    assert squares.item() == pytest.approx(float(slices[0].double().square().sum()), rel=1e-6)


@interpreted
def test_gradients_may_move_between_steps() -> None:
    """Tables follow the addresses: a tensor at a new place is never taken for an old one."""
    torch.manual_seed(4)
    state = random_state([(33,), (6,)])
    twin = [[tensor.clone() for tensor in tensors] for tensors in state]
    kept = []
    for step in range(1, 4):
        gradients = [torch.randn(33), torch.randn(6)]
        kept.append(gradients)  # their memory is not used again
        step_([state[0], gradients, *state[2:]], float(step))
        reference.adamw_step_(
            twin[0],
            [gradient.clone() for gradient in gradients],
            *twin[2:],
            torch.tensor(float(step)),
            torch.tensor(True),
            torch.tensor(1.0),
            **OPTIONS,
            weight_decay=0.1,
        )
    for ours, other in zip(state[0], twin[0], strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)


def test_caches_are_bounded_and_keep_what_is_used() -> None:
    cache = adamw.Cache(2)
    made = []

    def get(key: str) -> str:
        def make() -> str:
            made.append(key)
            return key.upper()

        return cache.get(key, make)

    assert [get(key) for key in "ababcaab"] == list("ABABCAAB")
    assert made == ["a", "b", "c", "a", "b"]
    assert len(cache.values) == 2


def test_block_tables_reach_beyond_32_bits() -> None:
    """A parameter of 2^33 elements, followed by an empty one and a small one."""
    blocks = adamw.make_blocks((2**33, 0, 5), torch.device("cpu"))
    whole = 2**33 // BLOCK
    assert blocks.count == whole + 1
    assert blocks.first.tolist() == [0, whole, whole]
    assert blocks.owner[[0, whole - 1, whole]].tolist() == [0, 0, 2]
    assert blocks.sizes.dtype == torch.int64
    assert blocks.first.dtype == torch.int64


@interpreted
def test_empty_lists_and_empty_tensors() -> None:
    step_([[], [], [], []])
    empty = [torch.zeros(0)]
    step_([empty, empty, empty, empty])
    assert sum_of_squares(empty).item() == 0.0
    with pytest.raises(ValueError, match="no tensors"):
        sum_of_squares([])


@interpreted
def test_what_does_not_fit_is_refused() -> None:
    def state() -> list[list[Tensor]]:
        return [[torch.zeros(4, 4)] for _ in range(4)]

    for place in (0, 2, 3):
        for wrong in (torch.zeros(4, 4).t()[:2], torch.zeros(4, 4).double(), torch.zeros(17)):
            lists = state()
            lists[place] = [wrong.t() if wrong.dim() == 1 else wrong]
            with pytest.raises(ValueError, match="must"):
                step_(lists)
    lists = state()
    lists[1] = [torch.arange(16.0).view(4, 4).t()]  # a gradient of another layout is copied
    step_(lists, 1.0)
    assert torch.equal(lists[2][0], (0.1 * lists[1][0]).contiguous())


@interpreted
def test_sum_of_squares_equals_float64_and_repeats() -> None:
    torch.manual_seed(5)
    tensors = [torch.randn(shape) for shape in RAGGED]
    expected = sum(float(t.double().square().sum()) for t in tensors)
    total = sum_of_squares(tensors)
    assert total.dtype == torch.float32
    assert total.shape == ()
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(total, sum_of_squares([t.clone() for t in tensors]))
    assert total.item() == pytest.approx(reference.sum_of_squares(tensors).item(), rel=1e-6)
    for value in (NAN, math.inf):
        tensors[7][-1] = value
        assert not bool(torch.isfinite(sum_of_squares(tensors)))


@interpreted
def test_autograd_sees_the_update() -> None:
    """A parameter kept for a backward pass and then updated is an error, not a wrong gradient."""
    parameter = torch.ones(3, requires_grad=True)
    loss = parameter.square().sum()
    rest = [[torch.ones(3)] for _ in range(3)]
    step_([[parameter], *rest])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@interpreted
def test_operators_are_well_formed() -> None:
    state = random_state([(5,), (2, 3)])
    scalars = (torch.tensor(2.0), torch.tensor(True), torch.tensor(0.5))
    operators = torch.ops.megaphi
    torch.library.opcheck(operators.adamw_step_.default, (*state, *scalars, *OPTIONS.values(), 0.1))
    torch.library.opcheck(operators.sum_of_squares.default, (state[1],))


@interpreted
def test_compiled_equals_eager() -> None:
    torch.manual_seed(6)
    state = random_state([(5,), (2, 3)])
    twin = [[tensor.clone() for tensor in tensors] for tensors in state]

    def update(lists: list[list[Tensor]], step: Tensor, finite: Tensor) -> Tensor:
        squares = sum_of_squares(lists[1])
        adamw_step_(*lists, step, finite, 1.0 / squares.sqrt(), **OPTIONS, weight_decay=0.1)
        return squares

    scalars = (torch.tensor(2.0), torch.tensor(True))
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(state, *scalars), update(twin, *scalars))
    for tensors, others in zip(state, twin, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


TABLES = ("first", "size", "parameter", "gradient", "first_moment", "second_moment")
SCALARS = ("learning_rate", "decay_rate", "beta1", "beta2", "rest1", "rest2", "epsilon")
SIGNATURES = {
    "adamw_kernel": {
        "owner_table_ptr": "*i32",
        **{f"{name}_table_ptr": "*i64" for name in TABLES},
        "finite_ptr": "*u8",
        "gradient_scale_ptr": "*fp32",
        "corrections_ptr": "*fp32",
        **dict.fromkeys(SCALARS, "fp32"),
    },
    "sum_of_squares_kernel": {
        "owner_table_ptr": "*i32",
        **{f"{name}_table_ptr": "*i64" for name in ("first", "size", "address")},
        "partial_sums_ptr": "*fp32",
    },
}


@pytest.mark.skipif(interpreting(), reason="the interpreter and the compiler share no process")
@pytest.mark.parametrize("capability", short_and_slow([90], [80, 100]))
@pytest.mark.parametrize(
    ("kernel", "aligned", "registers", "loads"),
    [
        ("adamw_kernel", True, 42, 8),
        ("adamw_kernel", False, 64, 0),
        ("sum_of_squares_kernel", True, 24, 2),
    ],
)
def test_compiles_for(
    capability: int, kernel: str, aligned: bool, registers: int, loads: int
) -> None:
    """Wide loads although the addresses come out of a table."""
    needs = resources(
        "kernels.adamw",
        kernel,
        {**SIGNATURES[kernel], "aligned": "constexpr", "block": "constexpr"},
        {"aligned": aligned, "block": BLOCK},
        capability=capability,
        num_warps=adamw.NUM_WARPS,
    )
    assert needs.registers <= registers
    assert needs.spill_bytes == 0
    assert needs.vector_loads >= loads


@pytest.mark.skipif(interpreting(), reason="this is the child process")
def test_numerics_in_the_interpreter() -> None:
    """Runs the tests above that need the interpreter."""
    assert_passes_in_the_interpreter(
        [__file__, "-k", "not compiles_for and not numerics_in"], at_least=17
    )
