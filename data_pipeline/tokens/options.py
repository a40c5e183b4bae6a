"""Options of the stages that make token files, and of `trace`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from data_pipeline.runner.options import (
    Count,
    EngineOptions,
    Form,
    Output,
    PrefixOutput,
    Records,
    Seed,
    Share,
)

OneRecords = Annotated[Path, "RECORDS_DIR", Form.POSITIONAL]
MAX_EPOCHS = 1e6  # more is a slip: of a unit, or of a digit


@dataclass(frozen=True, kw_only=True)
class TokenizeRun:
    """Records -> token file PREFIX.bin, .idx, .json, .documents.jsonl, .tokenizer/."""

    ALTERNATIVES: ClassVar = (("shuffle_seed", "shuffle"),)
    records: OneRecords
    tokenizer: Annotated[str, "NAME_OR_DIR"]
    """codegen (phi-1's), a tokenizer directory, or OWNER/NAME on the Hugging Face hub."""
    shuffle_seed: Seed = 1234
    """Order of the documents; shuffled because validation data are taken by position."""
    shuffle: bool = True
    """Shuffle the documents; else they keep the order of the records."""
    output: PrefixOutput
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if not 0 <= self.shuffle_seed < 2**32:
            raise ValueError(f"`shuffle_seed` {self.shuffle_seed}: must be from 0 to 4294967295")


@dataclass(frozen=True, kw_only=True)
class MergeRun:
    """Several token files -> one, in the given order."""

    prefixes: Annotated[tuple[Path, ...], "PREFIX", Form.POSITIONAL]
    output: PrefixOutput


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerRun:
    """Records -> byte-level BPE tokenizer laid out as CodeGen's."""

    records: Records
    vocab_size: Count
    """Ids in all, 39 added ones included."""
    max_bytes: Count = 128 * 2**20  # about half a minute on two cores
    """Train on a sample of this many bytes, in equal parts of each directory."""
    output: Output


@dataclass(frozen=True, kw_only=True)
class BlendOutput(Output):
    """What is made."""

    out: Annotated[Path, "FILE.yaml"]
    """File to create."""


@dataclass(frozen=True, kw_only=True)
class BlendRun:
    """Token files and how often each is read -> weights for `megaphi train`."""

    sources: Annotated[tuple[str, ...], "PREFIX=EPOCHS", Form.POSITIONAL]
    """A token file and its number of passes; =1 may be left out."""
    tokens: Annotated[float, "N"] | None = None
    """Train on this many; the epochs then are proportions."""
    validation_share: Share | None = None
    """Share of the documents of each file, from its end, to validate on."""
    output: BlendOutput

    def __post_init__(self) -> None:
        if self.tokens is not None and not self.tokens >= 1:
            raise ValueError(f"`tokens` {self.tokens:g}: at least 1 is needed")
        if self.validation_share is not None and not 0 < self.validation_share < 1:
            raise ValueError(
                f"`validation_share` {self.validation_share:g}: must be between 0 and 1"
            )


@dataclass(frozen=True, kw_only=True)
class TraceRun:
    """Find the documents of a repository, licence or id in records or a token file.

    Options of one kind are alternatives, kinds narrow each other.
    """

    where: Annotated[Path, "PREFIX|RECORDS_DIR", Form.POSITIONAL]
    repo: Annotated[tuple[str, ...], "OWNER/NAME"] = ()
    """Repository; OWNER/ for all of an owner's; may be repeated."""
    id: Annotated[tuple[str, ...], "ID"] = ()
    """Record id; may be repeated."""
    license: Annotated[tuple[str, ...], "SPDX"] = ()
    """Licence identifier; may be repeated."""
