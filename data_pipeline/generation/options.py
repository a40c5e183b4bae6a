"""Options of the stages that plan, generate and execute."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from data_pipeline.llm.options import Asking
from data_pipeline.runner.options import (
    Count,
    EngineOptions,
    FilteredOutput,
    Form,
    Output,
    Records,
    RecordsOutput,
    Seconds,
    Seed,
    Share,
)


@dataclass(frozen=True, kw_only=True)
class PlanOutput(Output):
    """What is made."""

    out: Annotated[Path, "PLAN.jsonl"]
    """Plan to create."""


@dataclass(frozen=True, kw_only=True)
class PlanRun:
    """Lists of topics, audiences, names, ... -> a plan of what to generate."""

    kind: Literal["textbooks", "exercises"]
    """What is generated."""
    samples: Count
    """How many."""
    lists: Annotated[Path, "FILE"] | None = None
    """YAML lists instead of ours: FIELD: [VALUE, ...]."""
    seed: Seed = 1234
    """Random seed of the combinations."""
    output: PlanOutput


@dataclass(frozen=True, kw_only=True)
class WritingOptions:
    """What is asked for and what is accepted."""

    max_tokens: Count = 1024
    """Most tokens of an answer."""
    temperature: Annotated[float, "T"] = 1.0
    """Temperature of the sampling."""
    seed: Seed | None = None
    """Random seed that is sent to the server."""
    min_words: Count = 80
    """Fewest words of prose in a textbook section."""
    window: Count = 1000
    """Samples per point of the growth curve."""
    stop_below: Share = 0.0
    """Stop paying once fewer of a window's sound samples than this are new."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` {getattr(self, name)}: at least 1 is needed")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"`temperature` {self.temperature}: must be from 0 to 2")
        if not 0 <= self.stop_below <= 1:
            raise ValueError(f"`stop_below` {self.stop_below}: must be a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class GenerateRun:
    """A plan -> records: textbook sections and exercises written by a language model.

    Answers are kept in a ledger: no prompt is paid for twice.
    """

    plan: Annotated[Path, "PLAN.jsonl", Form.POSITIONAL]
    options: WritingOptions = WritingOptions()
    prompt: Annotated[Path, "FILE"] | None = None
    """Template with the plan's $fields."""
    partial: bool = False
    """Publish what there is when the cost cap is reached."""
    tokenizer: Annotated[str, "NAME_OR_DIR"] | None = None
    """Count prompt tokens with it in the estimate (the cap keeps reserving their bytes)."""
    output: RecordsOutput
    asking: Asking

    def __post_init__(self) -> None:
        if len(self.asking.server.model) > 1:
            raise ValueError("`model`: one model writes; run again for another, with another `out`")


@dataclass(frozen=True, kw_only=True)
class ExecuteRun:
    """Records -> the same without exercises that fail: in their definitions or doctests."""

    records: Records
    timeout: Seconds = 3.0
    """Processor time of a program."""
    package: Annotated[tuple[str, ...], "NAME"] | None = None
    """Package that programs may import, may be repeated; '' for none (default: numpy, where it is
    installed)."""
    memory_mib: Count = 1024
    """Memory of a program."""
    unsafe_no_sandbox: bool = False
    """Run model-written code with your own rights."""
    output: FilteredOutput
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if not (0 < self.timeout <= 3600 and self.memory_mib > 0):
            raise ValueError("`timeout` and `memory_mib` must be above 0")
