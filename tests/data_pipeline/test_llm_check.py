"""What is accepted of a model's text, and the near-duplicate gate."""

import pytest

from data_pipeline.generation.check import check_exercise, check_textbook, split_fences
from data_pipeline.generation.near_duplicates import NearDuplicateGate
from data_pipeline.records.text import DocumentError

FUNCTION = '''from math import sqrt

def length(x, y):
    """Return the length of the vector (x, y)."""
    return sqrt(x * x + y * y)
'''


def reason(text: str, name: str = "length") -> str:
    with pytest.raises(DocumentError) as caught:
        check_exercise(text, name)
    return caught.value.reason


@pytest.mark.parametrize(
    "wrap",
    [
        "{}",
        "```python\n{}```",
        "Sure!\n\n```py\n{}```\nHave fun.",
        "~~~python\n{}~~~",
        "```\n{}```",
    ],
)
def test_an_exercise_is_found_in_its_wrapping(wrap: str) -> None:
    for text in (wrap.format(FUNCTION), wrap.format(FUNCTION).replace("\n", "\r\n")):
        exercise = check_exercise(text, "length")
        assert exercise.text == FUNCTION
        assert exercise.problem.endswith('(x, y)."""\n')
        assert exercise.solution == "    return sqrt(x * x + y * y)\n"


def test_odd_line_ends_do_not_move_the_cut() -> None:
    text = FUNCTION.replace("the vector", "the\u2028vector \x0c and \x1c more")
    assert check_exercise(text, "length").solution == "    return sqrt(x * x + y * y)\n"


def test_exercises_that_are_refused() -> None:
    body = "    return sqrt(x * x + y * y)\n"
    assert reason("prose only") == "syntax"
    assert reason("```python\nx = 1\n```") == "no_code"
    assert reason("```python\n" + FUNCTION) == "no_code", "the block is not closed"
    assert reason(FUNCTION, "width") == "no_function"
    assert reason(FUNCTION + FUNCTION) == "no_function"
    assert reason(FUNCTION.replace("def ", "async def ")) == "no_function"
    assert reason(FUNCTION.replace('    """Return the length of the vector (x, y)."""\n', "")) == (
        "no_docstring"
    )
    assert reason(FUNCTION.replace("Return the length of the vector (x, y).", "Do.")) == (
        "no_docstring"
    )
    for empty in ("    pass\n", "    ...\n", "    raise NotImplementedError\n", ""):
        assert reason(FUNCTION.replace(body, empty)) == "no_body"
    assert reason(FUNCTION.replace(body, "    # your code here\n    return 0\n")) == "placeholder"
    assert reason(FUNCTION.replace('"""\n    return', '"""; return')) == "layout"
    assert reason(FUNCTION.replace("sqrt(x", "sqrt((x")) == "syntax"
    assert reason("x = " + "(" * 5000 + FUNCTION) == "syntax"
    assert reason(FUNCTION + "y = " + "-" * 60_000 + "1\n") == "syntax"
    assert reason(FUNCTION + "# " + "x " * 35_000) == "syntax"
    assert reason(FUNCTION + "# <|endoftext|>\n") == "control_token"
    assert reason("") == "empty"


def test_textbooks() -> None:
    prose = "# Loops\n\n" + "A loop repeats a step. " * 10
    good = (
        f"{prose}\n\n```python\nfor i in range(3):\n    print(i)\n```\n\nIt prints three lines.\n"
    )
    assert check_textbook(good, 40) == good
    assert check_textbook(good.replace("for i", ">>> for i"), 40)
    for text, expected in (
        ("Short.\n```python\nx = 1\n```", "too_short"),
        (prose, "no_code"),
        (prose + "\n```text\nx\n```\n", "no_code"),
        (good.replace("range(3)", "range(3"), "syntax"),
        (good.replace("print(i)", "print(i)  # TODO"), "placeholder"),
        (good + "[/INST]", "control_token"),
    ):
        with pytest.raises(DocumentError) as caught:
            check_textbook(text, 40)
        assert caught.value.reason == expected


def test_split_fences_are_found() -> None:
    assert split_fences("```python\na\n```\ntext\n````md\n```\nb\n```\n````\n")[1] == [
        ("python", "a\n"),
        ("md", "```\nb\n```\n"),
    ]
    # Patterns of nested repetition take minutes for these.
    assert split_fences("```\n" * 20_001)[1] == [("", "")] * 10_000
    assert split_fences("`" * 200_000)[1] == []
    assert split_fences("```\n" + "~~~\n" * 20_000 + "```")[1] == [("", "~~~\n" * 20_000)]


def lesson(topic: str, number: int) -> str:
    return " ".join(f"{topic} {step * number} needs care in step {step}." for step in range(60))


def test_the_gate_knows_repeats_and_counts_them() -> None:
    gate = NearDuplicateGate(window=4, stop_below=0.5)
    first = lesson("sorting", 3)
    assert gate.admit(first, "a") is None
    assert gate.admit(lesson("searching", 17), "b") is None
    assert gate.admit(first.replace("step 7.", "step seven."), "c") == "a"
    gate.skip()
    assert not gate.exhausted
    assert [vars(window) for window in gate.curve] == [{"asked": 4, "new": 2, "repeated": 1}]
    for name in "defg":
        assert gate.admit(first, name) == "a"
    assert gate.exhausted
    assert not NearDuplicateGate(window=4).exhausted


def test_different_texts_are_all_new() -> None:
    gate = NearDuplicateGate()
    for number in range(1, 300):
        assert gate.admit(lesson(f"topic{number}", number), str(number)) is None
