"""FP8 layers on the CPU: their products against float64, what they cast, and a training run.

`torch._scaled_mm` computes on a CPU what it computes on a GPU, but checks nothing; so the layouts
that a GPU needs are asserted by the code under test, and each assertion is met here.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels import ops
from megaphi.config import Model, Parallel, Precision
from megaphi.model.execution import Execution
from megaphi.model.init import initialize
from megaphi.model.linear import Linear
from megaphi.model.phi import Phi
from megaphi.parallel.mesh import Mesh, processes
from megaphi.precision.fp8 import Fp8Linear, NativeFp8, scaled_product
from megaphi.precision.fp8_choice import fp8_layers
from megaphi.precision.policy import DeviceFacts, resolve
from megaphi.precision.scaling import E4M3, E5M2, GRADIENT, INPUT
from megaphi.training.parallelize import parallelize, release_gathered_weights, send_gradients

TOLERANCE = {"forward": 0.045, "grad_x": 0.07, "grad_weight": 0.07}
"""Relative errors. Rounding to m bits of mantissa is off by 2^-m / sqrt(12) in the mean square,
relative to the numbers about 0.72 of that: 0.026 for e4m3 and 0.052 for e5m2. Both factors
together: 0.037 forward and 0.058 backward, and few rows spread around that."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def fp8_layer(shared: NativeFp8, inputs: int, outputs: int, dtype: torch.dtype) -> Fp8Linear:
    layer = shared.make("fc1", inputs, outputs).to(dtype)
    assert isinstance(layer, Fp8Linear)
    with torch.no_grad():
        layer.weight.normal_(0, 0.02)
        layer.bias.normal_(0, 0.05)
    shared.attach(layer, torch.device("cpu"))
    return layer


