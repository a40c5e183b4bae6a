"""The types of the small world: names, drawn inputs, and the width that no value may exceed.

Inputs come in shapes (empty, one element, repeated, negative, long). Floats are multiples of a
quarter, so that sums and halves are exact and print alike on every machine.
"""

import random
from typing import Any

Type = str
TYPES: tuple[Type, ...] = ("int", "float", "bool", "str", "ints", "strs", "counts", "pair")
HINTS = {
    "int": "int", "float": "float", "bool": "bool", "str": "str", "ints": "list[int]",
    "strs": "list[str]", "counts": "dict[str, int]", "pair": "tuple[int, int]",
}  # fmt: skip
DESCRIPTIONS = {
    "int": "an integer", "float": "a number", "bool": "a truth value", "str": "a string",
    "ints": "a list of integers", "strs": "a list of strings",
    "counts": "a dictionary of counts", "pair": "a pair of integers",
}  # fmt: skip
# Names that the templates of primitives use themselves (seen, rest, ordered, …) are in none of
# these pools.
PARAMETERS = {
    "int": ("n", "number", "x", "amount"),
    "float": ("x", "value", "measure", "quantity"),
    "bool": ("flag", "condition", "answer", "state"),
    "str": ("text", "s", "string", "sentence"),
    "ints": ("numbers", "nums", "values", "xs"),
    "strs": ("words", "strings", "names", "items"),
    "counts": ("counts", "table", "scores", "stock"),
    "pair": ("pair", "point", "two", "p"),
}
RESULTS = {
    "int": ("result", "total", "answer"),
    "float": ("result", "value", "answer"),
    "bool": ("result", "found", "ok"),
    "str": ("result", "output", "answer"),
    "ints": ("result", "output", "out"),
    "strs": ("result", "output", "out"),
    "counts": ("result", "table", "output"),
    "pair": ("result", "both", "output"),
}
INTERMEDIATES = {
    "int": ("value", "number", "count"),
    "float": ("value", "measure", "ratio"),
    "bool": ("check", "flag", "test"),
    "str": ("piece", "string", "line"),
    "ints": ("items", "values", "kept"),
    "strs": ("pieces", "strings", "entries"),
    "counts": ("table", "tally", "amounts"),
    "pair": ("both", "couple", "duo"),
}
ELEMENTS = {
    "int": ("d", "k", "m"),
    "float": ("d", "k", "m"),
    "bool": ("b", "c", "d"),
    "str": ("c", "ch", "letter"),
    "ints": ("n", "num", "v"),
    "strs": ("w", "word", "s"),
    "counts": ("key", "k", "name"),
    "pair": ("a", "left", "u"),
    "word": ("w", "word", "part"),
}
SECONDS = {"counts": ("value", "v", "count"), "pair": ("b", "right", "w")}
INDICES = ("i", "j", "index")
SHAPES = ("plain", "one", "repeated", "negative", "long", "empty", "plain", "odd")

MAX_INTEGER = 100_000
MAX_ITEMS = 40
MAX_CHARACTERS = 80
MAX_EXAMPLE = 36  # characters of a value that a docstring shows

WORDS = (
    "apple", "river", "stone", "cat", "level", "ox", "garden", "noon", "light", "a", "blue",
    "orange", "tree", "dog", "ice", "window", "up", "radar", "egg", "music", "paper", "sun",
    "umbrella", "bird", "Anna", "Rome", "wood", "tea", "island", "fox", "cloud", "to", "mountain",
    "lamp", "eel", "kayak", "bread", "owl", "sea", "pepper",
)  # fmt: skip
ODD_TEXTS = (
    "a1b22", "Hello World", "room 101", "  two  gaps ", "XYZ", "aeiou", "7 of 9", "no", "Zebra!",
    "was it a cat", "MiXeD cAsE", "rhythm", " ", "2026", "Never odd or even", "q",
)  # fmt: skip


def draw(kind: Type, shape: str, rng: random.Random) -> Any:
    """A value of a type; shapes that the type does not have are plain."""
    if kind == "int":
        return _integer(shape, rng)
    if kind == "float":
        return _integer(shape, rng) + rng.randrange(4) / 4
    if kind == "bool":
        return rng.random() < 0.5
    if kind == "str":
        return _text(shape, rng)
    if kind == "pair":
        left = _integer(shape, rng)
        return (left, left if shape == "repeated" else _integer("plain", rng))
    size = {"empty": 0, "one": 1, "long": rng.randrange(9, 13)}.get(shape, rng.randrange(2, 7))
    if kind == "ints":
        return _integers(shape, size, rng)
    words = [_word(shape, rng) for _ in range(size)]
    if shape == "repeated":
        words = [rng.choice(words[:2]) for _ in words]
    if kind == "strs":
        return words
    low = -5 if shape == "negative" else 0
    return {word: rng.randrange(low, 10) for word in words}


def _integer(shape: str, rng: random.Random) -> int:
    if shape == "empty":
        return 0
    if shape == "negative":
        return -rng.randrange(1, 40)
    if shape == "long":
        return rng.randrange(100, 400)
    return rng.randrange(1, 40)


def _integers(shape: str, size: int, rng: random.Random) -> list[int]:
    if shape == "negative":
        return [rng.randrange(-20, 5) for _ in range(size)]
    if shape == "repeated":
        pool = [rng.randrange(-3, 13) for _ in range(2)]
        return [rng.choice(pool) for _ in range(size)]
    if shape == "odd":  # sorted, mirrored, or with zeros
        numbers = sorted(rng.randrange(-4, 20) for _ in range(size))
        if rng.random() < 0.3:
            return numbers
        return numbers + numbers[::-1] if rng.random() < 0.5 else [0, *numbers, 0]
    low = 1 if rng.random() < 0.3 else -10
    return [rng.randrange(low, 25) for _ in range(size)]


def _word(shape: str, rng: random.Random) -> str:
    if shape == "odd":
        return rng.choice(("", "", "", "x", "Io", "AB", "9 lives", "Pepper", *WORDS[:12]))
    return rng.choice(WORDS)


def _text(shape: str, rng: random.Random) -> str:
    if shape == "empty":
        return ""
    if shape == "odd":
        return rng.choice(ODD_TEXTS)
    if shape == "one":
        return rng.choice(WORDS)
    if shape == "repeated":
        return " ".join([rng.choice(WORDS)] * 2)
    words = [rng.choice(WORDS) for _ in range(rng.randrange(6, 8) if shape == "long" else 2)]
    if rng.random() < 0.3:
        words[0] = words[0].capitalize()
    if rng.random() < 0.2:
        words.append(str(rng.randrange(100)))
    return " ".join(words)


def fits(value: Any, slack: int = 1) -> bool:
    """Whether a value is narrow enough to be worked on further: nothing grows before it is.

    Args:
        value: of any type.
        slack: by how much it may exceed the usual width.
    """
    if isinstance(value, str):
        return len(value) <= MAX_CHARACTERS * slack
    if isinstance(value, int | float):
        return bool(abs(value) <= MAX_INTEGER**slack)
    if isinstance(value, dict):
        value = list(value.values())
    if len(value) > MAX_ITEMS * slack:
        return False
    return all(fits(item, slack) for item in value)


def size_of(value: Any) -> int:
    """What a primitive's `limit` bounds: a number, the width of a pair, a length."""
    if isinstance(value, int | float):
        return int(value)
    return value[1] - value[0] if isinstance(value, tuple) else len(value)
