"""How glibc hands memory back, set for training on a CPU.

A training step allocates and frees the same activations over and over. By default glibc returns
large blocks to the system at once, so that every step faults all its pages in again: about a sixth
of the time of a small model's step. Keeping up to 2 GiB of freed memory in the process avoids it.
"""

import ctypes
import sys

# malloc.h of glibc
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3

_SETTINGS = (
    (_M_MMAP_THRESHOLD, 32 << 20),  # the largest that glibc accepts
    (_M_TRIM_THRESHOLD, (2 << 30) - 1),  # an int, so no more than this
    (_M_TOP_PAD, 64 << 20),
)


def keep_freed_memory() -> bool:
    """Let the process keep the memory that it frees, for its next step.

    Returns:
        Whether the C library is glibc and took the settings; elsewhere nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(option, value) == 1 for option, value in _SETTINGS)
