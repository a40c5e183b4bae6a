"""Options that several stages share, and how an option says what its value looks like.

A stage has one frozen dataclass of what it is run with, in `options.py` of its room: its inputs,
its own options, and groups of shared ones as fields that are dataclasses themselves. The docstring
line under a field is its help, the first line of the class says what the stage does. Command line
and recipes are derived from these classes, so this is the one place where an option is defined.
These modules import nothing heavy: `megaphi data VERB --help` reads them.

Messages put the name of an option in backticks, as `max_reject`: who shows them to a user writes it
as that user typed it.
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal


class Form(Enum):
    """How a value is written, where its type does not say it."""

    POSITIONAL = "without a name, before the options"
    SEVERAL = "one name, then several values"
    COMMAS = "several values in one word, with commas between them"


# The text after a type is the placeholder of its value in the help.
Count = Annotated[int, "N"]
Seed = Annotated[int, "S"]
Share = Annotated[float, "SHARE"]
Seconds = Annotated[float, "SECONDS"]
Records = Annotated[tuple[Path, ...], "RECORDS_DIR", Form.POSITIONAL]

EngineName = Literal["local", "ray", "slurm"]


@dataclass(frozen=True, kw_only=True)
class Output:
    """What is made."""

    out: Annotated[Path, "DIR"]
    """Output directory to create."""
    overwrite: bool = False
    """Replace an output of other inputs or options."""


@dataclass(frozen=True, kw_only=True)
class PrefixOutput(Output):
    """What is made."""

    out: Annotated[Path, "PREFIX"]
    """Token file to create, without its suffix."""


@dataclass(frozen=True, kw_only=True)
class RecordsOutput(Output):
    """What is made."""

    max_reject: Share = 0.5
    """Share of rejected documents, 0 to 1, above which nothing is published (exit 3)."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_reject <= 1:
            raise ValueError(f"`max_reject` {self.max_reject}: must be a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class PartsOutput(RecordsOutput):
    """What is made."""

    zstd: bool = False
    """Write .jsonl.zst parts."""


@dataclass(frozen=True, kw_only=True)
class FilteredOutput(PartsOutput):
    """What is made."""

    max_reject: Share = 0.9
    """Share of rejected documents, 0 to 1, above which nothing is published (exit 3)."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where shards run; the output does not depend on it."""

    workers: Count | None = None
    """Shards at a time: processes, or with slurm tasks of the array; by default one per processor
    of this machine, with ray of the cluster."""
    engine: EngineName = "local"
    """Processes of this machine, a Ray cluster, or a Slurm array."""
    ray_address: Annotated[str, "HOST:PORT"] | None = None
    """Address of the Ray cluster; see the documentation of Ray."""
    slurm_option: Annotated[tuple[str, ...], "OPTION"] = ()
    """Option of sbatch, such as --partition=cpu, joined to the name by `=`; may be repeated."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"`workers` {self.workers}: at least 1 is needed")
        self._check_engine("ray_address", self.ray_address is not None, "ray")
        self._check_engine("slurm_option", bool(self.slurm_option), "slurm")

    def _check_engine(self, name: str, given: bool, engine: EngineName) -> None:
        if given and self.engine != engine:
            raise ValueError(f"`{name}` belongs to `engine` {engine}, not {self.engine}")


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Where):
    """Where shards run; the output does not depend on it."""

    submit: bool = False
    """With slurm: submit the jobs instead of printing them."""
    wait: bool = False
    """With slurm: wait until the submitted jobs have made the output."""
    slice: Annotated[str, "I/N"] | None = None
    """What a task of a Slurm array runs: shards I, I + N and so on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_engine("submit", self.submit, "slurm")
        self._check_engine("wait", self.wait, "slurm")
        self._check_engine("slice", self.slice is not None, "local")
        if self.slice is not None:
            index, _, slices = self.slice.partition("/")
            if not (index.isdecimal() and slices.isdecimal() and int(index) < int(slices)):
                raise ValueError(
                    f"`slice` {self.slice}: must be I/N with I from 0 to N - 1, such as 0/8"
                )