def errors(layer: Fp8Linear, x: Tensor, upstream: Tensor) -> dict[str, float]:
    """Relative error of the three products and of the bias's gradient, against float64."""
    x = x.clone().requires_grad_()
    y = layer(x)
    assert y.dtype == x.dtype
    y.backward(upstream)
    weight, bias = (p.detach().double() for p in (layer.weight, layer.bias))
    rows, rows_up = x.detach().double().flatten(0, -2), upstream.double().flatten(0, -2)
    return {
        "forward": relative_error(y.detach(), x.detach().double() @ weight.t() + bias),
        "product": relative_error(layer.product(x).detach(), x.detach().double() @ weight.t()),
        "grad_x": relative_error(x.grad, upstream.double() @ weight),
        "grad_weight": relative_error(layer.weight.grad, rows_up.t() @ rows),
        "grad_bias": relative_error(layer.bias.grad, rows_up.sum(0)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", ["current", "delayed"])
# 16 rows, none of the sizes alike; rows that are not a multiple of 16
@pytest.mark.parametrize("leading", [(16,), (2, 64), (3, 7), (1,)])
def test_products_against_float64(
    leading: tuple[int, ...], scaling: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    shared = NativeFp8(["fc1"], scaling)
    layer = fp8_layer(shared, 96, 144, dtype)
    for _ in range(2):  # the second time with the scales of the first
        layer.weight.grad = layer.bias.grad = None
        x, upstream = torch.randn(*leading, 96, dtype=dtype), torch.randn(*leading, 144) * 1e-6
        found = errors(layer, x, upstream.to(dtype))
        assert found["grad_bias"] < 0.01
        assert found["product"] < TOLERANCE["forward"]
        for name, limit in TOLERANCE.items():
            # and not better than FP8 can be: the products really ran in it
            assert 0.02 < found[name] < limit, name
        shared.after_step(None)


def test_outliers_cost_only_what_they_push_out_of_range() -> None:
    """One value 1,000 times the others: e4m3 still holds the rest, as its range is 2^18."""
    torch.manual_seed(1)
    layer = fp8_layer(NativeFp8(["fc1"]), 64, 64, torch.float32)
    x, upstream = torch.randn(64, 64), torch.randn(64, 64)
    x[5, 9], upstream[7, 3] = 4000.0, -4000.0
    found = errors(layer, x, upstream)
    assert found["forward"] < 0.05
    assert found["grad_x"] < 0.08
    assert found["grad_weight"] < 0.08


def test_delayed_scaling_saturates_for_a_step_where_current_does_not() -> None:
    torch.manual_seed(2)
    found = {}
    for scaling in ("current", "delayed"):
        shared = NativeFp8(["fc1"], scaling)
        layer = fp8_layer(shared, 64, 64, torch.float32)
        for size in (1.0, 100.0, 100.0):
            with torch.no_grad():
                layer.weight.copy_(torch.eye(64))
                layer.bias.zero_()
            x = size * torch.randn(64, 64)
            found[scaling, size] = relative_error(layer(x).detach(), x.double())
            shared.after_step(None)
            found.setdefault((scaling, f"first {size}"), found[scaling, size])
    assert found["current", "first 100.0"] < 0.04
    assert found["delayed", "first 1.0"] < 0.04  # nothing recorded yet: current
    assert found["delayed", "first 100.0"] > 0.5  # clamped to the largest of the first step
    assert found["delayed", 100.0] < 0.04  # and right again


@pytest.mark.parametrize("length", [1, 3])
def test_delayed_scaling_takes_the_largest_of_its_history(length: int) -> None:
    shared = NativeFp8(["fc1"], "delayed", history_length=length)
    layer = fp8_layer(shared, 32, 32, torch.float32)
    largest = [4.0, 1.0, 2.0, 0.5, 0.25]
    for step, value in enumerate(largest):
        for part in (0.5, 1.0, 0.75):  # three micro-batches
            x = torch.full((16, 32), value * part, requires_grad=True)
            layer(x).backward(torch.full((16, 32), value * part / 8))
        shared.after_step(None)
        assert shared.delayed is not None
        seen = max(largest[max(0, step + 1 - length) : step + 1])
        for which, limit, amax in ((INPUT, 448.0, seen), (GRADIENT, 57344.0, seen / 8)):
            scale, inverse = shared.delayed.scales[0][which]
            assert float(scale) == pytest.approx(limit / amax)
            assert float(inverse) == pytest.approx(amax / limit)


def test_delayed_scaling_takes_the_largest_of_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = NativeFp8(["fc1"], "delayed")
    layer = fp8_layer(shared, 32, 32, torch.float32)
    layer(torch.full((16, 32), 2.0)).sum().backward()
    group, other = object(), torch.tensor([[8.0, 0.25]])

    def all_reduce(tensor: Tensor, op: object, group: object) -> None:
        calls.append((op, group))
        torch.maximum(tensor, other, out=tensor)

    calls: list[tuple[object, object]] = []
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    shared.after_step(group)
    assert calls == [(dist.ReduceOp.MAX, group)]
    (history,) = shared.state_tensors().values()
    assert history[0, :, 0].tolist() == [8.0, 1.0]
    assert history[..., 1:].count_nonzero() == 0


def test_not_finite_values_show_and_do_not_stay_in_the_history() -> None:
    for scaling in ("current", "delayed"):
        shared = NativeFp8(["fc1"], scaling)
        layer = fp8_layer(shared, 32, 32, torch.float32)
        for bad in (float("nan"), float("inf"), -float("inf"), 0.0):
            x = torch.randn(16, 32)
            x[3, 4] = bad
            layer.weight.grad = None
            x.requires_grad_()
            y = layer(x)
            y.sum().backward()
            rows = y.detach().isfinite().all(dim=1).tolist()
            assert rows == [bad == 0.0 or row != 3 for row in range(16)]
            assert layer.weight.grad is not None
            assert layer.weight.grad.isfinite().all() == (bad == 0.0)
            shared.after_step(None)
            assert all(history.isfinite().all() for history in shared.state_tensors().values())
        with torch.no_grad():
            layer.weight[0, 0] = float("inf")
            assert not layer(torch.randn(16, 32)).isfinite().any(dim=0)[0]


def matrices(a: torch.dtype = E4M3, b: torch.dtype = E4M3) -> dict[str, Tensor]:
    """Arguments that a GPU would take: A [8, 32], B [32, 48]."""
    return {
        "a_nk": torch.randn(8, 32).to(a),
        "b_km": torch.randn(48, 32).to(b).t(),
        "inverse_a": torch.tensor(2.0),
        "inverse_b": torch.tensor(0.5),
    }


def test_scaled_product_takes_what_a_gpu_takes() -> None:
    for first, second in ((E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)):
        for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
            arguments, bias = matrices(first, second), torch.randn(48).to(out_dtype)
            ours = scaled_product(**arguments, out_dtype=out_dtype, fast=True, bias=bias)
            exact = arguments["a_nk"].double() @ arguments["b_km"].double() + bias.double()
            assert ours.dtype == out_dtype
            assert relative_error(ours, exact) < 0.01


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a_nk": torch.randn(8, 32)}, "not FP8"),
        ({"a_nk": torch.randn(32, 8).to(E4M3).t()}, "row-major"),
        ({"b_km": torch.randn(32, 48).to(E4M3)}, "column-major"),
        ({"b_km": torch.randn(40, 32).to(E4M3).t()}, "40 is not a multiple"),
        (
            {"a_nk": torch.randn(8, 24).to(E4M3), "b_km": torch.randn(48, 24).to(E4M3).t()},
            "24 is not a multiple",
        ),
        ({"b_km": torch.randn(48, 16).to(E4M3).t()}, "do not fit"),
        ({"a_nk": torch.randn(1, 8, 32).to(E4M3)}, "not matrices"),
        ({"inverse_a": torch.tensor(2.0, dtype=torch.float64)}, "not fp32"),
        ({"inverse_b": torch.ones(48)}, "not one number"),
        ({"inverse_b": torch.ones((), device="meta")}, "on meta"),
        ({"out_dtype": torch.float64}, "result of"),
        (matrices(E5M2, E5M2), "two e5m2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scaled_product_refuses_what_a_gpu_refuses(changed: dict, message: str) -> None:
    arguments = {**matrices(), "out_dtype": torch.float32, "fast": False, **changed}
    with pytest.raises(AssertionError, match=message):
        scaled_product(**arguments)


def test_only_the_named_layers_and_only_sizes_that_fit() -> None:
    facts = DeviceFacts(name="NVIDIA H200", capability=(9, 0), cuda=(12, 8))
    precision = Precision(dtype="fp8", fp8_layers=["qkv", "fc1"])
    fp8 = fp8_layers(resolve(precision, facts), precision)
    assert isinstance(fp8, NativeFp8)
    model = Phi(SHAPE, Execution(make=fp8.make))
    for block in model.blocks:
        kinds = [type(getattr(block, name)) for name in ("qkv", "out", "fc1", "fc2")]
        assert kinds == [Fp8Linear, Linear, Fp8Linear, Linear]
    assert model.state_dict().keys() == Phi(SHAPE).state_dict().keys()
    with pytest.raises(ValueError, match=r"fc1 is 40 x 160.*precision\.fp8_layers"):
        fp8.make("fc1", 40, 160)
    bf16 = Precision(dtype="bf16")
    assert fp8_layers(resolve(bf16, facts), bf16) is None


def test_between_forward_and_backward_only_fp8_is_kept() -> None:
    layer = fp8_layer(NativeFp8(["fc1"]), 64, 128, torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True))
    assert [t.dtype for t in kept if t.numel() > 1] == [E4M3, E4M3]


def test_delayed_scaling_must_be_attached() -> None:
    layer = NativeFp8(["fc1"], "delayed").make("fc1", 16, 16)
    with pytest.raises(AssertionError, match="attach"):
        layer(torch.randn(16, 16))


@pytest.fixture
def weight_casts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the tensors that are cast in both layouts, in order."""
    shapes: list[tuple[int, ...]] = []
    cast = ops.fp8_cast_transpose

    def counting(x_nk: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        shapes.append(tuple(x_nk.shape))
        return cast(x_nk, scale, dtype)

    monkeypatch.setattr(ops, "fp8_cast_transpose", counting)
    return shapes


def test_weights_are_cast_once_a_step(weight_casts: list[tuple[int, ...]]) -> None:
    torch.manual_seed(3)
    shared = NativeFp8(["fc1"])
    layer = fp8_layer(shared, 32, 48, torch.float32)
    x = torch.eye(32)

    def count() -> int:
        """Weight casts so far, after checking that the present weight is the one in use."""
        for _ in range(3):
            torch.testing.assert_close(
                layer.product(x).detach(), layer.weight.detach().t(), rtol=0.07, atol=1e-3
            )
        return weight_casts.count((48, 32))

    assert count() == 1
    with torch.no_grad():
        assert count() == 1  # an evaluation
        layer.weight.mul_(-2)  # in place, as an optimizer without shards does
    assert count() == 2
    shared.after_step(None)
    assert count() == 3
    layer.load_state_dict({"weight": torch.randn(48, 32), "bias": torch.zeros(48)})
    assert count() == 4
    layer.weight = nn.Parameter(torch.randn(48, 32))
    assert count() == 5


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mesh]:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with processes() as joined:
        yield joined


SHAPE = Model(num_layers=2, hidden_size=64, num_heads=2, vocab_size=64, max_sequence_length=32)


@pytest.mark.parametrize("reshard", [False, True])
def test_under_fsdp2(mesh: Mesh, weight_casts: list[tuple[int, ...]], reshard: bool) -> None:
    """Gathered weights, which FSDP2 writes unseen by autograd, are never used a step too late."""
    torch.manual_seed(4)
    shared = NativeFp8(["fc1"])
    model, plain = Phi(SHAPE, Execution(make=shared.make)), Phi(SHAPE)
    initialize(plain.named_parameters(), SHAPE, seed=0)
    parallel = Parallel(reshard_after_forward=reshard)
    parallelize(model, mesh, parallel, torch.bfloat16)
    initialize(model.named_parameters(), SHAPE, seed=0)
    shared.attach(model, mesh.device)
    sharded = dict(model.named_parameters())
    tokens = torch.randint(0, 64, (2, 16))
    for step in range(3):
        casts = []
        weight_casts.clear()
        for micro_batch in range(3):
            send_gradients(model, micro_batch == 2, parallel)
            model(tokens, tokens).backward()
            casts.append(weight_casts.count((256, 64)))
        assert casts[0] == SHAPE.num_layers
        if not reshard:  # else the weights are gathered anew, and may lie elsewhere
            assert casts == casts[:1] * 3
        layer, exact = model.blocks[0].fc1, plain.blocks[0].fc1.weight.detach()
        used = layer.weight_cast.rows.float() * layer.weight_cast.inverse
        assert relative_error(used, exact.double()) < 0.04, step
        assert sharded["blocks.0.fc1.weight"].grad.to_local().dtype == torch.float32
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.mul_(-1.5)
                sharded[name].to_local().copy_(parameter)  # type: ignore[attr-defined]
                sharded[name].grad = None
        shared.after_step(None)
        release_gathered_weights(model)
        if step == 1:  # an evaluation between two steps, which may leave its casts to the next
            with torch.no_grad():
                loss, expected = model(tokens, tokens), plain(tokens, tokens)
            torch.testing.assert_close(float(loss), float(expected), rtol=0.02, atol=0)
            release_gathered_weights(model)
            shared.weights_changed()


def batches(steps: int) -> list[Tensor]:
    """Sequences that count upwards by three from a random start."""
    generator = torch.Generator().manual_seed(5)
    starts = [torch.randint(0, 64, (16, 1), generator=generator) for _ in range(steps)]
    return [(start + 3 * torch.arange(17)) % 64 for start in starts]


def train(model: Phi, shared: NativeFp8 | None, tokens: list[Tensor]) -> list[float]:
    """Losses of plain Adam, two micro-batches a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for batch in tokens:
        total = 0.0
        for part in batch.chunk(2):
            loss = model(part[:, :-1], part[:, 1:].contiguous()) / (16 * 16)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        if shared is not None:
            shared.after_step(None)
        losses.append(total)
    return losses


@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_a_run_follows_fp32(scaling: str) -> None:
    plain = Phi(SHAPE)
    initialize(plain.named_parameters(), SHAPE, seed=1)
    shared = NativeFp8(["qkv", "out", "fc1", "fc2"], scaling)
    model = Phi(SHAPE, Execution(make=shared.make))
    model.load_state_dict(plain.state_dict())
    shared.attach(model, torch.device("cpu"))
    tokens = batches(60)
    expected, found = train(plain, None, tokens), train(model, shared, tokens)
    assert expected[-1] < 0.5 * expected[0]
    assert expected != found
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert abs(ours - theirs) < 0.05 * max(theirs, 0.25 * expected[0]), step


def test_delayed_scaling_goes_on_from_a_checkpoint() -> None:
    """A restored run repeats the run that went on, bit for bit; one without history does not."""
    tokens = batches(4)
    shared = NativeFp8(["qkv", "fc1", "fc2"], "delayed")
    model = Phi(SHAPE, Execution(make=shared.make))
    initialize(model.named_parameters(), SHAPE, seed=2)
    shared.attach(model, torch.device("cpu"))
    train(model, shared, tokens)
    weights = copy.deepcopy(model.state_dict())
    saved = {name: tensor.clone() for name, tensor in shared.state_tensors().items()}
    assert {name: tuple(t.shape) for name, t in saved.items()} == {"fp8.amax_history": (6, 2, 16)}
    expected = train(model, shared, tokens)

    def restored(with_history: bool) -> list[float]:
        again = NativeFp8(["qkv", "fc1", "fc2"], "delayed")
        other = Phi(SHAPE, Execution(make=again.make))
        again.attach(other, torch.device("cpu"))
        other(tokens[0][:, :-1])  # scales and copies from before must not survive the loading
        other.load_state_dict(weights)
        if with_history:
            for name, tensor in again.state_tensors().items():
                tensor.copy_(saved[name])
        again.weights_changed()
        return train(other, again, tokens)

    assert restored(with_history=True) == expected
    assert restored(with_history=False) != expected


def test_torch_compile_runs_the_layers_eagerly() -> None:
    torch.manual_seed(6)
    layer = fp8_layer(NativeFp8(["fc1"]), 32, 32, torch.float32)
    x = torch.randn(16, 32)

    def block(x: Tensor) -> Tensor:
        return (layer(x * 2).relu() + 1).sum()

    gradients = []
    for function in (block, torch.compile(block, backend="aot_eager")):
        layer.weight.grad = None
        source = x.clone().requires_grad_()
        function(source).backward()
        gradients.append((source.grad, layer.weight.grad))
    for compiled, eager in zip(gradients[1], gradients[0], strict=True):
        assert torch.equal(compiled, eager)
