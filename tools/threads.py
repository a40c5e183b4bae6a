"""How PyTorch's threads on the CPU wait for each other."""

import os


def wait_without_spinning() -> None:
    """Let OpenMP's threads sleep while they wait; call it before torch is imported.

    They spin by default. A token of a small model is some hundred waits, and on cores that another
    program uses as well each of them lasts until the kernel has run that program: generation was
    ten times and more slower than with one thread. What the user has set is left as it is.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
