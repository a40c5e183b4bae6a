"""The FP8 casts: plain and Triton against a table of every FP8 value, and against each other.

The Triton numerics need its interpreter: `test_numerics_in_a_child` runs them in a process of its
own. The interpreter rounds to FP8 wrongly (it drops the carry into the exponent and NaN in e4m3),
so the tests give it PyTorch's conversion; on a GPU the hardware converts.
"""

import importlib.util

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import reference_fp8
from kernels.dispatch import interpreting
from tests.helpers import short_and_slow
from tests.kernels.compile_for_gpu import resources
from tests.kernels.interpreter import assert_passes_in_the_interpreter

if interpreting():
    import kernels.fp8_cast as triton_version

interpreted = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SHAPES = [(1, 1), (5, 7), (37, 100), (64, 128), (130, 272), (4, 2048)]


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter converts to FP8 as PyTorch does."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    formats = {tl.float8e4nv: E4M3, tl.float8e5: E5M2}
    original = interpreter._convert_float

    def convert(data: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
        if target not in formats:
            return original(data, source, target, mode)
        return torch.from_numpy(data).to(formats[target]).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def every_value(dtype: torch.dtype) -> Tensor:
    """All finite values of the format, ascending, from its bits (arXiv 2209.05433, table 1)."""
    mantissa_bits, bias = (3, 7) if dtype == E4M3 else (2, 15)
    values = []
    for code in range(127 if dtype == E4M3 else 124):  # what follows is NaN, or infinity and NaN
        exponent, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
        fraction = mantissa / 2**mantissa_bits
        values.append(
            (1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias)
        )
    positive = torch.tensor(values, dtype=torch.float64)
    return torch.cat([-positive[1:].flip(0), positive])


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of each element to the nearest value of the format."""
    values = every_value(dtype)
    above = torch.searchsorted(values, x.double()).clamp(1, len(values) - 1)
    return torch.minimum((values[above] - x).abs(), (values[above - 1] - x).abs())


def bits(x: Tensor) -> Tensor:
    """FP8 as bytes, which can be compared."""
    return x.view(torch.uint8)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_plain_cast_takes_the_nearest_value(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    limit = float(every_value(dtype)[-1])
    assert limit == torch.finfo(dtype).max
    x = torch.randn(64, 48).exp() * torch.randn(64, 48).sign()
    scale, inverse = reference_fp8.fp8_scale(x, dtype)
    assert float(scale) == pytest.approx(limit / float(x.abs().max()))
    assert float(scale * inverse) == pytest.approx(1)
    y = reference_fp8.fp8_cast(x, scale, dtype)
    exact = x.double() * scale.double()
    error = (y.double() - exact).abs()
    assert (error <= nearest(exact, dtype) + 1e-6 * exact.abs()).all()
    assert float(y.float().abs().max()) == limit


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_plain_cast_saturates_and_shows_what_is_not_finite(
    dtype: torch.dtype, value: float
) -> None:
    x = torch.tensor([[1e30, -1e30, value, 0.0]])
    y = reference_fp8.fp8_cast(x, torch.tensor(1e20), dtype).float()
    limit = torch.finfo(dtype).max
    assert y[0, :2].tolist() == [limit, -limit]
    assert y[0, 2].isnan()
    assert float(y[0, 3]) == 0
    assert [float(s) for s in reference_fp8.fp8_scale(x, dtype)] == [1, 1]
    assert [float(s) for s in reference_fp8.fp8_scale(torch.zeros(2, 2), dtype)] == [1, 1]


def test_plain_transpose_is_padded_with_zeros() -> None:
    torch.manual_seed(1)
    x = torch.randn(37, 24).bfloat16()
    scale = torch.tensor(3.0)
    rows, columns, amax = reference_fp8.fp8_cast_transpose(x, scale, E5M2)
    assert columns.shape == (24, 48)
    assert columns.is_contiguous()
    assert torch.equal(bits(columns)[:, :37], bits(rows).t())
    assert not columns[:, 37:].float().any()
    assert float(amax.max()) == float(x.abs().max())


@interpreted
@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_triton_equals_plain(
    shape: tuple[int, int],
    source: torch.dtype,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(2)
    x = (torch.randn(shape).exp() * torch.randn(shape).sign()).to(source)
    scale, inverse = reference_fp8.fp8_scale(x, dtype)
    expected = reference_fp8.fp8_cast_transpose(x, scale, dtype)
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        empty = new_empty(self, *args, **kwargs)
        empty.untyped_storage().fill_(0xFF)  # NaN in every format here
        return empty

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    ours = triton_version.fp8_cast_transpose(x, scale, dtype)
    our_rows = triton_version.fp8_cast(x, scale, dtype)
    our_scale, our_inverse = triton_version.fp8_scale(x, dtype)
    torch.testing.assert_close(our_scale, scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(our_inverse, inverse, rtol=1e-6, atol=0)
    assert torch.equal(bits(ours[0]), bits(expected[0]))
    assert torch.equal(bits(our_rows), bits(expected[0]))
    assert torch.equal(bits(ours[1]), bits(expected[1]))
    assert float(ours[2].max()) == float(expected[2].max())


@interpreted
@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_triton_saturates_and_shows_what_is_not_finite(dtype: torch.dtype, value: float) -> None:
    x = torch.zeros(70, 130)
    x[69, 129], x[3, 3], x[4, 4] = value, 1e30, -1e30
    rows, columns, amax = triton_version.fp8_cast_transpose(x, torch.tensor(1e20), dtype)
    expected = reference_fp8.fp8_cast(x, torch.tensor(1e20), dtype)
    for result in (rows.float(), columns.float()[:, :70].t()):
        torch.testing.assert_close(result, expected.float(), rtol=0, atol=0, equal_nan=True)
    assert rows.float().isnan().sum() == 1
    assert not amax.amax().isfinite()
    assert [float(s) for s in triton_version.fp8_scale(x, dtype)] == [1, 1]
    assert [float(s) for s in triton_version.fp8_scale(torch.zeros(3, 5), dtype)] == [1, 1]


@interpreted
@pytest.mark.usefixtures("rounding")
def test_triton_takes_strided_rows_and_no_rows() -> None:
    torch.manual_seed(3)
    scale = torch.tensor(10.0)
    for x in (torch.randn(20, 50)[:, 3:43], torch.randn(40, 20).t(), torch.ones(1).expand(9, 32)):
        ours = triton_version.fp8_cast_transpose(x, scale, E4M3)
        expected = reference_fp8.fp8_cast_transpose(x, scale, E4M3)
        assert torch.equal(bits(ours[0]), bits(expected[0]))
        assert torch.equal(bits(ours[1]), bits(expected[1]))
    rows, columns, amax = triton_version.fp8_cast_transpose(torch.randn(0, 16), scale, E4M3)
    assert (rows.shape, columns.shape, amax.shape) == ((0, 16), (16, 0), (0,))
    assert [float(s) for s in triton_version.fp8_scale(torch.randn(0, 16), E4M3)] == [1, 1]


@interpreted
def test_triton_refuses_what_it_cannot_do() -> None:
    x, scale = torch.randn(4, 16), torch.tensor(1.0)
    with pytest.raises(ValueError, match="float16 \\[n, k\\]"):
        triton_version.fp8_cast(x.double(), scale, E4M3)
    with pytest.raises(ValueError, match="float16 \\[n, k\\]"):
        triton_version.fp8_cast(x[None], scale, E4M3)
    with pytest.raises(ValueError, match="e5m2"):
        triton_version.fp8_cast(x, scale, torch.bfloat16)
    with pytest.raises(ValueError, match="scale"):
        triton_version.fp8_cast(x, scale.double(), E4M3)
    with pytest.raises(ValueError, match=r"8\.9 or higher.*NVIDIA A100 has 8\.0"):
        triton_version.refuse_old_device((8, 0), "NVIDIA A100")
    triton_version.refuse_old_device((8, 9), "NVIDIA L40S")


@interpreted
@pytest.mark.usefixtures("rounding")
def test_operator_registration_and_compile() -> None:
    x, scale = torch.randn(5, 16), torch.tensor(2.0)
    # opcheck compares outputs, which is not defined on FP8: schema and fake tensors only
    for name, arguments in (
        ("fp8_scale", (x, E4M3)),
        ("fp8_cast", (x, scale, E4M3)),
        ("fp8_cast_transpose", (x, scale, E5M2)),
    ):
        operator = getattr(torch.ops.megaphi, name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))

    def both(x: Tensor) -> tuple[Tensor, ...]:
        scale, inverse = triton_version.fp8_scale(x, E4M3)
        return (*triton_version.fp8_cast_transpose(x, scale, E4M3), inverse)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(x), both(x), strict=True):
        assert torch.equal(ours.float(), expected.float())


@needs_triton
def test_numerics_in_a_child() -> None:
    assert_passes_in_the_interpreter(
        [__file__, "-k", "triton or operator"], at_least=36 + 6 + 1 + 1 + 1
    )


def compile_cast(source: str, target: str, transpose: bool, capability: int) -> dict:
    """Arguments of `resources` for the cast kernel; the amax is found where it transposes."""
    pointers = {"x": source, "scale": "*fp32", "rows": target}
    constants = {"LIMIT": 448.0, "BLOCK_N": 64, "BLOCK_K": 128}
    if transpose:
        pointers |= {"columns": target, "partial_amax": "*fp32"}
    else:
        constants |= {"columns": None, "partial_amax": None}
    return {
        "module": "kernels.fp8_cast",
        "kernel": "cast_kernel",
        "signature": {
            **pointers,
            **dict.fromkeys(("x_stride", "n", "k", "padded_n"), "i32"),
            **dict.fromkeys(constants, "constexpr"),
        },
        "constants": constants,
        "capability": capability,
        "num_warps": 8,
    }


@needs_triton
@pytest.mark.parametrize("capability", short_and_slow([90], [89, 100]))
@pytest.mark.parametrize("target", ["*fp8e4nv", "*fp8e5"])
@pytest.mark.parametrize("transpose", [True, False])
def test_cast_compiled_ahead_of_time(target: str, transpose: bool, capability: int) -> None:
    found = resources(**compile_cast("*bf16", target, transpose, capability))
    assert found.spill_bytes == 0
    assert found.registers <= (104 if transpose else 48)
    assert found.vector_loads >= 4  # 64 x 128 elements of 2 bytes by 256 threads
    assert found.shared_bytes <= 16 * 1024


@needs_triton
@pytest.mark.parametrize("capability", short_and_slow([90], [89, 100]))
def test_scale_compiled_ahead_of_time(capability: int) -> None:
    constants = {"LIMIT": 448.0, "BLOCK": 4096}
    pointers = dict.fromkeys(("partial_amax", "scale", "inverse"), "*fp32")
    found = resources(
        "kernels.fp8_cast",
        "scale_kernel",
        {**pointers, "count": "i32", **dict.fromkeys(constants, "constexpr")},
        constants,
        capability=capability,
        num_warps=8,
    )
    assert found.spill_bytes == 0
    assert found.registers <= 64
    assert found.vector_loads >= 1


@needs_triton
def test_ampere_has_no_e4m3() -> None:
    """The compiler's own word for it, which `refuse_old_device` puts plainly."""
    with pytest.raises(AssertionError, match="fp8e4nv not supported"):
        resources(**compile_cast("*bf16", "*fp8e4nv", True, 80))
