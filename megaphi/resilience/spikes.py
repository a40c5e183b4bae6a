"""Loss spikes: go back to a checkpoint from before, and leave out the data around the spike.

The policy of PaLM (Chowdhery et al., arXiv 2204.02311, section 5.1), which restarted from about 100
steps before a spike and skipped the batches around it. Here a step is spiked when its loss is above
the mean of the last `train.spike_window` ordinary steps by `train.spike_deviations` standard
deviations, and `train.spike_steps` such steps in a row are a spike.

Each rewind is a record in `<run_dir>/rewinds.json`, written before anything else happens. Whatever
a run did after the step `void_after` of a record is void, unless it knows of the record; so a crash
in the middle of a rewind is finished by the next start. Which sample comes when follows from the
records alone: the samples that they skip are left out, and all later ones move up.
"""

import contextlib
import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaphi.config import Train
from megaphi.durable import write_durably
from megaphi.errors import RunError
from megaphi.formats.manifest import CheckpointError, find_checkpoints, remove, verify_checkpoint

RECORDS_NAME = "rewinds.json"


@dataclass(frozen=True)
class Spike:
    """A loss far above the ones before, for several steps."""

    first_step: int
    last_step: int
    loss: float
    """Of the last step."""
    mean: float
    """Of the ordinary steps before."""
    deviation: float
    """Their standard deviation."""


