"""Stopping on request: a signal asks, the trainer saves at the end of the step and leaves."""

import signal
from types import FrameType

from megaphi.errors import Preempted


class StopRequest:
    """Remembers that SIGTERM or SIGUSR1 asked this process to stop.

    Schedulers send SIGTERM before they take a machine back; Slurm can be told to send SIGUSR1
    earlier. Only a flag is set here: the step in progress ends first. Made before the heavy
    imports, so that a signal during those is not lost either.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def check(self, step: int = 0, *, asked: bool | None = None) -> None:
        """Leave, if asked to, where nothing has happened since the newest checkpoint.

        Args:
            step: the last step done.
            asked: what the processes agreed on; this process's own request when not given.

        Raises:
            Preempted: the run was asked to stop.
        """
        if self.requested if asked is None else asked:
            raise Preempted(
                f"stopped on request before step {step + 1}, nothing is lost; run me again"
            )
