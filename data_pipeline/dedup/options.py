"""Options of `dedup`."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from data_pipeline.runner.options import EngineOptions, FilteredOutput, Records


@dataclass(frozen=True, kw_only=True)
class DedupRun:
    """Records -> records without exact and near duplicates, and clusters.jsonl."""

    ALTERNATIVES: ClassVar = (("near", "exact_only"),)
    records: Records
    near: Annotated[float, "J"] = 0.85
    """Jaccard similarity of 5-word shingles from which documents are duplicates."""
    exact_only: bool = False
    """Look for equal texts alone."""
    output: FilteredOutput
    engine: EngineOptions = field(default_factory=EngineOptions)
