"""What a function is called and how its docstring says what it does, in eleven styles.

Phrases are nouns ("the even numbers in X"), so that compositions nest ("the sum of the even numbers
in numbers") or are told step by step, and every style builds its sentences from them.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.small_programs.values import DESCRIPTIONS
from data_pipeline.small_programs.world import Composition

_INPUT = re.compile(r"\bX\b")
EXAMPLE_SHARE = 0.7


@dataclass(frozen=True, kw_only=True)
class Telling:
    """What a docstring is made of.

    Attributes:
        composition: what the function does.
        phrases: one of each step, with X for its input.
        parameter: name of the parameter.
        examples: inputs and outputs that may be shown.
    """

    composition: Composition
    phrases: tuple[str, ...]
    parameter: str
    examples: tuple[tuple[Any, Any], ...]

    @property
    def nested(self) -> str:
        """The composition in one phrase."""
        return nest(self.phrases, self.parameter)

    @property
    def input(self) -> str:
        """`a list of integers`."""
        return DESCRIPTIONS[self.composition[0].takes]

    @property
    def output(self) -> str:
        """`an integer`."""
        return DESCRIPTIONS[self.composition[-1].gives]

    @property
    def notes(self) -> str:
        """What the steps do on odd input, a sentence each, led by a space; or nothing."""
        notes = dict.fromkeys(step.note for step in self.composition if step.note)
        return "".join(f" {note}" for note in notes)


def nest(phrases: Sequence[str], inner: str) -> str:
    """Phrases put into each other, the first one innermost."""
    for phrase in phrases:
        inner = put(phrase, inner)
    return inner


def put(phrase: str, inner: str) -> str:
    """A phrase about something."""
    if inner.startswith("whether "):
        inner = "the statement that " + inner.removeprefix("whether ")
    return _INPUT.sub(lambda _: inner, phrase)


def _imperative(told: Telling, rng: random.Random) -> str:
    return f"Return {told.nested}.{told.notes}"


def _arguments(told: Telling, rng: random.Random) -> str:
    return (
        f"Return {told.nested}.{told.notes}\n\nArgs:\n    {told.parameter}: {told.input}\n\n"
        f"Returns:\n    {told.output}"
    )


def _given(told: Telling, rng: random.Random) -> str:
    return f"Given {told.input} {told.parameter}, return {told.nested}.{told.notes}"


def _question(told: Telling, rng: random.Random) -> str:
    nested = told.nested
    if nested.startswith(("whether ", "how ", "where ")):
        return f"Can you tell {nested}?{told.notes}"
    many = told.composition[-1].gives in ("ints", "strs") and nested.startswith("the ")
    return f"What {'are' if many else 'is'} {nested}?{told.notes}"


def _steps(told: Telling, rng: random.Random) -> str:
    if len(told.phrases) == 1:
        return f"Find {told.nested} and return it.{told.notes}"
    first, *later = told.phrases
    parts = [f"First find {put(first, told.parameter)}."]
    parts += [f"Then find {put(phrase, 'the result')}." for phrase in later[:-1]]
    return " ".join([*parts, f"Then return {put(later[-1], 'the result')}."]) + told.notes


def _terse(told: Telling, rng: random.Random) -> str:
    nested = told.nested
    if nested.startswith(told.parameter):
        return f"{nested}.{told.notes}"
    return f"{nested[0].upper()}{nested[1:]}.{told.notes}"


def _chatty(told: Telling, rng: random.Random) -> str:
    opening = rng.choice(("I have", "Suppose there is", "Someone gives us"))
    wish = rng.choice(("I would like to know", "What I need is", "Please work out"))
    return f"{opening} {told.input} called {told.parameter}. {wish} {told.nested}.{told.notes}"


def _example_in_words(told: Telling, rng: random.Random) -> str:
    shown, result = told.examples[0]
    return f"Return {told.nested}.{told.notes} For example, {shown!r} gives {result!r}."


def _third_person(told: Telling, rng: random.Random) -> str:
    verb = "Tells" if told.nested.startswith(("whether ", "how ", "where ")) else "Computes"
    return f"{verb} {told.nested}.{told.notes}"


def _labelled(told: Telling, rng: random.Random) -> str:
    return f"Input: {told.input} {told.parameter}\nOutput: {told.nested}.{told.notes}"


def _examples_only(told: Telling, rng: random.Random) -> str:
    return ""


STYLES: tuple[Callable[[Telling, random.Random], str], ...] = (
    _imperative, _given, _question, _steps, _arguments, _terse, _example_in_words, _examples_only,
    _chatty, _third_person, _labelled,
)  # fmt: skip


def docstring(
    told: Telling, function: str, style: int, rng: random.Random, *, least_examples: int = 0
) -> str:
    """The text of a docstring, with examples for `doctest` where they are drawn.

    Args:
        told: what it says.
        function: name of the function, for the examples.
        style: index in `STYLES`.
        rng: of the sample.
        least_examples: so many are shown, where there are.
    """
    write = STYLES[style]
    text = write(told, rng)
    if write is _examples_only:
        shown = told.examples
    else:
        drawn = 0 if write is _example_in_words or rng.random() > EXAMPLE_SHARE else 1
        drawn += drawn and rng.randrange(2)
        shown = told.examples[: max(drawn, least_examples)]
    lines = [text] if text else []
    for value, result in shown:
        lines += [f">>> {function}({value!r})", repr(result)]
    return "\n".join(lines)


def function_name(composition: Composition, parameter: str, rng: random.Random, names: int) -> str:
    """A name: the steps in order, or one that says little where several styles are in use."""
    steps = [step.name for step in composition]
    plain = "_".join(steps)
    if names == 1:
        return plain
    verb = rng.choice(("solve", "process", "compute", "work_on"))
    return rng.choice((plain, plain, "_then_".join(steps), f"{verb}_{parameter}"))
