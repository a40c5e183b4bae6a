"""Options of `report`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from data_pipeline.runner.options import Count, EngineOptions, Form, Output, Records


@dataclass(frozen=True, kw_only=True)
class ReportRun:
    """Records -> report.json and report.html: repetition, diversity, coverage."""

    records: Records
    before: Annotated[tuple[Path, ...], "RECORDS_DIR", Form.SEVERAL] = ()
    """Another corpus to compare with, such as the one before a stage."""
    examples: Count = 200
    """Documents of each corpus to quote."""
    output: Output
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise ValueError(f"`examples` {self.examples}: at least 1 is needed")
