"""Places in the source of a problem: what is prose, what an example, and which names mean what.

A prompt is Python that may end where a body is to be written. Its prose is the text of docstrings
and comments without examples (doctests, calls of the function) and without what is quoted.
"""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator

Edit = tuple[int, int, str]
"""Start and end in the text, in characters, and what comes there instead."""

_BODY = "\n    pass\n"
_QUOTED = re.compile(r"`[^`]*`|\"[^\"\n]*\"|(?<!\w)'[^'\n]*'(?!\w)|\[[^\]\n]*\]|<[^>\n]*>")
_EXAMPLE = re.compile(
    r">>>|==|=>|->|➞|➡|→|\w\(|^\s*[^A-Za-z\s]|^\s*(?:For )?[Ee]xamples?\b|\bassert\b"
)


def parse(source: str) -> ast.Module | None:
    """The tree of a source that may lack its last body; None if it is no Python."""
    for ending in ("", _BODY):
        try:
            return ast.parse(source + ending)
        except (SyntaxError, ValueError):
            continue
    return None


class Places:
    """Turns the lines and columns of a tree into places in the text."""

    def __init__(self, source: str) -> None:
        self._lines = source.split("\n")
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line) + 1)

    def __call__(self, line: int, column: int) -> int:
        """Place of a line, from 1, and a column in bytes, as `ast` counts."""
        text = self._lines[line - 1].encode()[:column].decode()
        return self._starts[line - 1] + len(text)

    def of(self, node: ast.AST) -> tuple[int, int]:
        """Where a node begins and ends."""
        start = self(node.lineno, node.col_offset)  # type: ignore[attr-defined]
        return start, self(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]


def apply(source: str, edits: Iterable[Edit]) -> str:
    """The text with edits that do not overlap; those beyond its end are left out."""
    for start, end, new in sorted(set(edits), reverse=True):
        if end <= len(source):
            source = source[:start] + new + source[end:]
    return source


def prose_spans(source: str) -> Iterator[tuple[int, int]]:
    """Where docstrings and comments stand, without their quotation marks."""
    tree = parse(source)
    if tree is None:
        return
    places = Places(source)
    kinds = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            start, end = places.of(node.body[0])
            quote = re.match(r"[rRuU]?('''|\"\"\"|'|\")", source[start:])
            if quote is not None:
                yield start + quote.end(), end - len(quote[1])
    try:
        for token in tokenize.generate_tokens(io.StringIO(source + _BODY).readline):
            if token.type == tokenize.COMMENT:
                line, column = token.start
                start = places(line, len(token.line[:column].encode())) + 1
                yield start, start + len(token.string) - 1
    except (tokenize.TokenError, IndentationError):
        return  # a prompt that ends within brackets


def edit_prose(text: str, edit: Callable[[str], str]) -> str:
    """Change the prose of a text by lines; examples, what they print, and quotations stay."""
    lines, is_output = [], False
    for line in text.split("\n"):
        is_example = _EXAMPLE.search(line) is not None
        is_output = (is_output and bool(line.strip())) or ">>>" in line
        lines.append(line if is_example or is_output else _edit_unquoted(line, edit))
    return "\n".join(lines)


def _edit_unquoted(line: str, edit: Callable[[str], str]) -> str:
    parts, place = [], 0
    for found in _QUOTED.finditer(line):
        parts += [edit(line[place : found.start()]), found[0]]
        place = found.end()
    return "".join([*parts, edit(line[place:])])


def function(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    """The last function of a name at the top level, which is the one that counts."""
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    return found[-1] if found else None


def identifiers(source: str) -> set[str]:
    """Every word of a source that could be a name."""
    return set(re.findall(r"[^\W\d]\w*", source))


def name_edits(source: str, old: str, new: str) -> list[Edit] | None:
    """Rename a function wherever the source names it; None if that cannot be done safely."""
    tree = parse(source)
    if tree is None or _is_in_format(tree, old):
        return None
    places = Places(source)
    edits: list[Edit] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == old:
            edits.append((*places.of(node), new))
        elif isinstance(node, ast.FunctionDef) and node.name == old:
            start = source.index(old, places.of(node)[0] + len("def"))
            edits.append((start, start + len(old), new))
        elif isinstance(node, ast.arg | ast.keyword) and node.arg == old:
            return None  # also the name of a parameter somewhere
    for start, end in prose_spans(source):
        edits += [
            (start + found.start(), start + found.end(), new)
            for found in re.finditer(rf"\b{re.escape(old)}\b", source[start:end])
        ]
    return edits


def parameter_edits(
    source: str, owner: ast.FunctionDef, old: str, new: str, in_prose: bool
) -> list[Edit] | None:
    """Rename a parameter within its function; None if that cannot be done safely.

    Args:
        source: the text that `owner` is parsed from.
        owner: the function.
        old: its name.
        new: the new one.
        in_prose: whether the docstring's words are renamed as well.
    """
    places = Places(source)
    edits: list[Edit] = []
    if _is_in_format(owner, old):
        return None
    outside = [*owner.decorator_list, owner.args, *([owner.returns] if owner.returns else [])]
    for part in outside:
        if any(isinstance(n, ast.Name) and n.id == old for n in ast.walk(part)):
            return None
    for node in ast.walk(owner):
        if isinstance(node, ast.Name) and node.id == old:
            edits.append((*places.of(node), new))
        elif isinstance(node, ast.arg) and node.arg == old:
            start = places.of(node)[0]
            edits.append((start, start + len(old), new))
        elif node is not owner and _binds_as_text(node, old):
            return None
    inner = [n for n in ast.walk(owner) if isinstance(n, ast.arg) and n.arg == old]
    edits += keyword_edits(source, {owner.name}, old, new)
    foreign = [n for n in ast.walk(owner) if isinstance(n, ast.keyword) and n.arg == old]
    if len(inner) > 1 and foreign:
        return None  # a function inside has a parameter of this name, and is called by it
    if in_prose and ast.get_docstring(owner) is not None:
        start, end = places.of(owner.body[0])
        edits += [
            (start + found.start(), start + found.end(), new)
            for found in re.finditer(rf"(?<![\\\w]){re.escape(old)}\b", source[start:end])
        ]
    return edits


def _binds_as_text(node: ast.AST, name: str) -> bool:
    """Whether a node that is no name itself binds a name, which it holds as a text."""
    if isinstance(node, ast.Global | ast.Nonlocal):
        return name in node.names
    kinds = ast.ExceptHandler | ast.MatchAs | ast.MatchStar | ast.FunctionDef | ast.ClassDef
    return isinstance(node, kinds) and node.name == name


def keyword_edits(source: str, functions: set[str], old: str, new: str) -> list[Edit]:
    """Rename a keyword in the calls of some functions."""
    tree = parse(source)
    if tree is None:
        return []
    places = Places(source)
    return [
        (start := places.of(word)[0], start + len(old), new)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in functions
        for word in node.keywords
        if word.arg == old
    ]


def _is_in_format(tree: ast.AST, name: str) -> bool:
    """Whether a formatted string reads a name, or code looks names up as texts."""
    for node in ast.walk(tree):
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        if isinstance(node, ast.JoinedStr) and name in names:
            return True
        if isinstance(node, ast.Name) and node.id in ("eval", "exec", "locals", "globals", "vars"):
            return True
    return False
