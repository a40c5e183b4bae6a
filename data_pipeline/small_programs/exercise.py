"""Exercises: a function with its docstring and a body that was run before it is written."""

import contextlib
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.small_programs.body import INDENT, write_body
from data_pipeline.small_programs.options import ComposeOptions
from data_pipeline.small_programs.values import (
    HINTS,
    MAX_EXAMPLE,
    PARAMETERS,
    SHAPES,
    draw,
)
from data_pipeline.small_programs.wording import STYLES, Telling, docstring, function_name
from data_pipeline.small_programs.world import TOO_WIDE, Composition, World, run
from megaphi.errors import RunError

MAX_SECONDS = 5.0  # of processor time for all runs of one function, which take microseconds
NUM_INPUTS = 8
NUM_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function that has been run.

    Attributes:
        name: of it.
        prompt: its head and docstring.
        body: what follows, indented.
        inputs: on which it was run; none is wider than the world.
        composition: what its docstring says.
        written: what its body does, another composition where it is wrong on purpose.
    """

    name: str
    prompt: str
    body: str
    inputs: tuple[Any, ...]
    composition: Composition
    written: Composition

    @property
    def text(self) -> str:
        """The complete function."""
        return self.prompt + self.body


def draw_inputs(composition: Composition, rng: random.Random, count: int) -> list[Any]:
    """Different inputs of different shapes, on all of which the composition stays narrow."""
    kind = composition[0].takes
    if kind == "bool":
        return [True, False]
    found: dict[str, Any] = {}
    for number in range(4 * count):
        shape = "odd" if number >= 2 * count else SHAPES[number % len(SHAPES)]
        value = draw(kind, shape, rng)
        if repr(value) not in found and run(composition, value) is not TOO_WIDE:
            found[repr(value)] = value
        if len(found) == count:
            break
    return list(found.values())


def write_function(
    composition: Composition,
    world: World,
    rng: random.Random,
    *,
    written: Composition | None = None,
    phrases: tuple[str, ...] | None = None,
    least_examples: int = 0,
) -> Function:
    """Write a function and run it.

    Args:
        composition: what its docstring says.
        world: for the options.
        rng: of the sample.
        written: what its body does, where that is something else.
        phrases: what to say about each step; by default drawn of those that are not held out.
        least_examples: so many are shown, where there are.

    Raises:
        RunError: the code disagrees with the reference or does not end, which is a fault of the
            primitives' table.
    """
    options = world.options
    names = options.parameter_names or 0
    pool = PARAMETERS[composition[0].takes]
    parameter = rng.choice(pool[:names] if names else pool)
    name = function_name(composition, parameter, rng, names)
    body = write_body(
        written or composition, name, parameter, rng, idioms=options.idioms or 0, names=names
    )
    if phrases is None:
        phrases = draw_phrases(composition, options, rng)
    inputs = draw_inputs(composition, rng, NUM_INPUTS)
    shown = [
        (value, result)
        for value in inputs
        if len(repr(value)) <= MAX_EXAMPLE
        and len(repr(result := run(composition, value))) <= MAX_EXAMPLE
    ]
    shown.sort(key=lambda example: not example[0])  # an empty input comes last
    told = Telling(
        composition=composition,
        phrases=phrases,
        parameter=parameter,
        examples=tuple(shown[:NUM_EXAMPLES]),
    )
    styles = len(STYLES) if not options.styles else min(options.styles, len(STYLES))
    style = rng.randrange(styles) if shown else 0
    text = docstring(told, name, style, rng, least_examples=least_examples)
    head = f"def {name}({parameter}):"
    if options.type_hints == "yes":
        takes, gives = HINTS[composition[0].takes], HINTS[composition[-1].gives]
        head = f"def {name}({parameter}: {takes}) -> {gives}:"
    function = Function(
        name=name,
        prompt=f"{head}\n{_quoted(text)}",
        body="".join(f"{INDENT}{line}\n" for line in body),
        inputs=tuple(inputs),
        composition=composition,
        written=written or composition,
    )
    check(function)
    return function


def draw_phrases(
    composition: Composition, options: ComposeOptions, rng: random.Random
) -> tuple[str, ...]:
    """One way to say each step; never the last of its list, which is held out."""
    count = options.phrasings or 0
    usual = [step.phrasings[:-1] for step in composition]
    return tuple(rng.choice(phrases[:count] if count else phrases) for phrases in usual)


def _quoted(text: str) -> str:
    """A docstring, indented; its quotes stand alone where it has several lines."""
    if "\n" not in text:
        return f'{INDENT}"""{text}"""\n'
    lines = [f'"""{text}', '"""'] if not text.startswith(">>>") else ['"""', text, '"""']
    every = "\n".join(lines).split("\n")
    return "".join(f"{INDENT}{line}".rstrip() + "\n" for line in every)


def check(function: Function) -> None:
    """Run a function on its inputs and compare with the reference of what its body does.

    Raises:
        RunError: they disagree, an argument was changed, or the function does not end.
    """
    inputs = [value for value in function.inputs if run(function.written, value) is not TOO_WIDE]
    expected = [repr(run(function.written, value)) for value in inputs]
    got = execute(function.text, function.name, inputs)
    for value, result, wanted in zip(inputs, got, expected, strict=True):
        if result != wanted:
            raise RunError(
                f"small programs: {function.name}({value!r}) gives {result}, not {wanted}; this is "
                f"a fault of the primitives' table, in:\n{function.text}"
            )


def execute(code: str, name: str, inputs: Sequence[Any]) -> list[str]:
    """The results of a function, written out; what it raises or does to its input, too.

    The code is our own; all its steps have been found to stay narrow on these inputs.
    """
    space: dict[str, Any] = {}
    results = []
    with _limited(name):
        exec(compile(code, "<exercise>", "exec"), space)
        for value in inputs:
            before = repr(value)
            try:
                result = repr(space[name](value))
            except RunError:
                raise  # it does not end
            except Exception as error:  # whatever it is, it is compared with what is expected
                result = f"{type(error).__name__}: {error}"
            results.append(result if repr(value) == before else "a changed argument")
    return results


@contextlib.contextmanager
def _limited(name: str) -> Iterator[None]:
    """Bound the processor time of what runs inside; the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise RunError(f"small programs: {name} runs for more than {MAX_SECONDS:g} s")

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def write_exercise(
    world: World, rng: random.Random, *, wrong: float, among: Sequence[Composition]
) -> Function:
    """One exercise.

    Args:
        world: of its composition.
        rng: of the sample.
        wrong: share of exercises whose body does something else.
        among: the compositions to choose from; empty for all that may be taught.
    """
    composition = rng.choice(among) if among else world.draw_any(rng, world.depth)
    written = None
    if rng.random() < wrong:
        others = world.confusions(composition)
        written = rng.choice(others) if others else None
    return write_function(composition, world, rng, written=written)
