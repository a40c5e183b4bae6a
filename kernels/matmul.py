"""Matrix products of 16-bit factors that are added up in fp32, as weight gradients are.

cuBLAS accumulates in fp32 anyway; the question is only whether the result is rounded to 16 bits on
its way out, and whether adding it to the sum of the micro-batches before is a pass of its own over
memory (12 bytes an element) or happens in the GEMM's epilogue (8). No Triton here: PyTorch's GEMMs
are the fastest there are for these shapes.
"""

import torch
from torch import Tensor

HAS_FP32_OUTPUT = hasattr(torch.ops.aten.addmm, "dtype_out") and torch.version.hip is None
"""Whether this torch's GEMMs take `out_dtype`: it came with 2.8, and only CUDA computes it."""


def fp32_product(a_nk: Tensor, b_km: Tensor) -> Tensor:
    """A B in fp32 [n, m], not rounded in between."""
    if a_nk.dtype == torch.float32:
        return a_nk @ b_km
    if HAS_FP32_OUTPUT and a_nk.is_cuda:
        return torch.mm(a_nk, b_km, out_dtype=torch.float32)
    return a_nk.float() @ b_km.float()


def add_product_(total_nm: Tensor, a_nk: Tensor, b_km: Tensor) -> None:
    """Total += A B in fp32, in place; `total_nm` is fp32."""
    if a_nk.dtype == torch.float32:
        total_nm.addmm_(a_nk, b_km)
    elif HAS_FP32_OUTPUT and a_nk.is_cuda:
        torch.addmm(total_nm, a_nk, b_km, out_dtype=torch.float32, out=total_nm)
    else:
        total_nm.addmm_(a_nk.float(), b_km.float())
