"""How alike two functions are: the edit distance between the node types of their syntax trees.

phi-1's paper prunes by the "match rate" of a string edit distance between ASTs (section 5). The
string here has one character a node, in pre-order: its type, and for constants the type of the
value. Names, values, docstrings, annotations, decorators and load/store contexts do not count, so
that renaming everything changes nothing. The match rate is 1 - distance / longer length, with
Levenshtein's distance, computed exactly for every pair by rapidfuzz.
"""

import ast
import importlib
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.records.record import Json
from data_pipeline.similarity.fences import split_fences

_IGNORED_FIELDS = {"annotation", "ctx", "decorator_list", "returns", "type_comment", "type_ignores"}
_PYTHON = ("", "python", "py", "python3")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_FIRST_SYMBOL = (
    0x23  # printable ASCII without the quote; JSON then carries most symbols as they are
)
_BACKSLASH = 0x5C


def _node_types(base: type[ast.AST]) -> Iterator[type[ast.AST]]:
    yield base
    for child in base.__subclasses__():
        yield from _node_types(child)


def _symbols() -> Iterator[str]:
    code = _FIRST_SYMBOL
    while True:
        if code != _BACKSLASH:
            yield chr(code)
        code += 1


_SYMBOLS = _symbols()
_NODES = {
    kind: (next(_SYMBOLS), [name for name in reversed(kind._fields) if name not in _IGNORED_FIELDS])
    for kind in sorted(set(_node_types(ast.AST)), key=lambda kind: kind.__name__)
}
_CONSTANTS = {
    kind: next(_SYMBOLS) for kind in (str, bytes, bool, int, float, complex, type(None), type(...))
}


def node_string(root: ast.AST, limit: int) -> str:
    """One character for each node below and including `root`, at most about `limit` of them."""
    symbols: list[str] = []
    pending = [root]
    while pending and len(symbols) <= limit:
        node = pending.pop()
        if isinstance(node, ast.Constant):
            symbols.append(_CONSTANTS[type(node.value)])
            continue
        symbol, fields = _NODES[type(node)]
        symbols.append(symbol)
        for name in fields:
            value: Any = getattr(node, name, None)
            if isinstance(value, list):
                if (
                    name == "body"
                    and isinstance(node, _FUNCTIONS)
                    and ast.get_docstring(node, False)
                ):
                    value = value[1:]
                pending.extend(item for item in reversed(value) if isinstance(item, ast.AST))
            elif isinstance(value, ast.AST):
                pending.append(value)
    return "".join(symbols)


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a module: methods and nested ones as well."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, _FUNCTIONS):
            yield node
        for name in ("finalbody", "orelse", "cases", "handlers", "body"):
            inner = getattr(node, name, None)
            if isinstance(inner, list):
                pending.extend(reversed(inner))


def parse(text: str) -> ast.Module | None:
    """The tree of a source text, None where it is not Python.

    Raises:
        MemoryError, RecursionError: the parser cannot tell.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def function_strings(request: dict[str, Json]) -> list[str] | None:
    """Node strings of the functions of a text; runs in a `DisposableWorker`.

    A text that is not Python as a whole may hold fenced blocks of it, as textbooks do.

    Args:
        request: `text`, and `shortest` and `longest`, the lengths of strings that are wanted.

    Returns:
        The distinct strings in order, None where nothing of the text parses.
    """
    tree = parse(request["text"])
    if tree is not None:
        trees = [tree]
    else:
        _, fenced = split_fences(request["text"], unended=True)
        blocks = [parse(code) for language, code in fenced if language in _PYTHON]
        trees = [block for block in blocks if block is not None]
        if not trees:
            return None
    found: dict[str, None] = {}
    for tree in trees:
        for function in functions_of(tree):
            string = node_string(function, request["longest"])
            if request["shortest"] <= len(string) <= request["longest"]:
                found[string] = None
    return list(found)


def rapidfuzz() -> ModuleType:
    """The optional package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        importlib.import_module("rapidfuzz.process")
        return importlib.import_module("rapidfuzz")
    except ImportError:
        raise ValueError(
            "the AST match needs rapidfuzz, which is not installed: pip install 'megaphi[data]', "
            "or turn `ast` off"
        ) from None


def match_rates(
    strings: Sequence[str], problems: Sequence[str], cutoff: float
) -> NDArray[np.float64]:
    """[strings, problems] match rates, rounded to 6 digits; 0 where they are below `cutoff`."""
    library = rapidfuzz()
    # A pair that matches at exactly the cutoff counts; in the library rounding decides on it.
    rates = library.process.cdist(
        strings,
        problems,
        scorer=library.distance.Levenshtein.normalized_similarity,
        score_cutoff=max(cutoff - 1e-4, 0.0),
        dtype=np.float32,
        workers=1,
    )
    exact: NDArray[np.float64] = np.round(rates.astype(np.float64), 6)
    exact[exact < round(cutoff, 6)] = 0
    return exact
