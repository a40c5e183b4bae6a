"""The code of a composition: idioms put together into the body of one function.

Steps are nested where they are expressions and the draw says so, or get names one after the other.
Names that are still needed are never taken again, so that no loop clobbers a result.
"""

import functools
import random
import re
from dataclasses import dataclass, field

from data_pipeline.small_programs.primitives import Idiom, Primitive
from data_pipeline.small_programs.values import (
    ELEMENTS,
    INDICES,
    INTERMEDIATES,
    PARAMETERS,
    RESULTS,
    SECONDS,
)
from data_pipeline.small_programs.world import Composition

_PLACEHOLDER = re.compile(r"\b(OUT|X|A|B|F)\b")
_BARE = re.compile(r"(?<=[(,] )X(?=[,)])|(?<=\()X(?=[,)])|^X$")
INDENT = "    "
NESTED_SHARE = 0.5


@dataclass
class _Writer:
    """Lines written so far, and the expression that holds the value.

    Attributes:
        rng: of the sample.
        function: its name.
        parameter: its parameter.
        names: how many names of each pool are used.
        expression: what holds the value so far.
        atomic: it needs no parentheses.
    """

    rng: random.Random
    function: str
    parameter: str
    names: int
    expression: str
    atomic: bool = True
    lines: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def fresh(self, pool: tuple[str, ...]) -> str:
        """A name of a pool that nothing else has."""
        choice = pool[: self.names] if self.names else pool
        first = self.rng.choice(choice)
        for name in (first, *pool, *(f"{first}{number}" for number in range(2, 10))):
            if name not in self.taken and name not in (self.function, self.parameter):
                return name
        raise AssertionError(f"no name is left of {pool}")

    def keep(self, pool: tuple[str, ...]) -> None:
        """Give the value a name of its own."""
        name = self.fresh(pool)
        self.lines.append(f"{name} = {self.expression}")
        self.hold(name)

    def hold(self, name: str) -> None:
        """Have the value in a variable."""
        self.taken.add(name)
        self.expression, self.atomic = name, True

    def fill(self, step: Primitive, idiom: Idiom, **given: str) -> str:
        """An idiom's code with names of its own for A and B."""
        names = dict(given)
        for letter in ("A", "B"):
            if re.search(rf"\b{letter}\b", idiom.code):
                pool = ELEMENTS[step.element]
                if letter == "B":
                    pool = SECONDS.get(step.takes, INDICES)
                names[letter] = self._local(pool, names)
        return _PLACEHOLDER.sub(lambda match: names[match[1]], idiom.code)

    def _local(self, pool: tuple[str, ...], names: dict[str, str]) -> str:
        """A name that lives no longer than the step; it may be taken again by a later one."""
        before = set(self.taken)
        self.taken.update(names.values())
        name = self.fresh(pool)
        self.taken = before
        return name


def write_body(
    composition: Composition,
    function: str,
    parameter: str,
    rng: random.Random,
    *,
    idioms: int,
    names: int,
) -> list[str]:
    """The lines of a function's body, not indented.

    Args:
        composition: what it does.
        function: its name.
        parameter: the name of its parameter.
        rng: of the sample.
        idioms: ways to write a primitive that are used; 0 for all.
        names: names of each pool that are used; 0 for all.
    """
    writer = _Writer(rng, function, parameter, names, parameter)
    nested = rng.random() < NESTED_SHARE
    for place, step in enumerate(composition):
        last = place == len(composition) - 1
        idiom = rng.choice(_usable(step, idioms, last))
        if idiom.form == "recursion":
            if len(composition) == 1:
                return _own_recursion(idiom, step, writer)
            _nested_recursion(idiom, step, writer)
        elif idiom.form == "expression":
            _put_expression(idiom, step, writer)
        else:
            if writer.expression != parameter and writer.expression not in writer.taken:
                writer.keep(INTERMEDIATES[step.takes])
            out = writer.fresh((RESULTS if last else INTERMEDIATES)[step.gives])
            code = writer.fill(step, idiom, X=writer.expression, OUT=out)
            writer.lines += code.split("\n")
            if idiom.form == "tail":
                return writer.lines
            writer.hold(out)
        if not (nested or last) and writer.expression not in writer.taken:
            writer.keep(INTERMEDIATES[step.gives])
    return [*writer.lines, f"return {writer.expression}"]


@functools.cache
def _usable(step: Primitive, idioms: int, last: bool) -> tuple[Idiom, ...]:
    """The first so many idioms that can stand there."""
    fit = [idiom for idiom in step.idioms if last or idiom.form != "tail"]
    return tuple(fit[:idioms] if idioms else fit)


def _put_expression(idiom: Idiom, step: Primitive, writer: _Writer) -> None:
    """Put the value so far into an expression."""
    if idiom.inputs > 1 and not writer.expression.isidentifier():
        writer.keep(INTERMEDIATES[step.takes])
    inner = writer.expression
    if not writer.atomic and not _BARE.search(idiom.code):
        inner = f"({inner})"
    writer.expression = writer.fill(step, idiom, X=inner)
    writer.atomic = idiom.atomic


def _own_recursion(idiom: Idiom, step: Primitive, writer: _Writer) -> list[str]:
    """The function itself is the recursion."""
    code = writer.fill(step, idiom, X=writer.parameter, F=writer.function)
    return [line.removeprefix(INDENT) for line in code.split("\n")[1:]]


def _nested_recursion(idiom: Idiom, step: Primitive, writer: _Writer) -> None:
    """A function inside of the function, applied to the value."""
    inner = writer.fresh(PARAMETERS[step.takes])
    helper = writer.fresh(("helper", "inner", "recurse"))
    writer.lines += writer.fill(step, idiom, X=inner, F=helper).split("\n")
    writer.taken.add(helper)
    writer.expression, writer.atomic = f"{helper}({writer.expression})", True
