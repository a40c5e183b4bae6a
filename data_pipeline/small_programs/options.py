"""The options of a composition, and the worlds that they start from.

A world names a size: how many primitives, how deep compositions go, how many ways there are to say
and to write the same thing. Options left out are those of the world.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from data_pipeline.runner.options import Count, EngineOptions, Form, PartsOutput, Seed, Share

Kind = Literal["exercises", "textbooks", "suite"]
WorldName = Literal["quickstart", "figure", "full"]
Answer = Literal["yes", "no"]
Group = Literal[
    "depth-1",
    "depth-2",
    "depth-3",
    "depth-4",
    "held-out-depth-2",
    "held-out-depth-3",
    "held-out-depth-4",
    "held-out-phrasing",
    "textbook-only",
]
MAX_DEPTH = 4

WORLDS: dict[str, dict[str, Any]] = {
    "quickstart": {
        "primitives": 30, "textbook_only": 0, "depth": 2, "phrasings": 2, "styles": 4,
        "parameter_names": 1, "idioms": 2, "type_hints": "no",
    },
    "figure": {
        "primitives": 80, "textbook_only": 6, "depth": 3, "phrasings": 3, "styles": 8,
        "parameter_names": 2, "idioms": 3, "type_hints": "yes",
    },
    "full": {
        "primitives": 0, "textbook_only": 12, "depth": 4, "phrasings": 0, "styles": 0,
        "parameter_names": 0, "idioms": 0, "type_hints": "yes",
    },
}  # fmt: skip
"""Sizes by name; 0 stands for all there are, except in `textbook_only`."""


@dataclass(frozen=True, kw_only=True)
class ComposeOptions:
    """What the output depends on."""

    kind: Kind
    """What to compose."""
    samples: Count
    """How many."""
    seed: Seed = 1234
    """Seed of everything that is drawn."""
    world: WorldName = "full"
    """Size of the world: options that are not given are those of this one."""
    primitives: Count | None = None
    """Number of primitive operations; 0 for all."""
    textbook_only: Count | None = None
    """Number of primitives that textbooks explain and no exercise uses."""
    depth: Count | None = None
    """Most operations in one function, 1 to 4."""
    phrasings: Count | None = None
    """Ways to say an operation; 0 for all that are not held out."""
    styles: Count | None = None
    """Styles of docstring; 0 for all."""
    parameter_names: Count | None = None
    """Names for a parameter of each type; 0 for all."""
    idioms: Count | None = None
    """Ways to write an operation; 0 for all."""
    type_hints: Answer | None = None
    """Annotate parameters and results."""
    compositions: Count = 0
    """Use only so many different compositions (narrowness); 0 sets no limit."""
    wrong: Share = 0.0
    """Share of exercises whose body does something else than they say, 0 to 1."""
    repetition: Count = 1
    """How often each text occurs."""
    groups: Annotated[tuple[Group, ...], "GROUP", Form.COMMAS] = ()
    """Groups of a suite, in equal shares: depth-N, held-out-depth-N, held-out-phrasing,
    textbook-only; by default all but depth-N above 1."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"`kind` {self.kind}: must be one of {', '.join(get_args(Kind))}")
        if self.world not in WORLDS:
            raise ValueError(f"`world` {self.world}: must be one of {', '.join(WORLDS)}")
        if self.samples < 1:
            raise ValueError(f"`samples` {self.samples}: at least 1 is needed")
        if self.repetition < 1:
            raise ValueError(f"`repetition` {self.repetition}: at least 1 is needed")
        if not 0 <= self.wrong <= 1:
            raise ValueError(f"`wrong` {self.wrong}: must be a share from 0 to 1")
        if self.depth is not None and not 1 <= self.depth <= MAX_DEPTH:
            raise ValueError(f"`depth` {self.depth}: must be 1 to {MAX_DEPTH}")
        for name in ("primitives", "textbook_only", "phrasings", "styles", "parameter_names",
                     "idioms", "compositions"):  # fmt: skip
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"`{name}` {getattr(self, name)}: must not be negative")
        for group in self.groups:
            if group not in get_args(Group):
                raise ValueError(f"`groups` {group}: must be one of {', '.join(get_args(Group))}")
        self._refuse_what_has_no_effect()

    def _refuse_what_has_no_effect(self) -> None:
        fits = {
            "wrong": ("exercises",),
            "repetition": ("exercises", "textbooks"),
            "compositions": ("exercises", "textbooks"),
            "groups": ("suite",),
        }
        default = {each.name: each.default for each in fields(self)}
        for name, kinds in fits.items():
            if getattr(self, name) != default[name] and self.kind not in kinds:
                raise ValueError(f"`{name}`: has no effect on {self.kind}, only on {kinds[0]}")

    def resolved(self) -> "ComposeOptions":
        """The same with the world's values where none was given."""
        missing = {n: v for n, v in WORLDS[self.world].items() if getattr(self, n) is None}
        return replace(self, **missing)

    def world_key(self) -> "ComposeOptions":
        """What the world itself depends on, whatever is composed in it."""
        return replace(
            self.resolved(), kind="exercises", samples=1, seed=0, world="full",
            compositions=0, wrong=0.0, repetition=1, groups=(),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ComposeOutput(PartsOutput):
    """What is made."""

    out: Annotated[Path, "DIR|SUITE.jsonl"]
    """Records directory to create, or the file of a suite."""
    max_reject: Share = 0.0
    """Share of rejected documents; none is ever rejected."""


@dataclass(frozen=True, kw_only=True)
class ComposeRun:
    """A small world of programs -> records of exercises or textbook sections, or a suite.

    Records are made by as many processes as are wanted, a suite by one.
    """

    options: ComposeOptions
    output: ComposeOutput
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if self.options.kind == "suite":
            for name in ("zstd", "max_reject"):
                if getattr(self.output, name):
                    raise ValueError(f"`{name}`: has no effect on a suite, only on records")
