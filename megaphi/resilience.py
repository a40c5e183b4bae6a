"""Stopping on request: a signal asks, the trainer saves at the end of the step and leaves."""

import signal
from types import FrameType


class StopRequest:
    """Remembers that SIGTERM or SIGUSR1 asked this process to stop.

    Schedulers send SIGTERM before they take a machine back; Slurm can be told to send SIGUSR1
    earlier. Only a flag is set here: the step in progress ends first.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
