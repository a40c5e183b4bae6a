"""FLOPs of a training step and the peaks of devices: the two numbers under every MFU.

Convention of PaLM (arXiv 2204.02311, appendix B) as used by Megatron-LM and llm-foundry: a
multiply-add is 2 FLOPs, the backward pass costs twice the forward pass, recomputation does not
count. Attention is counted in full; the causal half is given alongside it.
"""

import torch

from megaphi.config import Model

# Dense bf16 tensor-core peaks in FLOP/s, from the vendors' data sheets, without sparsity. Longer
# names first: "H100 PCIe" must not be taken for the SXM part.
BF16_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362.05e12,
    "RTX 4090": 165.2e12,
}


def matmul_parameters(config: Model) -> int:
    """Weights that multiply activations: the four projections of each block, and the head."""
    block = config.hidden_size * (4 * config.hidden_size + 2 * config.ffn_size)
    return config.num_layers * block + config.hidden_size * config.vocab_size


def flops_per_token(config: Model, sequence_length: int, *, causal: bool = False) -> float:
    """Training FLOPs of one token: 6 N_matmul + 12 L d s, attention halved if `causal`."""
    attention = 12 * config.num_layers * config.hidden_size * sequence_length
    return 6 * matmul_parameters(config) + (attention / 2 if causal else attention)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of a device in a dtype; None where it is not known."""
    if dtype != torch.bfloat16:
        return None
    for name, peak in BF16_PEAKS.items():
        if name.lower() in device_name.lower():
            return peak
    return None
