"""The options of a composition, and the worlds that they start from.

A world names a size: how many primitives, how deep compositions go, how many ways there are to say
and to write the same thing. Options left out are those of the world.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

Kind = Literal["exercises", "textbooks", "suite"]
KINDS: tuple[Kind, ...] = ("exercises", "textbooks", "suite")
GROUPS = ("depth-1", "depth-2", "depth-3", "depth-4", "held-out-depth-2", "held-out-depth-3",
          "held-out-depth-4", "held-out-phrasing", "textbook-only")  # fmt: skip
MAX_DEPTH = 4

WORLDS: dict[str, dict[str, Any]] = {
    "quickstart": {
        "primitives": 30, "textbook_only": 0, "depth": 2, "phrasings": 2, "styles": 4,
        "parameter_names": 1, "idioms": 2, "type_hints": False,
    },
    "figure": {
        "primitives": 80, "textbook_only": 6, "depth": 3, "phrasings": 3, "styles": 8,
        "parameter_names": 2, "idioms": 3, "type_hints": True,
    },
    "full": {
        "primitives": 0, "textbook_only": 12, "depth": 4, "phrasings": 0, "styles": 0,
        "parameter_names": 0, "idioms": 0, "type_hints": True,
    },
}  # fmt: skip
"""Sizes by name; 0 stands for all there are, except in `textbook_only`."""


@dataclass(frozen=True, kw_only=True)
class ComposeOptions:
    """What the output depends on."""

    kind: Kind
    """What to compose: exercises, textbooks or a suite."""
    samples: int
    """How many."""
    seed: int = 1234
    """Seed of everything that is drawn."""
    world: str = "full"
    """Where the options below start from: quickstart, figure or full."""
    primitives: int | None = None
    """Number of primitive operations; 0 for all."""
    textbook_only: int | None = None
    """Number of primitives that textbooks explain and no exercise uses."""
    depth: int | None = None
    """Most operations in one function, 1 to 4."""
    phrasings: int | None = None
    """Ways to say an operation; 0 for all that are not held out."""
    styles: int | None = None
    """Styles of docstring; 0 for all."""
    parameter_names: int | None = None
    """Names for a parameter of each type; 0 for all."""
    idioms: int | None = None
    """Ways to write an operation; 0 for all."""
    type_hints: bool | None = None
    """Annotate parameters and results."""
    compositions: int = 0
    """Use only so many different compositions (narrowness); 0 sets no limit."""
    wrong: float = 0.0
    """Share of exercises whose body does something else than they say, 0 to 1."""
    repetition: int = 1
    """How often each text occurs."""
    groups: tuple[str, ...] = ()
    """Groups of a suite, in equal shares; by default all whose problems no training text holds."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind}: must be one of {', '.join(KINDS)}")
        if self.world not in WORLDS:
            raise ValueError(f"world {self.world}: must be one of {', '.join(WORLDS)}")
        if self.samples < 1:
            raise ValueError(f"samples {self.samples}: at least 1 is needed")
        if self.repetition < 1:
            raise ValueError(f"repetition {self.repetition}: at least 1 is needed")
        if not 0 <= self.wrong <= 1:
            raise ValueError(f"wrong {self.wrong}: must be a share from 0 to 1")
        if self.depth is not None and not 1 <= self.depth <= MAX_DEPTH:
            raise ValueError(f"depth {self.depth}: must be 1 to {MAX_DEPTH}")
        for name in ("primitives", "textbook_only", "phrasings", "styles", "parameter_names",
                     "idioms", "compositions"):  # fmt: skip
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: must not be negative")
        for group in self.groups:
            if group not in GROUPS:
                raise ValueError(f"group {group}: must be one of {', '.join(GROUPS)}")
        self._refuse_what_has_no_effect()

    def _refuse_what_has_no_effect(self) -> None:
        fits = {
            "wrong": ("exercises",),
            "repetition": ("exercises", "textbooks"),
            "compositions": ("exercises", "textbooks"),
            "groups": ("suite",),
        }
        default = {field.name: field.default for field in fields(self)}
        for name, kinds in fits.items():
            if getattr(self, name) != default[name] and self.kind not in kinds:
                raise ValueError(f"{name}: has no effect on {self.kind}, only on {kinds[0]}")

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
