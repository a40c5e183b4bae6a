"""Where the tests of this folder run: on a GPU, or to prove the tests themselves on a CPU.

Without a GPU they are skipped, unless MEGAPHI_GPU_TESTS_ON_CPU=1: then the same bodies run on the
CPU at tiny shapes, the Triton kernels in Triton's interpreter (TRITON_INTERPRET=1).
"""

import importlib.util
import os

import pytest
import torch

# before cuBLAS starts: with it, its products are reproducible
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

ON_GPU = torch.cuda.is_available()
DRY_RUN = not ON_GPU and os.environ.get("MEGAPHI_GPU_TESTS_ON_CPU") == "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HAS_TRITON = importlib.util.find_spec("triton") is not None and (
    ON_GPU or os.environ.get("TRITON_INTERPRET") == "1"
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_GPU or DRY_RUN), reason="needs a CUDA device"),
]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="means something on a CUDA device only")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton does not run here")


def has_fp8() -> bool:
    """Whether this GPU multiplies e4m3."""
    return ON_GPU and torch.cuda.get_device_capability() >= (8, 9)
