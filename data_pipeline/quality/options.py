"""Options of `train-filter` and `filter`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from data_pipeline.annotation.canaries import GOOD_FROM
from data_pipeline.runner.options import (
    Count,
    EngineOptions,
    FilteredOutput,
    Form,
    Output,
    Records,
    Seed,
    Share,
)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What the filter depends on, besides labels and texts."""

    features: Annotated[str, "hashed|MODEL"] = "hashed"
    """Hashed tokens, or the mean last hidden state of a run, checkpoint or Hugging Face
    directory."""
    good_from: Annotated[float, "SCORE"] = GOOD_FROM
    """Labels of at least this score are good."""
    test_share: Share = 0.2
    """Share of the labelled documents that is held out."""
    trees: Count = 200
    """Trees of the forest."""
    min_leaf: Count = 3
    """Fewest labelled documents in a leaf."""
    seed: Seed = 1234
    """Random seed of the split and of the forest."""
    max_tokens: Count = 1024
    """Tokens of a document that a model reads."""

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise ValueError(f"`test_share` {self.test_share:g}: must be between 0 and 1")
        for name, value in (("trees", self.trees), ("min_leaf", self.min_leaf)):
            if value < 1:
                raise ValueError(f"`{name}` {value}: at least 1 is needed")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` {self.seed}: must be from 0 to 2^32 - 1")


@dataclass(frozen=True, kw_only=True)
class TrainFilterRun:
    """Labels and records -> a quality filter: forest.npz, report.json, report.txt."""

    labels: Annotated[Path, "LABELS_DIR", Form.POSITIONAL]
    """Records of `megaphi data annotate`."""
    records: Records
    """The corpus to be filtered: texts are taken from here, by record id."""
    options: TrainingOptions = TrainingOptions()
    output: Output
    engine: EngineOptions = field(default_factory=EngineOptions)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which documents are kept: exactly one of the first three is given."""

    threshold: Annotated[float, "X"] | None = None
    """Lowest score that is kept."""
    keep_tokens: Count | None = None
    """Keep the best documents, as many as fit into N tokens."""
    precision: Annotated[float, "P"] | None = None
    """Keep those of at least the lowest score with this precision on held-out documents."""
    bytes_per_token: Annotated[float, "B"] = 3.6
    """By which tokens are counted; `megaphi data tokenize` prints yours."""
    max_drift: Annotated[float, "PSI"] | None = None
    """Population stability index above chance from which nothing is written."""

    def __post_init__(self) -> None:
        given = [self.threshold, self.keep_tokens, self.precision]
        if sum(value is not None for value in given) != 1:
            raise ValueError("give exactly one of `threshold`, `keep_tokens` and `precision`")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"`threshold` {self.threshold:g}: must be a score from 0 to 1")
        if self.keep_tokens is not None and self.keep_tokens < 1:
            raise ValueError(f"`keep_tokens` {self.keep_tokens}: at least 1 is needed")
        if not self.bytes_per_token > 0:
            raise ValueError(f"`bytes_per_token` {self.bytes_per_token:g}: must be positive")
        if self.max_drift is not None and not self.max_drift >= 0:
            raise ValueError(f"`max_drift` {self.max_drift:g}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class FilterRun:
    """Records -> the educational ones, each with its score, and drift.json."""

    records: Records
    filter: Annotated[Path, "DIR"]
    """Filter directory of `megaphi data train-filter`."""
    model: Annotated[Path, "DIR"] | None = None
    """Where the filter's embedding model is now."""
    options: Selection
    output: FilteredOutput
    engine: EngineOptions = field(default_factory=EngineOptions)
