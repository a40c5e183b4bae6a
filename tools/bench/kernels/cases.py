"""What `megaphi bench kernels` measures: one entry of `CASES` an operation of the training step.

An entry says how to make the inputs, the fewest bytes and FLOPs that the operation needs (each
input read once, each output written once), and which other libraries have the same operation.
The other libraries' functions take the arguments of ours.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import DropoutSeed
from megaphi.config import Model
from megaphi.model.phi import parameter_shapes
from megaphi.model.rotary import rotary_tables

Function = Callable[..., Any]
EPSILON = 1e-5
_PLACE = DropoutSeed(seed=1234, step=7, first_token=0)
# bytes a parameter while AdamW is measured: its state, the inputs and results of the comparison,
# and the temporaries of the separate passes
_ADAMW_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shapes of the measured step; the defaults are phi-1's, 8 sequences of 2,048 tokens."""

    batch: int = 8
    time: int = 2048
    model: Model = field(default_factory=Model)
    optimizer_layers: int = 24
    """Layers whose parameters AdamW updates: all of phi-1's where the memory suffices."""

    @property
    def rows(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch * self.time

    @property
    def parameters(self) -> int:
        """Parameters that AdamW updates."""
        return sum(torch.Size(shape).numel() for shape in self.parameter_shapes())

    def parameter_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the parameters that AdamW updates."""
        model = self.model
        part = Model(
            num_layers=self.optimizer_layers,
            hidden_size=model.hidden_size,
            num_heads=model.num_heads,
            vocab_size=model.vocab_size,
        )
        return list(parameter_shapes(part).values())


def small_sizes(rows: int) -> Sizes:
    """Shapes for a machine without a GPU."""
    model = Model(num_layers=2, hidden_size=128, num_heads=2, vocab_size=1000)
    return Sizes(batch=max(1, rows // 32), time=32, model=model, optimizer_layers=2)


def full_sizes(rows: int, memory_bytes: int) -> Sizes:
    """phi-1's shapes, with as many of its layers for AdamW as the memory holds."""
    layers = 24
    while layers > 1:
        sizes = Sizes(batch=rows // 2048, optimizer_layers=layers)
        if sizes.parameters * _ADAMW_BYTES < 0.75 * memory_bytes:
            break
        layers -= 1
    return Sizes(batch=rows // 2048, optimizer_layers=layers)


@dataclass
class Inputs:
    """Arguments of one call; floating tensors that require gradients are its leaves."""

    args: list[Any]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients are asked for."""
        return [a for a in self.args if isinstance(a, Tensor) and a.requires_grad]

    def copy(self, change: Callable[[Tensor], Tensor] = torch.clone) -> "Inputs":
        """The same values in memory of their own, after `change`."""

        def one(value: Any) -> Any:
            if isinstance(value, list):
                return [one(item) for item in value]
            if not isinstance(value, Tensor):
                return value
            changed = change(value.detach())
            return changed.requires_grad_() if value.requires_grad else changed

        return Inputs([one(a) for a in self.args], self.kwargs)


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operation, measured."""

    name: str
    function: str
    """Its name in `kernels.ops`."""
    file: str
    """Its Triton kernel is in `kernels/<file>.py`."""
    inputs: Callable[[Sizes, torch.dtype, torch.device], Inputs]
    forward_bytes: Callable[[Sizes, int], float]
    """Of the sizes and the bytes of an element."""
    backward_bytes: Callable[[Sizes, int], float] | None = None
    """None: the operation has no gradient."""
    forward_flops: Callable[[Sizes], float] = lambda sizes: 0.0
    backward_flops: Callable[[Sizes], float] = lambda sizes: 0.0
    overwrites: bool = False
    """The first argument is a result that nobody else needs, and may be written over."""
    definitions: str = "reference"
    """Its plain definition is in `kernels/<definitions>.py`."""
    comparable: Callable[[list[Tensor]], list[Tensor]] = lambda results: results
    """Brings results that may differ in form to one that is compared."""
    in_place: tuple[int, ...] = ()
    """Arguments that are the results, where nothing is returned."""
    dtype: torch.dtype | None = None
    """Where the operation has one dtype only."""
    peers: dict[str, Callable[[], Function]] = field(default_factory=dict)
    """Other implementations; each is imported when it is its turn."""


def _normal(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    """A leaf of random values."""
    values = torch.randn(*shape, device=device, dtype=torch.float32) * scale
    return values.to(dtype).requires_grad_()


def _layer_norm(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    d = s.model.hidden_size
    x, weight, bias = (
        _normal(device, dtype, *shape) for shape in ((s.batch, s.time, d), (d,), (d,))
    )
    return Inputs([x, weight, bias, EPSILON])


def _block_end(
    probability: float,
) -> Callable[[Sizes, torch.dtype, torch.device], Inputs]:
    def make(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
        d = s.model.hidden_size
        wide, narrow = (s.batch, s.time, d), (d,)
        shapes = (wide, narrow, wide, narrow, wide, narrow, narrow)
        tensors = [_normal(device, dtype, *shape) for shape in shapes]
        place = _PLACE if probability > 0 else None
        return Inputs([*tensors, EPSILON, probability, place, 0])

    return make


def _branches(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    d = s.model.hidden_size
    shapes = ((s.rows, d), (d,), (s.rows, d), (d,))
    return Inputs([*(_normal(device, dtype, *shape) for shape in shapes), 0.1, _PLACE, 0])


def _half_vocabulary(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    """A chunk of rows' logits of the first of two processes, which has all the targets."""
    rows, columns = min(s.rows, 4096), s.model.vocab_size // 2
    logits = _normal(device, dtype, rows, columns).detach()
    return Inputs([logits, torch.randint(columns, (rows,), device=device)])


def _half_vocabulary_and_totals(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    logits, ids = _half_vocabulary(s, dtype, device).args
    maximum = logits.float().amax(1)
    return Inputs([logits, ids, maximum, 2 * (logits.float() - maximum[:, None]).exp().sum(1)])


def _rotary(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    m = s.model
    qkv = _normal(device, dtype, s.batch, s.time, m.num_heads, 3, m.head_size)
    cosine, sine = rotary_tables(s.time, m.rotary_dim, m.rotary_base, device)
    return Inputs([qkv, cosine, sine])


def _bias_gelu(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    f = s.model.ffn_size
    return Inputs([_normal(device, dtype, s.batch, s.time, f), _normal(device, dtype, f)])


def _head(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    d, v = s.model.hidden_size, s.model.vocab_size
    x, weight = _normal(device, dtype, s.rows, d), _normal(device, dtype, v, d, scale=0.02)
    bias = _normal(device, dtype, v, scale=0.02)
    return Inputs([x, weight, bias, torch.randint(v, (s.rows,), device=device)])


def _adamw(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    shapes = s.parameter_shapes()

    def filled(scale: float) -> list[Tensor]:
        return [torch.randn(shape, device=device).mul_(scale) for shape in shapes]

    second = [t.square_() for t in filled(1e-3)]
    # a clip factor near one: gradients are used up, and would vanish over the repeats
    scalars = [torch.tensor(v, device=device) for v in (10.0, True, 0.999)]
    settings = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}
    lists = [filled(0.02), filled(1e-3), filled(1e-3), second]
    return Inputs([*lists, *scalars], {**settings, "weight_decay": 0.1})


def _squares(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    return Inputs([[torch.randn(shape, device=device) for shape in s.parameter_shapes()]])


def _fp8(*, scaled: bool) -> Callable[[Sizes, torch.dtype, torch.device], Inputs]:
    """The input of the widest projection, with or without a scale that fits it."""

    def make(s: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
        x = _normal(device, dtype, s.rows, s.model.ffn_size).detach()
        format_ = torch.float8_e4m3fn
        scale = torch.finfo(format_).max / x.abs().amax().float()
        return Inputs([x, scale, format_] if scaled else [x, format_])

    return make


def _fp8_comparable(results: list[Tensor]) -> list[Tensor]:
    """Both layouts, and the largest value of however many parts."""
    rows, columns, partial = results
    return [rows.float(), columns.float(), partial.max()]


def _fp8_case(name: str, reads: int, writes: int, comparable: Any = None) -> Case:
    """A cast of the widest activation; reads in its dtype, writes in bytes an element."""
    return Case(
        name=name,
        function=name,
        file="fp8_cast",
        definitions="reference_fp8",
        inputs=_fp8(scaled=name != "fp8_scale"),
        forward_bytes=lambda s, e: s.rows * s.model.ffn_size * (reads * e + writes),
        comparable=comparable or (lambda results: [result.float() for result in results]),
    )


def _rotated_bytes(s: Sizes, itemsize: int) -> float:
    """The turned part of queries and keys, in and out, and the two fp32 tables."""
    turned = s.rows * s.model.num_heads * 2 * s.model.rotary_dim
    return 2 * turned * itemsize + 2 * 4 * s.time * s.model.rotary_dim / 2


def _head_bytes(s: Sizes, itemsize: int) -> float:
    """Hidden states, weight and bias once."""
    d, v = s.model.hidden_size, s.model.vocab_size
    return (s.rows * d + v * d + v) * itemsize


def _liger_layer_norm() -> Function:
    function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    apply: Function = function.apply
    return apply


def _liger_head() -> Function:
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    function = module.LigerFusedLinearCrossEntropyFunction

    def loss(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        # class weights, ignored id, z-loss, smoothing, reduction, softcap, z-loss too, sums in fp32
        rest = (None, -100, 0.0, 0.0, "sum", None, False, torch.float32)
        result: Tensor = function.apply(x, weight, labels, bias, *rest)[0]
        return result

    return loss


def _cut_cross_entropy() -> Function:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def loss(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        # its default leaves out small gradients, which at the start of a training are all of them
        result: Tensor = function(x, weight, labels, bias, reduction="sum", impl="cce_exact")
        return result

    return loss


def _compiled_head() -> Function:
    def loss(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias).float(), labels, reduction="sum")

    return torch.compile(loss, dynamic=False)


def _fused_adamw() -> Function:
    def step(
        p: list[Tensor],
        g: list[Tensor],
        m: list[Tensor],
        v: list[Tensor],
        count: Tensor,
        finite: Tensor,
        scale: Tensor,
        **settings: float,
    ) -> None:
        torch._fused_adamw_(
            p,
            g,
            m,
            v,
            [],
            [count] * len(p),
            lr=settings["learning_rate"],
            beta1=settings["beta1"],
            beta2=settings["beta2"],
            eps=settings["epsilon"],
            weight_decay=settings["weight_decay"],
            amsgrad=False,
            maximize=False,
            grad_scale=1 / scale,  # it divides
            found_inf=1 - finite.float(),
        )

    return step


def _block_end_case(name: str, probability: float, backward_tensors: int) -> Case:
    """The end of a block: three tensors in, two out; backward as its kernel's docstring counts."""
    return Case(
        name=name,
        function="bias_dropout_add_layer_norm",
        file="block_end",
        inputs=_block_end(probability),
        forward_bytes=lambda s, e: (5 * s.rows + 4) * s.model.hidden_size * e,
        backward_bytes=lambda s, e: (backward_tensors * s.rows + 5) * s.model.hidden_size * e,
    )


CASES: tuple[Case, ...] = (
    Case(
        name="layer_norm",
        function="layer_norm",
        file="layer_norm",
        inputs=_layer_norm,
        forward_bytes=lambda s, e: (2 * s.rows + 2) * s.model.hidden_size * e,
        backward_bytes=lambda s, e: (3 * s.rows + 3) * s.model.hidden_size * e,
        peers={"liger": _liger_layer_norm},
    ),
    _block_end_case("block end", 0.0, 4),
    _block_end_case("block end, dropout 0.1", 0.1, 6),
    Case(
        name="bias_dropout_add",
        function="bias_dropout_add",
        file="dropout_add",
        inputs=_branches,
        forward_bytes=lambda s, e: (3 * s.rows + 2) * s.model.hidden_size * e,
        backward_bytes=lambda s, e: (3 * s.rows + 2) * s.model.hidden_size * e,
    ),
    Case(
        name="rotary_packed",
        function="rotary_packed",
        file="rotary",
        inputs=_rotary,
        forward_bytes=_rotated_bytes,
        backward_bytes=_rotated_bytes,
        overwrites=True,
    ),
    Case(
        name="bias_gelu",
        function="bias_gelu",
        file="bias_gelu",
        inputs=_bias_gelu,
        forward_bytes=lambda s, e: (2 * s.rows + 1) * s.model.ffn_size * e,
        backward_bytes=lambda s, e: (3 * s.rows + 2) * s.model.ffn_size * e,
    ),
    Case(
        name="linear_cross_entropy",
        function="linear_cross_entropy",
        file="cross_entropy",
        inputs=_head,
        forward_bytes=lambda s, e: _head_bytes(s, e) + 8 * s.rows,
        backward_bytes=_head_bytes,
        forward_flops=lambda s: 2.0 * s.rows * s.model.hidden_size * s.model.vocab_size,
        backward_flops=lambda s: 4.0 * s.rows * s.model.hidden_size * s.model.vocab_size,
        peers={
            "liger": _liger_head,
            "cut-cross-entropy": _cut_cross_entropy,
            "compile, whole logits": _compiled_head,
        },
    ),
    Case(
        name="vocabulary_statistics",
        function="vocabulary_statistics",
        file="vocabulary_parallel",
        definitions="reference_vocabulary",
        inputs=_half_vocabulary,
        forward_bytes=lambda s, e: min(s.rows, 4096) * (s.model.vocab_size // 2 * e + 8 + 12),
    ),
    Case(
        name="vocabulary_gradient_",
        function="vocabulary_gradient_",
        file="vocabulary_parallel",
        definitions="reference_vocabulary",
        inputs=_half_vocabulary_and_totals,
        forward_bytes=lambda s, e: min(s.rows, 4096) * (s.model.vocab_size // 2 * 2 * e + 8 + 8),
        in_place=(0,),
    ),
    Case(
        name="sum_of_squares",
        function="sum_of_squares",
        file="adamw",
        inputs=_squares,
        forward_bytes=lambda s, e: 4.0 * s.parameters,
        dtype=torch.float32,
    ),
    Case(
        name="adamw_step_",
        function="adamw_step_",
        file="adamw",
        inputs=_adamw,
        forward_bytes=lambda s, e: 28.0 * s.parameters,
        in_place=(0, 2, 3),
        dtype=torch.float32,
        peers={"torch fused AdamW": _fused_adamw},
    ),
    _fp8_case("fp8_scale", 1, 0),
    _fp8_case("fp8_cast", 1, 1),
    _fp8_case("fp8_cast_transpose", 1, 2, _fp8_comparable),
)
