"""The compositions of a world: which there are, what they do, and which are held out.

A composition is a tuple of primitives, each taking what the one before gives. What it does is its
outputs on a fixed set of inputs, its fingerprint; two compositions with one fingerprint count as
one function. A fifth of the functions that need two primitives or more are held out of all training
text, chosen by a hash of the fingerprint: by behaviour, so the same in every world, for every seed,
and however they are written. A step that changes nothing makes a composition idle; those are left
out altogether.
"""

import functools
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from data_pipeline.small_programs.options import ComposeOptions
from data_pipeline.small_programs.primitives import Primitive, all_primitives
from data_pipeline.small_programs.values import SHAPES, TYPES, draw, fits, size_of

Composition = tuple[Primitive, ...]
PROBES = 32
HELD_OUT_ONE_IN = 5
MATTERS_AT = 3  # probes on which leaving a step out must show
SLACK = 4  # fingerprints look further than texts go, so that width hides no likeness
MAX_DRAWS = 400  # tries at a composition before a shorter one is taken


class TooWide:
    """Stands for a value that outgrew the world."""

    def __repr__(self) -> str:
        return "too wide"


TOO_WIDE = TooWide()


@functools.cache
def probes(kind: str) -> tuple[Any, ...]:
    """The fixed inputs of a type on which fingerprints are taken."""
    if kind == "bool":
        return (False, True)
    rng = random.Random(f"probes/{kind}")
    return tuple(draw(kind, SHAPES[i % len(SHAPES)], rng) for i in range(PROBES))


def run(composition: Sequence[Primitive], value: Any, slack: int = 1) -> Any:
    """What a composition means for an input, by the reference; `TOO_WIDE` where it outgrows."""
    for step in composition:
        if step.limit is not None and size_of(value) > step.limit * slack:
            return TOO_WIDE
        value = step.meaning(value)
        if not fits(value, slack):
            return TOO_WIDE
    return value


@functools.cache
def outputs(composition: Composition) -> tuple[str, ...]:
    """The results on the probes, written out."""
    return tuple(repr(run(composition, value, SLACK)) for value in probes(composition[0].takes))


def fingerprint(composition: Composition) -> tuple[str, str, tuple[str, ...]]:
    """What a composition does; equal for compositions that do the same."""
    return composition[0].takes, composition[-1].gives, outputs(composition)


@functools.cache
def is_held_out(composition: Composition) -> bool:
    """Whether no training text may hold a function that does this."""
    takes, gives, results = fingerprint(composition)
    if len(composition) < 2 or results in _singles().get((takes, gives), ()):
        return False
    digest = hashlib.sha256("\n".join((takes, gives, *results)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def differences(one: Sequence[str], other: Sequence[str]) -> int:
    """On how many probes results differ, as far as both are known."""
    wide = repr(TOO_WIDE)
    return sum(a != b and wide not in (a, b) for a, b in zip(one, other, strict=True))


@functools.cache
def _singles() -> dict[tuple[str, str], list[tuple[str, ...]]]:
    """Results of single primitives, and of doing nothing, by input and output type."""
    found: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for primitive in all_primitives().values():
        found.setdefault((primitive.takes, primitive.gives), []).append(outputs((primitive,)))
    for kind in TYPES:
        found.setdefault((kind, kind), []).append(tuple(map(repr, probes(kind))))
    return found


@functools.cache
def is_worthwhile(composition: Composition) -> bool:
    """Whether every step matters, values stay narrow, and the result depends on the input."""
    if len(composition) == 1:
        return True
    takes, gives, results = fingerprint(composition)
    wide = sum(run(composition, value) is TOO_WIDE for value in probes(takes))
    commonest = Counter(results).most_common(1)[0][1]
    if 3 * wide > len(results) or 5 * commonest > 4 * len(results):
        return False
    least = min(MATTERS_AT, len(results) // 2)
    shorter = list(_singles().get((takes, gives), ()))
    for size in range(2, len(composition)):
        for part in itertools.combinations(composition, size):
            if (part[0].takes, part[-1].gives) == (takes, gives) and all(
                a.gives == b.takes for a, b in itertools.pairwise(part)
            ):
                shorter.append(outputs(part))
    return all(differences(results, other) >= least for other in shorter)


class World:
    """The primitives that the options choose, and draws of their compositions.

    Args:
        options: resolved; see `ComposeOptions.resolved`.
    """

    def __init__(self, options: ComposeOptions) -> None:
        everything = list(all_primitives().values())
        count = options.primitives or len(everything)
        if count > len(everything):
            raise ValueError(f"`primitives` {count}: there are {len(everything)}")
        self.options = options
        self.depth = options.depth or 1
        chosen = everything[:count]
        kept_back = self._kept_back(chosen, options.textbook_only or 0)
        self.textbook_only = [primitive for primitive in chosen if primitive in kept_back]
        self.exercised = [primitive for primitive in chosen if primitive not in kept_back]
        if not self.exercised:
            raise ValueError(f"`textbook_only` {options.textbook_only}: leaves no primitive")
        self._by_type: dict[str, list[Primitive]] = {}
        for primitive in self.exercised:
            self._by_type.setdefault(primitive.takes, []).append(primitive)

    @staticmethod
    def _kept_back(chosen: list[Primitive], count: int) -> list[Primitive]:
        """The primitives that only textbooks have, spread over the world by a hash."""
        return sorted(chosen, key=lambda p: hashlib.sha256(p.name.encode()).digest())[:count]

    def draw(self, depth: int, rng: random.Random, *, held_out: bool) -> Composition | None:
        """A composition of the exercises' primitives; None if one was not found in time."""
        for _ in range(MAX_DRAWS):
            steps: list[Primitive] = [rng.choice(self.exercised)]
            while len(steps) < depth:
                following = self._by_type.get(steps[-1].gives)
                if not following:
                    break
                steps.append(rng.choice(following))
            found = tuple(steps)
            if len(found) == depth and is_worthwhile(found) and is_held_out(found) == held_out:
                return found
        return None

    def draw_any(self, rng: random.Random, deepest: int) -> Composition:
        """A composition that may be taught, of 1 to `deepest` steps, deeper ones more often."""
        ranks = [depth for depth in range(1, deepest + 1) for _ in range(depth)]
        for depth in range(rng.choice(ranks), 0, -1):
            found = self.draw(depth, rng, held_out=False)
            if found is not None:
                return found
        return (rng.choice(self.exercised),)

    def distinct(self, count: int, rng: random.Random, deepest: int) -> list[Composition]:
        """So many different compositions that may be taught.

        Raises:
            ValueError: no more new ones are found; a small world has only so many.
        """
        found: dict[Composition, None] = {}
        for _ in range(50 * count + 1000):
            found[self.draw_any(rng, deepest)] = None
            if len(found) == count:
                return list(found)
        raise ValueError(f"`compositions` {count}: only {len(found)} were found in this world")

    def confusions(self, composition: Composition) -> list[Composition]:
        """Compositions with one step exchanged that do something else, and may be written."""
        found = []
        for place, step in enumerate(composition):
            for other in self.exercised:
                if other is step or (other.takes, other.gives) != (step.takes, step.gives):
                    continue
                changed = (*composition[:place], other, *composition[place + 1 :])
                if outputs(changed) != outputs(composition) and not is_held_out(changed):
                    found.append(changed)
        return found


@functools.cache
def world_of(key: ComposeOptions) -> World:
    """The world of `ComposeOptions.world_key`, once per process."""
    return World(key)
