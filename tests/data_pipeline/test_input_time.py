"""Time by input: what reads foreign texts takes linear time.

Each function is put to texts at n and 4n: linear work takes 4 times as long, quadratic 16 times.
Processor time, so that a busy machine changes nothing.
"""

import hashlib
import random
import re
import time
from collections.abc import Callable

import pytest

from data_pipeline.generation.check import check_exercise, check_textbook
from data_pipeline.records.text import DocumentError
from data_pipeline.similarity.ast_match import function_strings
from data_pipeline.similarity.digest import text_digest
from data_pipeline.similarity.fences import split_fences

SIZE = 3000
MOST = 9  # times as long at 4n: 4 is linear, 16 quadratic
SLOW = 0.03  # seconds at 4n; what is faster is not measurable, and harmless


def seconds(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def is_linear(function: Callable[[int], Callable[[], object]]) -> bool:
    """Whether the work on 4n takes at most `MOST` times that on n; three tries."""
    for _ in range(3):
        large = seconds(function(4 * SIZE))
        if large < SLOW or large < MOST * seconds(function(SIZE)):
            return True
    return False


def quietly(function: Callable[[], object]) -> None:
    try:
        function()
    except (DocumentError, MemoryError, RecursionError):
        return  # the worker in which texts are parsed dies of the last two


@pytest.mark.parametrize("unit", [" ", "\t", "\n", "```\n", "``` ", "~~~", "a ", "`", "(", "# "])
def test_texts_are_read_in_linear_time(unit: str) -> None:
    functions: list[Callable[[str], object]] = [
        lambda text: text_digest(b"x = 1" + text.encode() + b"# end\n"),
        lambda text: split_fences("```python" + text + "x"),
        lambda text: quietly(lambda: check_textbook(text, 5)),
        lambda text: quietly(lambda: check_exercise(text, "f")),
    ]
    request = {"shortest": 1, "longest": 50}
    functions.append(
        lambda text: quietly(lambda: function_strings({"text": f"x y{text}", **request}))
    )
    for function in functions:
        assert is_linear(lambda size, f=function: lambda: f(unit * (10 * size // len(unit))))


def old_digest(text: bytes) -> bytes:
    """As it was defined: a regular expression, whatever its time."""
    return hashlib.sha256(re.sub(rb"[ \t\r\f]+(?=\n)", b"", text).strip()).digest()[:16]


def test_digests_are_those_of_before() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        text = bytes(draw.choices(b" \t\r\f\n\x0bab", k=draw.randrange(40)))
        assert text_digest(text) == old_digest(text), text


def test_a_block_behind_much_white_space_is_compared() -> None:
    code = (
        "def f(a, b):\n    total = 0\n    for x in a:\n        total += x * b\n    return total\n"
    )
    request = {"shortest": 5, "longest": 100}
    bare = function_strings({"text": code, **request})
    assert bare is not None
    assert len(bare) == 1
    hidden = "Some prose, no Python.\n```" + " \n" * 100_000 + "```\n"
    for text in (
        f"{hidden}```python\n{code}```\n", f"No Python.\n```python\n{code}",
        f"No Python.\n~~~py\n{code}~~~\n", f"No Python.\n   ```` python\n{code}````\n",
    ):  # fmt: skip
        assert function_strings({"text": text, **request}) == bare
