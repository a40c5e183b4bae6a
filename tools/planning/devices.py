"""GPUs that a run can be planned for: what the vendors' data sheets say, and what a program gets.

Bandwidths are bytes/s, and of links in one direction. Memory is what the driver reports as total,
which is below the number on the label.
"""

from dataclasses import dataclass

from megaphi.metrics.flops import BF16_PEAKS


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU and its way to the others."""

    name: str
    """As `megaphi plan --gpu` takes it."""
    marks: tuple[str, ...]
    """What all is in the name by which the driver knows it."""
    bf16_peak: float
    """Dense FLOP/s of the tensor cores."""
    memory_gib: float
    """Total memory in GiB as the driver reports it."""
    hbm_bandwidth: float
    """Bytes/s of its memory."""
    link_bandwidth: float
    """Bytes/s to the other GPUs of its node over NVLink, in one direction."""
    network_bandwidth: float
    """Bytes/s to other nodes, one network adapter a GPU, in one direction."""
    has_fp8: bool
    """Whether its tensor cores multiply 8-bit floats."""


def _device(
    name: str, marks: str, memory: float, hbm: float, link: float, network: float, fp8: bool
) -> Device:
    """A table line: GiB, TB/s, GB/s and GB/s; the first mark names the family and its peak."""
    return Device(
        name=name,
        marks=tuple(marks.split()),
        bf16_peak=BF16_PEAKS[marks.split()[0]],
        memory_gib=memory,
        hbm_bandwidth=hbm * 1e12,
        link_bandwidth=link * 1e9,
        network_bandwidth=network * 1e9,
        has_fp8=fp8,
    )


# SXM boards. Adapters are those of the vendor's reference systems: 200 Gb/s for each GPU of a DGX
# A100, 400 Gb/s for each of a DGX H100, H200 or B200.
DEVICES = {
    device.name: device
    for device in (
        _device("a100-40gb", "A100 40GB", 39.4, 1.555, 300, 25, False),
        _device("a100-80gb", "A100 80GB", 79.1, 2.039, 300, 25, False),
        _device("h100", "H100 HBM3", 79.1, 3.35, 450, 50, True),
        _device("h200", "H200", 139.8, 4.8, 450, 50, True),
        _device("b200", "B200", 178.3, 8.0, 900, 50, True),
    )
}


def find_device(name: str) -> Device:
    """The device of a name.

    Raises:
        ValueError: the name is not in the table; the message lists those that are.
    """
    if name.lower() not in DEVICES:
        raise ValueError(f"--gpu {name} is not known; known are {', '.join(DEVICES)}")
    return DEVICES[name.lower()]
