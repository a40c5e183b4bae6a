"""Is what a model wrote fit to train on? Text and syntax only: nothing is run here.

A textbook is prose with Python in fenced blocks, an exercise is one function with a docstring that
states the task and a body that solves it.
"""

import ast
import re
import warnings
from dataclasses import dataclass

from data_pipeline.records.text import DocumentError, check_text
from data_pipeline.similarity.fences import split_fences

MAX_CODE_BYTES = 65_536
_PYTHON = {"python", "py", "python3"}
_CONTROL = re.compile(r"<\|[A-Za-z_ ]{2,40}\|>|\[/?INST\]|</?s>")
_PLACEHOLDER = re.compile(
    r"#\s*(?:TODO|FIXME|your code (?:goes )?here|write your code|implement(?:ation)? here)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Exercise:
    """An exercise taken apart.

    Attributes:
        problem: imports, helpers, signature and docstring.
        solution: the rest; `problem + solution` is the whole text.
    """

    problem: str
    solution: str

    @property
    def text(self) -> str:
        """The document to train on."""
        return self.problem + self.solution


def parse(code: str) -> ast.Module:
    """Parse Python source that nobody trusts.

    Raises:
        DocumentError: `syntax`.
    """
    if len(code.encode("utf-8")) > MAX_CODE_BYTES:
        raise DocumentError("syntax", f"more than {MAX_CODE_BYTES} bytes of code")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as SyntaxWarning of "\d"
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise DocumentError("syntax", detail[:200]) from None


def clean_text(text: str) -> str:
    """Normalise a model's answer.

    Raises:
        DocumentError: it cannot be a document, or holds control tokens of a chat template.
    """
    text = check_text(text.strip().replace("\r\n", "\n").replace("\r", "\n") + "\n", 1)
    control = _CONTROL.search(text)
    if control:
        raise DocumentError("control_token", f"{control[0]} at character {control.start()}")
    return text


def check_textbook(text: str, min_words: int) -> str:
    """Check a textbook section; returns the text.

    Raises:
        DocumentError: `too_short`, `no_code`, `syntax`, `placeholder` or `control_token`.
    """
    text = clean_text(text)
    prose, fenced = split_fences(text)
    words = len(prose.split())
    if words < min_words:
        raise DocumentError("too_short", f"{words} words of prose, below {min_words}")
    blocks = [code for language, code in fenced if language in _PYTHON]
    if not blocks:
        raise DocumentError("no_code", "no Python block")
    for code in blocks:
        if ">>>" not in code:  # a recorded session with its output is no program
            parse(code)
        if _PLACEHOLDER.search(code):
            raise DocumentError("placeholder", "a block leaves its code to the reader")
    return text


def check_exercise(text: str, name: str) -> Exercise:
    """Check an exercise and split it into problem and solution.

    Args:
        text: the model's answer: a fenced block, or nothing but code.
        name: of the function that was asked for.

    Raises:
        DocumentError: `no_code`, `syntax`, `no_function`, `no_docstring`, `no_body`, `layout`,
            `placeholder` or `control_token`.
    """
    text = clean_text(text)
    blocks = [code for language, code in split_fences(text)[1] if language in _PYTHON | {""}]
    code = next((block for block in blocks if f"def {name}" in block), None)
    if code is None:
        if "```" in text:
            raise DocumentError("no_code", f"no whole block with `def {name}`")
        code = text
    code = code.strip("\n") + "\n"
    function = _find_function(parse(code), name)
    docstring = function.body[0]
    if not (
        isinstance(docstring, ast.Expr)
        and isinstance(docstring.value, ast.Constant)
        and isinstance(docstring.value.value, str)
        and len(docstring.value.value.split()) >= 3
    ):
        raise DocumentError("no_docstring", "the function does not begin by stating its task")
    body = function.body[1:]
    if not any(_does_something(statement) for statement in body):
        raise DocumentError("no_body", "the function does nothing")
    if _PLACEHOLDER.search(code):
        raise DocumentError("placeholder", "the code is left to the reader")
    end = docstring.end_lineno
    assert end is not None
    # Not `str.splitlines`, which also cuts at form feeds and the like, where Python does not.
    lines = [line + "\n" for line in code.removesuffix("\n").split("\n")]
    if body[0].lineno <= end:
        raise DocumentError("layout", "docstring and body stand in one line")
    return Exercise("".join(lines[:end]), "".join(lines[end:]))


def _find_function(module: ast.Module, name: str) -> ast.FunctionDef:
    found = [
        node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    if len(found) != 1:
        raise DocumentError("no_function", f"{len(found)} functions {name} at the top level")
    return found[0]


def _does_something(statement: ast.stmt) -> bool:
    """Whether a statement is more than `pass`, `...` or `raise NotImplementedError`."""
    if isinstance(statement, ast.Pass):
        return False
    if isinstance(statement, ast.Raise):
        return "NotImplementedError" not in ast.dump(statement)
    return not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
