"""Which library multiplies in FP8: our own layers or Transformer Engine's."""

from megaphi.config import Precision
from megaphi.precision.fp8 import NativeFp8
from megaphi.precision.fp8_interface import Fp8
from megaphi.precision.policy import Policy


def fp8_layers(policy: Policy, precision: Precision) -> Fp8 | None:
    """What makes and serves the FP8 layers of a run, or None where it runs without."""
    if policy.fp8 is None:
        return None
    if policy.fp8 == "native":
        return NativeFp8(precision.fp8_layers, precision.fp8_scaling)
    from megaphi.precision.transformer_engine import TransformerEngineFp8

    return TransformerEngineFp8(precision.fp8_layers, precision.fp8_scaling)
