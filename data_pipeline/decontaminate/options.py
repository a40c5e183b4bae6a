"""Options of `decontaminate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from data_pipeline.runner.options import Count, EngineOptions, FilteredOutput, Form, Records

SHORT_STATEMENT = 8  # words of the shortest statement that counts
Rate = Annotated[float, "T"]


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Names of the fields of a benchmark; empty ones are found by the names of the known ones."""

    id_field: Annotated[str, "FIELD"] = ""
    """Field that identifies a problem; by default task_id."""
    text_field: Annotated[tuple[str, ...], "FIELD"] = ()
    """Field of prose that states it, may be repeated; by default prompt or text."""
    code_field: Annotated[str, "FIELD"] = ""
    """Field of its solution; by default canonical_solution, code or solution."""


@dataclass(frozen=True, kw_only=True)
class DecontaminateOptions:
    """What the output depends on, besides the records and the problems."""

    against: Annotated[tuple[Path, ...], "FILE", Form.SEVERAL]
    """HumanEval, MBPP or another benchmark: .jsonl, .jsonl.gz or .jsonl.zst."""
    fields: Fields = Fields()
    ngram: Count = 13
    """Words in a row that must not occur in both; 0 leaves this test out."""
    ast: bool = True
    """Compare functions with solutions."""
    tau: Annotated[tuple[float, ...], "T", Form.SEVERAL] = (0.95, 0.9, 0.85, 0.8)
    """Match rates of syntax trees that are reported."""
    drop_at: Rate = 0.95
    """Match rate from which a document is rejected."""
    min_nodes: Count = 12
    """Smallest solution compared: those of fewer nodes are too common to say anything."""
    embedding_model: Annotated[str, "hashed|DIR"] | None = None
    """Compare embeddings too: hashed, or of a run, checkpoint or Hugging Face directory."""
    embedding_distance: Rate | None = None
    """Distance of normalised embeddings, 0 to 2, up to which a document is rejected."""
    embedding_tokens: Count = 1024
    """Tokens of a text that the model reads."""

    def __post_init__(self) -> None:
        if not self.against:
            raise ValueError("`against`: at least one benchmark file is needed")
        if self.ngram != 0 and not SHORT_STATEMENT <= self.ngram <= 100:
            raise ValueError(f"`ngram` {self.ngram}: must be 0 (off) or {SHORT_STATEMENT} to 100")
        if not self.tau or not all(0.5 <= tau <= 1 for tau in self.tau):
            raise ValueError(f"`tau` {list(self.tau)}: match rates must be from 0.5 to 1")
        if self.drop_at < min(self.tau):
            raise ValueError(f"`drop_at` {self.drop_at:g}: is below the lowest `tau`")
        if not self.ngram and not self.ast and self.embedding_model is None:
            raise ValueError("`ngram` 0 without `ast`: nothing is left to compare")
        if (self.embedding_model is None) != (self.embedding_distance is None):
            raise ValueError("`embedding_model` and `embedding_distance` belong together")
        if self.embedding_distance is not None and not 0 <= self.embedding_distance <= 2:
            raise ValueError(
                f"`embedding_distance` {self.embedding_distance:g}: normalised embeddings are 0 to "
                "2 apart"
            )


@dataclass(frozen=True, kw_only=True)
class DecontaminateRun:
    """Records -> records without problems of benchmarks, and report.json, report.txt."""

    records: Records
    options: DecontaminateOptions
    output: FilteredOutput
    engine: EngineOptions = field(default_factory=EngineOptions)
