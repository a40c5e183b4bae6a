"""FLOPs and peaks against values worked out by hand."""

import pytest
import torch

from megaphi.config import Model
from megaphi.metrics.flops import flops_per_token, matmul_parameters, peak_flops


def test_phi1_flops_per_token() -> None:
    # 24 blocks of 12 x 2048^2 and a head of 2048 x 51200
    assert matmul_parameters(Model()) == 24 * 12 * 2048**2 + 2048 * 51200 == 1_312_817_152
    assert flops_per_token(Model(), 2048) == pytest.approx(9.085e9, rel=1e-4)
    assert flops_per_token(Model(), 2048, causal=True) == pytest.approx(8.481e9, rel=1e-4)


def test_other_widths() -> None:
    model = Model(
        num_layers=2,
        hidden_size=8,
        num_heads=2,
        intermediate_size=20,
        vocab_size=10,
        max_sequence_length=16,
    )
    # a block: q, k, v, out of 8 x 8 and fc1, fc2 of 8 x 20; the head 8 x 10
    assert matmul_parameters(model) == 2 * (4 * 64 + 2 * 160) + 80
    assert flops_per_token(model, 16) == 6 * 1232 + 12 * 2 * 8 * 16


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("cpu", None),
        ("NVIDIA T1000", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_flops(name, torch.bfloat16) == peak
    assert peak_flops(name, torch.float32) is None
