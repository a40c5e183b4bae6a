"""Options of `heuristics`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from data_pipeline.runner.options import EngineOptions, FilteredOutput, Records

Treatment = Literal["redact", "reject", "keep"]
TREATMENTS: tuple[Treatment, ...] = get_args(Treatment)


@dataclass(frozen=True, kw_only=True)
class HeuristicsOptions:
    """What the output depends on, besides the records."""

    thresholds: Annotated[Path, "FILE"] | None = None
    """YAML rules instead of ours; records that carry signals are not parsed again."""
    signals_only: bool = False
    """Apply no rule."""
    secrets: Treatment = "redact"
    """What to do about keys, tokens and passwords."""
    pii: Treatment = "redact"
    """What to do about e-mail and public IP addresses."""
    detect_secrets: bool = True
    """Find secrets by the plugins of detect-secrets, too, not by our own rules alone."""

    def __post_init__(self) -> None:
        for name in ("secrets", "pii"):
            if getattr(self, name) not in TREATMENTS:
                raise ValueError(f"`{name}` {getattr(self, name)}: one of {', '.join(TREATMENTS)}")


@dataclass(frozen=True, kw_only=True)
class HeuristicsRun:
    """Records -> records with signals, without secrets, within thresholds."""

    records: Records
    options: HeuristicsOptions = HeuristicsOptions()
    output: FilteredOutput
    engine: EngineOptions = field(default_factory=EngineOptions)
