"""How much memory this process has held, read so that a parent's memory is not counted.

`getrusage` will not do on Linux: the kernel carries `ru_maxrss` over fork and exec, so that a small
process started by a large one reports the large one's peak.
"""

import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")


def reset_peak_memory() -> int | None:
    """Start a new peak and return the memory now in use, bytes; None where Linux is not."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def peak_memory() -> int:
    """Most memory this process has held since its start or the last reset, bytes."""
    if _STATUS.exists():
        return _status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status_bytes(key: str) -> int:
    """A value of /proc/self/status in bytes."""
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
