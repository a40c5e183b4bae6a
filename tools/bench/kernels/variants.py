"""Other launch settings of our kernels, which `megaphi bench kernels --tune` times as well."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """Other launch settings of a case's kernel: values for names of `kernels.<module>`."""

    case: str
    label: str
    settings: dict[str, dict[str, Any]]


def _warps(case: str, count: int) -> Variant:
    """Another number of warps of the row kernels, which take it from one table."""
    names = ("layer_norm", "block_end") if case != "layer_norm" else ("layer_norm",)
    settings = {name: {"num_warps": lambda width, count=count: count} for name in names}
    return Variant(case, f"{count} warps", settings)


def _constants(case: str, module: str, **values: int) -> Variant:
    label = ", ".join(f"{name} {value}" for name, value in values.items())
    return Variant(case, label, {module: values})


VARIANTS: tuple[Variant, ...] = (
    *(
        _constants("linear_cross_entropy", "softmax", BLOCK=block, NUM_WARPS=warps)
        for block, warps in (
            (4096, 8),
            (8192, 8),
            (8192, 16),
            (16384, 16),
            (16384, 32),
            (32768, 32),
        )
    ),
    *(
        _warps(case, count)
        for case in ("layer_norm", "block end", "block end, dropout 0.1")
        for count in (4, 8, 16)
    ),
    *(
        _constants("bias_gelu", "bias_gelu", BLOCK=block, NUM_WARPS=warps, FORWARD_ROWS=rows)
        for block, warps, rows in ((1024, 4, 2), (1024, 4, 4), (1024, 4, 8), (2048, 8, 4))
    ),
    *(
        _constants("rotary_packed", "rotary", PAIRS=pairs, NUM_WARPS=warps)
        for pairs, warps in ((512, 2), (512, 4), (1024, 4), (1024, 8), (2048, 8))
    ),
    # BLOCK would not do: tables of blocks are kept under the sizes of the tensors alone
    *(_constants("adamw_step_", "adamw", NUM_WARPS=warps) for warps in (4, 8, 16)),
)
