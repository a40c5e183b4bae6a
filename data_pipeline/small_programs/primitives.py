"""The primitive operations, read from `primitives/*.yaml`, and the idioms that macros stand for."""

import ast
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import yaml

from data_pipeline.small_programs.reference import LISTS, NUMBERS
from data_pipeline.small_programs.reference_text import STRINGS, WORDS

FILES = ("lists", "numbers", "text", "words")
_KEEP = (
    "[A for A in X if COND]",
    "OUT = []\nfor A in X:\n    if COND:\n        OUT.append(A)",
    "list(filter(lambda A: COND, X))",
    "def F(X):\n    if not X:\n        return []\n    A = X[0]\n    if COND:\n"
    "        return [A] + F(X[1:])\n    return F(X[1:])",
)
_EACH = (
    "[COND for A in X]",
    "OUT = []\nfor A in X:\n    OUT.append(COND)",
    "list(map(lambda A: COND, X))",
    "def F(X):\n    if not X:\n        return []\n    A = X[0]\n    return [COND] + F(X[1:])",
)
_KEEP_CHARACTERS = (
    "''.join(A for A in X if COND)",
    "OUT = ''\nfor A in X:\n    if COND:\n        OUT += A",
    "''.join(filter(lambda A: COND, X))",
)
_COUNT = (
    "sum(1 for A in X if COND)",
    "OUT = 0\nfor A in X:\n    if COND:\n        OUT += 1",
    "len([A for A in X if COND])",
)
_ALL = (
    "all(COND for A in X)",
    "for A in X:\n    if not (COND):\n        return False\nreturn True",
    "OUT = True\nfor A in X:\n    if not (COND):\n        OUT = False",
)
_ANY = (
    "any(COND for A in X)",
    "for A in X:\n    if COND:\n        return True\nreturn False",
    "OUT = False\nfor A in X:\n    if COND:\n        OUT = True",
)
MACROS = {
    "keep": _KEEP, "each": _EACH, "keep_chars": _KEEP_CHARACTERS,
    "count": _COUNT, "all": _ALL, "any": _ANY,
}  # fmt: skip
IdiomForm = Literal["expression", "block", "tail", "recursion"]


@dataclass(frozen=True)
class Idiom:
    """One way to write a primitive.

    Attributes:
        code: with the placeholders X, OUT, A, B and F.
        form: `expression`; `block`, which leaves its result in OUT; `tail`, which returns it and
            so can only end a function; `recursion`, a function F of X.
        inputs: how often X occurs in an expression; where it is more than once, or inside an
            f-string, X must be a name.
        atomic: an expression that needs no parentheses, wherever it is put.
    """

    code: str
    form: IdiomForm
    inputs: int = 0
    atomic: bool = False


@dataclass(frozen=True, eq=False)  # compared and hashed as the object it is
class Primitive:
    """One operation.

    Attributes:
        name: as in function names.
        takes: type of the input.
        gives: type of the output.
        phrasings: noun phrases with X for the input; the last one is held out of training texts.
        idioms: ways to write it, two or more.
        meaning: what it does, written apart from the idioms.
        note: what it does on odd input, a sentence; empty where nothing is surprising.
        limit: the largest input that is run, for what feeds `range`.
        element: the pool of names for A, a type or `word`.
    """

    name: str
    takes: str
    gives: str
    phrasings: tuple[str, ...]
    idioms: tuple[Idiom, ...]
    meaning: Callable[[Any], Any]
    note: str
    limit: int | None
    element: str


def _idiom(code: str) -> Idiom:
    code = code.rstrip("\n")
    if code.startswith("def F("):
        return Idiom(code, "recursion")
    if "\n" in code or re.search(r"\bOUT\b", code):
        returns = re.search(r"^\s*return\b", code, re.MULTILINE)
        return Idiom(code, "tail" if returns else "block")
    root = ast.parse(code, mode="eval").body
    loose = (ast.BinOp, ast.BoolOp, ast.UnaryOp, ast.Compare, ast.IfExp, ast.Lambda)
    inputs = len(re.findall(r"\bX\b", code)) + ("f'" in code)
    return Idiom(code, "expression", inputs, not isinstance(root, loose))


def _primitive(name: str, entry: dict[str, Any], meaning: Callable[[Any], Any]) -> Primitive:
    codes = [
        template.replace("COND", entry[macro])
        for macro, templates in MACROS.items()
        if macro in entry
        for template in templates
    ]
    takes, gives = entry["type"].split(" -> ")
    return Primitive(
        name=name,
        takes=takes,
        gives=gives,
        phrasings=tuple(entry["say"]),
        idioms=tuple(_idiom(code) for code in (*codes, *entry.get("code", ()))),
        meaning=meaning,
        note=entry.get("note", ""),
        limit=entry.get("limit"),
        element=entry.get("element", takes),
    )


@functools.cache
def all_primitives() -> dict[str, Primitive]:
    """Every primitive by name, in the order of `ORDER` and then of the files."""
    meanings = {**LISTS, **NUMBERS, **STRINGS, **WORDS}
    found: dict[str, Primitive] = {}
    for file in FILES:
        source = resources.files("data_pipeline.small_programs") / "primitives" / f"{file}.yaml"
        for name, entry in yaml.safe_load(source.read_text(encoding="utf-8")).items():
            assert name not in found, f"{name} is defined twice"
            found[name] = _primitive(name, entry, meanings[name])
    return {name: found[name] for name in (*ORDER, *(n for n in found if n not in ORDER))}


ORDER = (
    # the quickstart's thirty: few types, every type reached from another
    "keep_even", "keep_odd", "keep_positive", "double_each", "square_each", "add_one_each",
    "sort_ascending", "sort_descending", "reverse_list", "sum_all", "find_largest", "count_items",
    "count_positive", "all_positive", "double", "square", "is_even", "to_upper", "reverse_text",
    "text_length", "count_vowels", "count_words", "split_words", "upper_each", "keep_long",
    "sort_words", "join_words", "longest_word", "count_strings", "word_lengths",
    # up to eighty, for the figure
    "keep_negative", "negate_each", "absolute_each", "drop_first", "drop_duplicates",
    "running_totals", "find_smallest", "count_even", "find_range", "mean_of", "any_negative",
    "is_sorted", "numbers_to_strings", "smallest_and_largest", "count_by_parity", "add_one",
    "negate", "halve", "sum_digits", "is_positive", "is_multiple_of_three", "is_prime", "count_up",
    "list_digits", "half_exactly", "double_float", "round_down", "is_whole", "opposite",
    "yes_or_no", "sum_pair", "difference_pair", "swap_pair", "to_lower", "drop_vowels",
    "first_word", "list_letters", "count_each_letter", "is_palindrome", "starts_with_vowel",
    "capitalize_each", "reverse_words", "keep_with_a", "first_string", "total_length",
    "count_each_string", "list_keys", "list_values", "key_of_largest", "double_values",
)  # fmt: skip
"""Smaller worlds take the first so many."""
