"""What passes between a test and a program, and tests that cannot be run."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.sandbox.packages import find_packages
from data_pipeline.sandbox.program_test import ProgramTest
from data_pipeline.sandbox.sandbox import Limits, SandboxPair
from tests.isolation import needs_sandbox
from tools.cli import main

pytestmark = needs_sandbox
needs_numpy = pytest.mark.skipif(importlib.util.find_spec("numpy") is None, reason="no numpy")


@pytest.fixture(scope="module")
def pair() -> Iterator[SandboxPair]:
    pair = SandboxPair(Limits(), packages=find_packages(None))
    yield pair
    pair.close()


# Each passes if it is run in one process; the second changes something and must be seen to.
IN_PLACE = {
    "list": ("def f(a):\n    a.sort()\n", "a = [3, 1]\nf(a)\nassert a == [1, 3]\n"),
    "dict": ("def f(a):\n    a['k'] = a.pop('j')\n", "a = {'j': 1}\nf(a)\nassert a == {'k': 1}\n"),
    "set": ("def f(a):\n    a |= {9}\n", "a = {1}\nf(a)\nassert a == {1, 9}\n"),
    "bytearray": (
        "def f(a):\n    a[:] = b'xy'\n",
        "a = bytearray(b'a')\nf(a)\nassert a == b'xy'\n",
    ),
    "inner": (
        "def f(a):\n    a[0][1].append(5)\n",
        "i = []\na = [(0, i)]\nf(a)\nassert i == [5]\n",
    ),
    "swapped": (
        "def f(a):\n    a.reverse()\n",
        "x, y = [1], [2]\na = [x, y]\nf(a)\nassert a[0] is y and a[1] is x and x == [1]\n",
    ),
    "keyword": ("def f(*, a):\n    a.clear()\n", "a = [1]\nf(a=a)\nassert a == []\n"),
    "the same twice": (
        "def f(a, b):\n    a.append(1)\n    return len(b)\n",
        "a = []\nassert f(a, a) == 1 and a == [1]\n",
    ),
    "rows that are one": (
        "def f(a):\n    a[0][0] = 7\n",
        "a = [[0]] * 2\nf(a)\nassert a == [[7], [7]]\n",
    ),
    "holds itself": (
        "def f(a):\n    return a[0] is a\n",
        "a = []\na.append(a)\nassert f(a) is True\n",
    ),
    "returned": ("def f(a):\n    a.append(1)\n    return a\n", "a = []\nassert f(a) is a\n"),
    "returned inside": ("def f(a):\n    return (1, a)\n", "a = []\nassert f(a)[1] is a\n"),
    "then raised": (
        "def f(a):\n    a.append(1)\n    raise KeyError\n",
        "a = []\ntry:\n    f(a)\nexcept KeyError:\n    assert a == [1]\nelse:\n    assert False\n",
    ),
    "method": (
        "class C:\n    def m(self, a):\n        a.append(1)\ndef f():\n    return C()\n",
        "a = []\nf().m(a)\nassert a == [1]\n",
    ),
    "own class": (
        "def f(a):\n    a['x'] = 2\n",
        "from collections import Counter\na = Counter()\nf(a)\nassert a == Counter(x=2)\n",
    ),
    "equal but another": (
        "def f(a):\n    a[0] = True\n",
        "a = [1]\nf(a)\nassert a[0] is True\n",
    ),
    "object of the program": (
        "class C:\n    x = 1\ndef g():\n    return C()\ndef f(a):\n    a.append(a[0])\n",
        "a = [g()]\nf(a)\nassert len(a) == 2 and a[0] is a[1] and a[1].x == 1\n",
    ),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_arguments_come_back_as_the_call_left_them(pair: SandboxPair, name: str) -> None:
    program, test = IN_PLACE[name]
    exec(f"{program}\n{test}", {})  # what one process says
    verdict = pair.judge(program, ProgramTest(code=test))
    assert verdict.passed, verdict


def test_a_program_that_spoils_its_argument_fails(pair: SandboxPair) -> None:
    test = ProgramTest(code="a = [3, 1]\nassert f(a) == 3\nassert a == [3, 1]\n")
    assert not pair.judge("def f(a):\n    a.sort()\n    return a.pop()\n", test).passed
    assert pair.judge("def f(a):\n    return sorted(a).pop()\n", test).passed


@needs_numpy
@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("import numpy\ndef f(x):\n    return numpy.int64(x)\n", "assert f(3) == 3\n"),
        ("import numpy\ndef f(x):\n    return x * numpy.float32(2)\n", "assert f(3) == 6.0\n"),
        ("import numpy\ndef f(x):\n    return numpy.bool_(x)\n", "assert f(1)\nassert not f(0)\n"),
        (
            "import numpy\ndef f(x):\n    return numpy.array(x) * 2\n",
            "import numpy as np\nassert np.allclose(f([1, 2]), [2, 4])\n"
            "assert f([1]).shape == (1,)\n",
        ),
        (
            "def f(x):\n    x[0, 0] = 7\n    return x\n",
            "import numpy\na = numpy.zeros((2, 2))\nassert f(a) is a and a.sum() == 7\n",
        ),
        (
            "import numpy\ndef f(x):\n    return [numpy.int32(1), {'a': numpy.ones(2)}]\n",
            "r = f(0)\nassert type(r[0]).__name__ == 'int32' and list(r[1]['a']) == [1.0, 1.0]\n",
        ),
    ],
)
def test_values_of_numpy(pair: SandboxPair, program: str, test: str) -> None:
    exec(f"{program}\n{test}", {})
    verdict = pair.judge(program, ProgramTest(code=test))
    assert verdict.passed, verdict


@needs_numpy
def test_an_array_cannot_pose_as_equal(pair: SandboxPair) -> None:
    program = "import numpy\nclass A(numpy.ndarray):\n    def __eq__(self, other):\n"
    program += "        return True\ndef f(x):\n    return numpy.zeros(2).view(A)\n"
    test = ProgramTest(code="r = f(1)\nassert r == 5\n")
    assert not pair.judge(program, test).passed


ROW = {
    "task_id": "t/0",
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "canonical_solution": "    return a + b\n",
}


def evaluate(tmp_path: Path, capsys: Any, row: dict[str, Any], *words: str) -> tuple[int, str, str]:
    suite = tmp_path / "suite.jsonl"
    suite.write_text(json.dumps(row) + "\n")
    status = main(
        ["evaluate", "--suite", str(suite), "--out", str(tmp_path / "out"), "--workers", "1"]
        + (list(words) or ["--canonical"])
    )
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize(
    "change",
    [
        {"test": "import no_such_module\n" + ROW["test"]},
        {"test": ROW["test"].replace("    assert", "    import no_such_module\n    assert")},
        {"prompt": "from no_such_module import x\n" + ROW["prompt"]},
    ],
)
def test_a_test_that_cannot_be_run_stops_the_evaluation(
    tmp_path: Path, capsys: Any, change: dict[str, str]
) -> None:
    status, _, err = evaluate(tmp_path, capsys, {**ROW, **change})
    assert status == 2
    assert "t/0" in err
    assert "no_such_module" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_preamble_that_fails_stops_the_evaluation(tmp_path: Path, capsys: Any) -> None:
    status, _, err = evaluate(tmp_path, capsys, {**ROW, "prompt": "x = 1 / 0\n" + ROW["prompt"]})
    assert status == 2
    assert "t/0" in err
    assert "ZeroDivisionError" in err


@needs_numpy
def test_packages_are_given_and_recorded(tmp_path: Path, capsys: Any) -> None:
    row = {**ROW, "canonical_solution": "    import numpy\n    return int(numpy.add(a, b))\n"}
    status, out, _ = evaluate(tmp_path, capsys, row)
    assert status == 0
    assert "numpy" in out
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    import numpy

    assert summary["packages"] == {"numpy": numpy.__version__}
    status, _, err = evaluate(tmp_path, capsys, row, "--canonical", "--package", "")
    assert status == 2
    assert "begun with packages" in err
    (tmp_path / "none").mkdir()
    assert evaluate(tmp_path / "none", capsys, row, "--canonical", "--package", "")[0] == 1
    status, _, err = evaluate(tmp_path, capsys, row, "--canonical", "--package", "no_such_module")
    assert status == 2
    assert "no_such_module" in err


def test_the_test_of_mbpp_plus_is_run(tmp_path: Path, capsys: Any) -> None:
    row = {
        "task_id": 11, "prompt": "Add one.", "code": "def add(x):\n    return x + 1",
        "test_imports": [], "test_list": ["assert add(1) == 2"],
        "test": "for given, wanted in ((1, 2), (-1, 0)):\n    assert add(given) == wanted\n",
    }  # fmt: skip
    assert evaluate(tmp_path, capsys, row)[0] == 0
    (tmp_path / "c.jsonl").write_text(
        json.dumps({"task_id": 11, "completion": "def add(x):\n    return x + 1 if x > 0 else 9\n"})
    )
    words = ["--completions", str(tmp_path / "c.jsonl")]
    (tmp_path / "b").mkdir()
    _, out, _ = evaluate(tmp_path / "b", capsys, row, *words)
    assert "1 failed" in out
    idle = {**row, "test": "def check(candidate):\n    assert candidate(1) == 2\n"}
    (tmp_path / "c").mkdir()
    status, _, err = evaluate(tmp_path / "c", capsys, idle, *words)
    assert status == 2
    assert "entry_point" in err
    assert evaluate(tmp_path / "c", capsys, {**idle, "entry_point": "add"}, *words)[0] == 0


def test_k_above_the_completions_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.jsonl").write_text(
        json.dumps({"task_id": "t/0", "completion": "    return 3\n"})
    )
    for words in (["--completions", str(tmp_path / "c.jsonl")], ["--canonical"]):
        status, _, err = evaluate(tmp_path, capsys, ROW, *words, "--k", "1", "10")
        assert status == 2
        assert "--k 10" in err
        assert "t/0" in err
        assert not (tmp_path / "out").exists()