@dataclass(frozen=True)
class Rewind:
    """What was decided about a spike; JSON in `rewinds.json` and in checkpoints."""

    spike: Spike
    void_after: int
    """Steps after this one are run again."""
    skipped: list[list[int]]
    """Ranges of samples [from, up to) that are left out from now on."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Rewind":
        """The record that `asdict` made a dictionary of."""
        return cls(Spike(**value["spike"]), value["void_after"], value["skipped"])


class SpikeWatch:
    """Follows the loss; equal on all processes, for they all see the same numbers."""

    def __init__(self, train: Train) -> None:
        self._train = train
        self._window: deque[float] = deque(maxlen=train.spike_window)
        self._in_a_row = 0

    def add(self, step: int, loss: float) -> Spike | None:
        """Learn a step's loss (finite); the spike that it completes, if it does."""
        if self._train.spike_deviations == 0:
            return None
        size = len(self._window)
        mean = math.fsum(self._window) / max(1, size)
        variance = math.fsum((value - mean) ** 2 for value in self._window) / max(1, size)
        # losses that hardly vary must not make noise a spike
        deviation = max(math.sqrt(variance), 0.01 * abs(mean))
        limit = mean + self._train.spike_deviations * deviation
        if size < self._train.spike_window or loss <= limit:
            self._window.append(loss)
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        if self._in_a_row < self._train.spike_steps:
            return None
        return Spike(step - self._in_a_row + 1, step, loss, mean, deviation)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"window": list(self._window), "in_a_row": self._in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint stopped."""
        self._window.extend(state["window"])
        self._in_a_row = state["in_a_row"]


def merged(ranges: Sequence[Sequence[int]]) -> list[list[int]]:
    """Ranges [from, up to) in order, those that touch or overlap made one."""
    result: list[list[int]] = []
    for first, stop in sorted(map(tuple, ranges)):
        if result and first <= result[-1][1]:
            result[-1][1] = max(result[-1][1], stop)
        else:
            result.append([first, stop])
    return result


def sample_at(position: int, skipped: Sequence[Sequence[int]]) -> int:
    """The sample that comes at a position of the run, with `merged` ranges left out."""
    for first, stop in skipped:
        if position < first:
            break
        position += stop - first
    return position


class Rewinds:
    """The rewinds of a run.

    Args:
        run_dir: where they are recorded.
        records: those so far.
    """

    def __init__(self, run_dir: Path, records: Sequence[Rewind] = ()) -> None:
        self._run_dir = run_dir
        self.records = list(records)
        self._skipped = merged([part for record in records for part in record.skipped])

    @classmethod
    def read(cls, run_dir: Path) -> "Rewinds":
        """The rewinds of a run directory.

        Raises:
            RunError: the record is damaged.
        """
        path = run_dir / RECORDS_NAME
        if not path.is_file():
            return cls(run_dir)
        try:
            values = json.loads(path.read_bytes())
            return cls(run_dir, [Rewind.from_json(value) for value in values])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path}: damaged ({error!r}); restore it from the state of a checkpoint: "
                '"rewinds" in its trainer.json'
            ) from error

    def state(self) -> list[dict[str, Any]]:
        """The records as JSON values."""
        return [asdict(record) for record in self.records]

    def sample_at(self, position: int) -> int:
        """The sample that comes at a position of the run."""
        return sample_at(position, self._skipped)

    def after(self, spike: Spike, train: Train) -> "Rewinds":
        """The rewinds with one more, because of a spike.

        The batches of the spiked steps and of the `train.spike_rewind_steps` before them are left
        out from now on.

        Raises:
            RunError: there were too many already.
        """
        if len(self.records) >= train.max_rewinds:
            raise RunError(
                f"the loss spiked at step {spike.first_step} ({spike.loss:.3f}, before "
                f"{spike.mean:.3f}) after {len(self.records)} rewinds (train.max_rewinds); lower "
                "optimizer.learning_rate, or look at the samples of these steps"
            )
        first = max(1, spike.first_step - train.spike_rewind_steps)
        size = train.global_batch_size
        positions = range((first - 1) * size, spike.last_step * size)
        skipped = merged([[n, n + 1] for n in map(self.sample_at, positions)])
        return Rewinds(self._run_dir, [*self.records, Rewind(spike, first - 1, skipped)])

    def write(self) -> None:
        """Record them durably; by main alone."""
        write_durably(self._run_dir / RECORDS_NAME, json.dumps(self.state(), indent=1))

    def find_checkpoint(self) -> Path:
        """The newest checkpoint that verifies and that the last rewind leaves; by main alone.

        Raises:
            RunError: there is none.
        """
        last = self.records[-1]
        for path in find_checkpoints(self._run_dir):
            if _step_of(path) <= last.void_after:
                with contextlib.suppress(CheckpointError, OSError):
                    verify_checkpoint(path)
                    return path
        raise RunError(
            f"the loss spiked at step {last.spike.first_step} ({last.spike.loss:.3f}, before "
            f"{last.spike.mean:.3f}), and there is no sound checkpoint of step {last.void_after} "
            "or before to go back to; use a smaller checkpoint.interval, or more checkpoint.keep"
        )

    def drop_void_checkpoints(self) -> None:
        """Delete the checkpoints that a rewind has made void; by main alone.

        One that cannot be read stays: whoever looks for a checkpoint to resume from verifies it.
        """
        for path in find_checkpoints(self._run_dir):
            with contextlib.suppress(OSError, ValueError, KeyError):
                known = len(json.loads((path / "trainer.json").read_bytes())["rewinds"])
                if any(_step_of(path) > record.void_after for record in self.records[known:]):
                    remove(path)

    def joined(self, state: Sequence[dict[str, Any]], directory: Path) -> "Rewinds":
        """These rewinds, or those of a checkpoint that was brought here from another run.

        Raises:
            ValueError: the checkpoint belongs to another history of the run.
        """
        records = [Rewind.from_json(value) for value in state]
        shared = min(len(records), len(self.records))
        void = any(_step_of(directory) > r.void_after for r in self.records[len(records) :])
        if records[:shared] != self.records[:shared] or void:
            raise ValueError(
                f"{directory} does not belong to the rewinds in {self._run_dir / RECORDS_NAME}; "
                "resume another checkpoint, or choose another train.run_dir"
            )
        return self if len(records) <= len(self.records) else Rewinds(self._run_dir, records)


def _step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))
