"""Suites in HumanEval's form: problems that no training text of the world holds, by group.

`depth-N` are compositions that exercises may hold, in a prompt drawn anew; `held-out-depth-N` are
compositions that no text holds; `held-out-phrasing` says every step in words that no text has;
`textbook-only` are primitives that no exercise uses. Tests hold inputs of every shape, and for each
operation that a step could be mistaken for an input that tells them apart.
"""

import json
import random
from collections.abc import Iterator
from typing import Any, get_args

from data_pipeline.small_programs.exercise import NUM_INPUTS, Function, draw_inputs, write_function
from data_pipeline.small_programs.options import ComposeOptions, Group
from data_pipeline.small_programs.world import (
    TOO_WIDE,
    Composition,
    World,
    probes,
    run,
    world_of,
)

LEAST_EXAMPLES = 2  # drawn anew, so that no prompt of one operation is that of an exercise
MAX_TRIES = 100  # at a prompt that no other problem has
MAX_TESTS = 16
SUITE_NAME = "SmallPrograms"


def default_groups(world: World) -> tuple[Group, ...]:
    """The groups of which no problem's function, or no wording, is in any training text."""
    usual = [
        group for group in get_args(Group) if not group.startswith("depth-") or group[-1] == "1"
    ]
    return tuple(group for group in usual if not _missing(group, world))


def make_suite(options: ComposeOptions) -> Iterator[dict[str, Any]]:
    """Yield the rows of a suite; the groups take turns.

    Raises:
        ValueError: a group has no problem in this world, or too few.
    """
    options = options.resolved()
    world = world_of(options.world_key())
    groups = options.groups or default_groups(world)
    for group in groups:
        if reason := _missing(group, world):
            raise ValueError(f"`groups` {group}: {reason}")
    seen: set[str] = set()
    for number in range(options.samples):
        rng = random.Random(f"{options.seed}/suite/{number}")
        group = groups[number % len(groups)]
        function = _new_problem(group, world, rng, seen)
        yield {
            "task_id": f"{SUITE_NAME}/{number}",
            "prompt": function.prompt,
            "entry_point": function.name,
            "canonical_solution": function.body,
            "test": write_test(function, world, rng),
            "group": group,
            "depth": len(function.composition),
            "composition": [step.name for step in function.composition],
        }


def _missing(group: Group, world: World) -> str:
    """Why a world has no problems of a group; empty if it has."""
    if group == "textbook-only" and not world.textbook_only:
        return "the world has no such primitive; see `textbook_only`"
    if group[-1].isdecimal() and int(group[-1]) > world.depth:
        return f"is deeper than the world, which has {world.depth}"
    return ""


def _new_problem(group: Group, world: World, rng: random.Random, seen: set[str]) -> Function:
    """A function whose prompt is new.

    Raises:
        ValueError: there is none.
    """
    for _ in range(MAX_TRIES):
        composition = _composition(group, world, rng)
        phrases = None
        if group == "held-out-phrasing":
            phrases = tuple(step.phrasings[-1] for step in composition)
        if composition[0].takes == "bool":
            continue  # two inputs leave nothing to ask that was not shown
        function = write_function(
            composition, world, rng, phrases=phrases, least_examples=LEAST_EXAMPLES
        )
        if phrases is not None and not any(_words_of(p, function.prompt) for p in phrases):
            continue  # a style that shows examples alone says nothing
        if function.prompt not in seen:
            seen.add(function.prompt)
            return function
    raise ValueError(f"`samples`: this world has too few problems of group {group}")


def _words_of(phrase: str, prompt: str) -> bool:
    """Whether a prompt holds a phrase, up to what it is about."""
    longest = max(phrase.split("X"), key=len).strip()
    return longest in prompt


def _composition(group: Group, world: World, rng: random.Random) -> Composition:
    if group == "textbook-only":
        return (rng.choice(world.textbook_only),)
    if group == "held-out-phrasing":
        return world.draw_any(rng, min(world.depth, 2))
    depth, held_out = int(group[-1]), group.startswith("held-out")
    found = world.draw(depth, rng, held_out=held_out)
    if found is None:
        raise ValueError(f"`groups` {group}: this world has no such composition")
    return found


def write_test(function: Function, world: World, rng: random.Random) -> str:
    """`check(candidate)` on inputs of every shape that tell the function from its neighbours."""
    composition = function.composition
    inputs = draw_inputs(composition, rng, NUM_INPUTS)
    for other in world.confusions(composition):
        if len(inputs) >= MAX_TESTS:
            break
        if not any(_differ(composition, other, value) for value in inputs):
            telling = [v for v in probes(composition[0].takes) if _differ(composition, other, v)]
            inputs += telling[:1]
    lines = ["def check(candidate):"]
    for value in inputs:
        result = run(composition, value)
        if isinstance(result, float):
            lines.append(f"    assert abs(candidate({value!r}) - {result!r}) < 1e-6")
        else:
            lines.append(f"    assert candidate({value!r}) == {result!r}")
    return "\n".join(lines) + "\n"


def _differ(one: Composition, other: Composition, value: Any) -> bool:
    right, mistaken = run(one, value), run(other, value)
    wide = TOO_WIDE in (right, mistaken)
    return not wide and repr(right) != repr(mistaken)


def row_line(row: dict[str, Any]) -> bytes:
    """The JSON line of a row."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
