"""What a ledger knows of batches: enough to find each again after a kill, and never pay twice.

A batch has one line in the ledger for each step, all of the kind `batch`:

    planned    before anything is sent: its tag, server, model and all its requests with the most
               that each can cost, which is reserved from here on
    creating   just before the call that costs money, with the id of the uploaded file and the time
    created    the id of the batch
    closed     all is known of every request; what is still open of it was not billed

A kill between `creating` and `created` leaves a batch that may exist or not: the server's list is
then searched for the tag, which is in the batch's metadata. A kill before `creating` leaves nothing
that costs money.
"""

from dataclasses import dataclass
from typing import Any

STEPS = ("planned", "creating", "created", "closed")


@dataclass(frozen=True)
class Member:
    """One request of a batch: the most that it can cost (1e-9 dollars) and take (tokens)."""

    nano: int
    prompt: int
    completion: int


@dataclass
class OpenBatch:
    """A batch that is not closed.

    Attributes:
        tag: ours, unique; in the batch's metadata.
        server: base URL.
        model: of all its requests.
        members: by request.
        step: the last of `STEPS` that was journalled.
        time: of that step, seconds since 1970.
        file: id of the uploaded file, "" before.
        id: the server's id of the batch, "" before.
    """

    tag: str
    server: str
    model: str
    members: dict[str, Member]
    step: str = "planned"
    time: float = 0.0
    file: str = ""
    id: str = ""


def apply_batch_line(batches: dict[str, OpenBatch], entry: dict[str, Any]) -> OpenBatch:
    """Take a line of the journal in; returns the batch that it is about.

    Raises:
        ValueError, KeyError, TypeError: the line does not fit those before it.
    """
    tag, step = entry["request"], entry["step"]
    if step not in STEPS:
        raise ValueError(f"unknown step {step!r}")
    if step == "planned":
        members = {key: Member(*map(int, values)) for key, values in entry["members"].items()}
        batches[tag] = OpenBatch(tag, str(entry["server"]), str(entry["model"]), members)
    batch = batches[tag]
    batch.step, batch.time = step, float(entry["time"])
    batch.file = str(entry.get("file", batch.file))
    batch.id = str(entry.get("id", batch.id))
    if step == "closed":
        del batches[tag]
    return batch
