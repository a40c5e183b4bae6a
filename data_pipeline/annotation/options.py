"""Options of `annotate`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from data_pipeline.llm.options import Asking
from data_pipeline.runner.options import Count, Records, RecordsOutput, Seed, Share


@dataclass(frozen=True, kw_only=True)
class JudgingOptions:
    """What is judged, and how."""

    samples: Count
    """How many documents to judge."""
    seed: Seed = 1234
    """Random seed of the sample; also sent to the server."""
    question: Annotated[str, "TEXT"] | None = None
    """What to determine (default: the sentence of phi-1)."""
    answers: Literal["schema", "text"] = "schema"
    """schema: the server constrains answers to a JSON schema; text: for those that cannot."""
    max_chars: Count = 8000
    """Characters of a document that the annotator sees."""
    batch_documents: Count = 50
    """Documents between canaries."""
    min_canaries: Share = 0.8
    """Share of the canaries that an annotator must judge rightly."""

    def __post_init__(self) -> None:
        for name in ("samples", "max_chars", "batch_documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` {getattr(self, name)}: at least 1 is needed")
        if not 0 <= self.min_canaries <= 1:
            raise ValueError(f"`min_canaries` {self.min_canaries}: must be a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class AnnotateRun:
    """Records -> a sample, judged for educational value by a language model.

    Answers are kept in a ledger: no prompt is paid for twice.
    """

    records: Records
    options: JudgingOptions
    output: RecordsOutput
    asking: Asking
