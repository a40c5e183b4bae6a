"""Perturbed suites: the same problems, written as another person might, with their tests.

Four families after ReCode (Wang et al. 2023, arXiv 2212.10264), each a pure function of a row:

- `typos`: in one word of six of the prose, two letters change places, a letter is its neighbour on
  the keyboard, or a letter has the other case;
- `names`: the function is renamed (`snake_case` to `camelCase`, one word to `do_word`), and its
  parameters are `var_0`, `var_1` and so on, in the prompt, the solution and the tests;
- `phrasing`: words and turns of the prose are replaced by others of the same meaning (`_PHRASES`);
- `format`: tabs for indentation, blank lines, or a signature over several lines; descriptions in
  MBPP's form are wrapped, with blank lines between the tests.

The meaning stays: examples and quotations are left alone, and the suite's own solutions still pass.
"""

import ast
import functools
import hashlib
import io
import random
import re
import textwrap
import tokenize
from collections.abc import Callable
from typing import Any

from tools.evaluation.program_text import (
    Edit,
    apply,
    edit_prose,
    function,
    identifiers,
    keyword_edits,
    name_edits,
    parameter_edits,
    parse,
    prose_spans,
)
from tools.evaluation.suites import Suite, make_suite

Row = dict[str, Any]

_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_KEPT_WORDS = {"true", "false", "none", "list", "dict", "tuple", "bool", "float", "bytes"}
_SHORT_WORDS = {"a", "an", "i", "it", "he", "to", "of", "by", "on", "at", "no", "so", "we", "us"}
_SHORT_WORDS |= {"me", "my", "the", "and", "for"}
# Of one meaning in a description of a function, whatever stands around them.
_PHRASES = tuple(
    (re.compile(rf"\b{pattern}\b", re.IGNORECASE), new)
    for pattern, new in (
        (r"write a (?:python )?function (to|that|which)", r"implement a function \1"),
        (r"write a (?:python )?function", "implement a function"),
        (r"check (?:if|whether)", "determine whether"),
        (r"returns", "gives back"),
        (r"return", "give back"),
        (r"calculates?|computes?", "work out"),
        (r"largest|biggest", "greatest"),
        (r"elements", "items"),
        (r"element", "item"),
        (r"create", "build"),
        (r"convert", "turn"),
        (r"remove", "delete"),
        (r"using", "with the help of"),
        (r"given", "provided"),
        (r"contains", "includes"),
        (r"should", "must"),
        (r"in order to", "to"),
        (r"identical", "equal"),
        (r"only if", "just if"),
        (r"input", "argument"),
        (r"followed by", "and then"),
        (r"starting from", "beginning with"),
        (r"otherwise", "in all other cases"),
        (r"for example", "for instance"),
    )
)


def perturb_suite(suite: Suite, family: str) -> tuple[Suite, set[str]]:
    """The suite with every problem perturbed; also the problems in which something changed."""
    rows, changed = [], set()
    for where, row in suite.rows:
        new = perturb_row(row, family)
        rows.append((where, new))
        if new != row:
            changed.add(str(row["task_id"]))
    return make_suite(suite.name, rows), changed


def perturb_row(row: Row, family: str) -> Row:
    """A row of a suite, perturbed; the same one every time, and as it is if nothing applies."""
    seed = hashlib.sha256(f"{family}/{row['task_id']}".encode()).digest()[:8]
    new: Row = FAMILIES[family](row, random.Random(int.from_bytes(seed, "big")))
    return new


def _is_mbpp(row: Row) -> bool:
    return "test_list" in row


def _description(row: Row) -> str:
    """The key of the text that describes a problem of MBPP's form."""
    return "text" if "text" in row else "prompt"


def _with_prose(row: Row, edit: Callable[[str], str]) -> Row:
    """The row with its prose changed."""
    if _is_mbpp(row):
        key = _description(row)
        return {**row, key: edit_prose(row[key], edit)}
    prompt = row["prompt"]
    edits = [
        (start, end, edit_prose(prompt[start:end], edit)) for start, end in prose_spans(prompt)
    ]
    return {**row, "prompt": apply(prompt, edits)}


def _typos(row: Row, drawn: random.Random) -> Row:
    """Mistyped words."""
    code = row.get("code") if _is_mbpp(row) else row["prompt"]
    tree = parse(code or "")
    own = {str(row.get("entry_point"))}
    for node in ast.walk(tree) if tree is not None else ():
        own |= {node.arg} if isinstance(node, ast.arg) else set()
    words = re.compile(r"(?<![\\\w./-])[A-Za-z]?[a-z]{3,}(?![\w(/-])")
    places: list[int] = []

    def count(text: str) -> str:
        places.extend(1 for found in words.finditer(text) if is_prose(found[0]))
        return text

    def is_prose(word: str) -> bool:
        return word not in own and word.lower() not in _KEPT_WORDS

    _with_prose(row, count)
    if not places:
        return row
    chosen = set(drawn.sample(range(len(places)), max(1, len(places) // 6)))
    seen = iter(range(len(places)))

    def mistype(found: re.Match[str]) -> str:
        word = found[0]
        return _mistyped(word, drawn) if is_prose(word) and next(seen) in chosen else word

    return _with_prose(row, lambda text: words.sub(mistype, text))


def _mistyped(word: str, drawn: random.Random) -> str:
    """A word with one slip of the fingers, of which the first letter is spared."""
    place = drawn.randrange(1, len(word) - 1)
    kind = drawn.randrange(3)
    if kind == 0 and word[place] != word[place + 1]:
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    if kind == 1:
        line = next(line for line in _KEYBOARD if word[place].lower() in line)
        at = line.index(word[place].lower())
        return word[:place] + line[at + (1 if at == 0 else -1)] + word[place + 1 :]
    return word[:place] + word[place].swapcase() + word[place + 1 :]


def _phrasing(row: Row, _: random.Random) -> Row:
    """Other words."""

    def rephrase(text: str) -> str:
        for pattern, new in _PHRASES:
            text = pattern.sub(functools.partial(_like, new), text)
        return text

    return _with_prose(row, rephrase)


def _like(new: str, found: re.Match[str]) -> str:
    """The replacement, with a capital letter where the original has one."""
    text = found.expand(new)
    return text[0].upper() + text[1:] if found[0][0].isupper() else text


def _names(row: Row, _: random.Random) -> Row:
    """Other names, in everything that mentions them."""
    if _is_mbpp(row):
        return _mbpp_names(row)
    prompt, solution, test = row["prompt"], row.get("canonical_solution") or "", row["test"]
    program, old = prompt + solution, row["entry_point"]
    taken = identifiers(program) | identifiers(test)
    pairs = _new_parameters(program, [test], old, taken)
    edits, new_test = [edit for _, edits in pairs for edit in edits], test
    callees = {old, *_first_arguments(test)}
    test_edits = [edit for (a, b), _ in pairs for edit in keyword_edits(test, callees, a, b)]
    new = _new_function_name(old, taken)
    of_program, of_test = (name_edits(text, old, new) for text in (program, test))
    if of_program is None or of_test is None:
        new = old
    else:
        edits += of_program
        test_edits += of_test
    new_test = apply(test, test_edits)
    end = len(prompt)
    new_row = {
        **row,
        "prompt": apply(prompt, edits),
        "test": new_test,
        "entry_point": new,
    }
    if solution:
        rest = [(a - end, b - end, text) for a, b, text in edits if a >= end]
        new_row["canonical_solution"] = apply(solution, rest)
    return new_row


def _first_arguments(test: str) -> set[str]:
    """The names under which the functions of a test know the candidate."""
    nodes = ast.parse(test).body
    return {n.args.args[0].arg for n in nodes if isinstance(n, ast.FunctionDef) and n.args.args}


def _mbpp_names(row: Row) -> Row:
    """As `_names`, for a solution with tests in a list."""
    code = row.get("code")
    tree = parse(code or "")
    tests = [row.get("test_setup_code") or "", *row["test_list"], row.get("test") or ""]
    called = set().union(*map(identifiers, tests))
    names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)] if tree else []
    if not code or not (wanted := [name for name in names if name in called]):
        return row
    old = wanted[-1]
    taken = set().union(called, identifiers(code))
    pairs = _new_parameters(code, tests, old, taken)
    edits = [edit for _, edits in pairs for edit in edits]
    new = _new_function_name(old, taken)
    of_code = name_edits(code, old, new)
    all_of_tests = [name_edits(test, old, new) for test in tests]
    is_renamed = of_code is not None and None not in all_of_tests
    edits += of_code if is_renamed and of_code is not None else []
    changed = []
    for test, of_test in zip(tests, all_of_tests, strict=True):
        words = [edit for (a, b), _ in pairs for edit in keyword_edits(test, {old}, a, b)]
        changed.append(apply(test, words + (of_test or [] if is_renamed else [])))
    key = _description(row)
    found = {**row, "code": apply(code, edits), "test_list": changed[1:-1]}
    if is_renamed:
        found[key] = re.sub(rf"\b{re.escape(old)}\b", new, row[key])
    for name, text in (("test_setup_code", changed[0]), ("test", changed[-1])):
        if row.get(name):
            found[name] = text
    return found


def _new_parameters(
    program: str, tests: list[str], name: str, taken: set[str]
) -> list[tuple[tuple[str, str], list[Edit]]]:
    """Old and new name of each parameter that can be renamed, with the edits of the program."""
    tree = parse(program)
    owner = function(tree, name) if tree is not None else None
    if owner is None or any("**" in test for test in tests):
        return []
    found = []
    arguments = [*owner.args.posonlyargs, *owner.args.args, *owner.args.kwonlyargs]
    for number, argument in enumerate(arguments):
        old, new = argument.arg, f"var_{number}"
        if new in taken:
            continue
        edits = parameter_edits(program, owner, old, new, old.lower() not in _SHORT_WORDS)
        if edits is not None:
            found.append(((old, new), edits))
    return found


def _new_function_name(old: str, taken: set[str]) -> str:
    """`two_words` is `twoWords`; one word gets a verb before it."""
    first, *others = [part for part in old.split("_") if part] or [old]
    new = first + "".join(part[0].upper() + part[1:] for part in others)
    if new == old:
        new = f"do_{old}"
    while new in taken:
        new = f"do_{new}"
    return new


def _format(row: Row, drawn: random.Random) -> Row:
    """Another layout."""
    if _is_mbpp(row):
        key = _description(row)
        text = "\n".join(textwrap.fill(line, 40) for line in row[key].split("\n"))
        return {**row, key: text, "test_list": [f"{test}\n" for test in row["test_list"]]}
    ways = [_with_tabs, _with_blank_lines, _with_long_signature]
    for way in drawn.sample(ways, len(ways)):
        new = way(row)
        if new != row:
            return new
    return row


def _with_tabs(row: Row) -> Row:
    """Each level of indentation is a tab, in the prompt and in the solution."""
    prompt, solution = row["prompt"], row.get("canonical_solution") or ""
    if not prompt.endswith("\n"):
        return row
    program = prompt + (solution or "    pass\n")
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(program).readline))
    except (tokenize.TokenError, IndentationError):
        return row
    levels: dict[int, tuple[int, int]] = {}
    lines, depth = program.split("\n"), 0
    for token in tokens:
        depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
        if token.type not in (tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.COMMENT):
            levels.setdefault(token.start[0], (depth, token.start[1]))
    starts_statement = True
    for token in tokens:
        if token.type in (tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.COMMENT):
            continue
        line = token.start[0] - 1
        if starts_statement and line < len(lines):
            level, column = levels[token.start[0]]
            if not lines[line][:column].strip():
                lines[line] = "\t" * level + lines[line][column:]
        starts_statement = token.type == tokenize.NEWLINE
    height = prompt.count("\n")
    new = {**row, "prompt": "\n".join(lines[:height]) + "\n"}
    if solution:
        new["canonical_solution"] = "\n".join(lines[height:])
    return new


def _with_blank_lines(row: Row) -> Row:
    """A blank line after the signature, and one more before each definition."""
    prompt = row["prompt"]
    tree = parse(prompt)
    owner = function(tree, row["entry_point"]) if tree is not None else None
    if owner is None or owner.body[0].lineno <= owner.lineno:
        return row
    lines = prompt.split("\n")
    at = owner.body[0].lineno - 1
    return {**row, "prompt": "\n".join(["", *lines[:at], "", *lines[at:]])}


def _with_long_signature(row: Row) -> Row:
    """Each parameter of the function is on a line of its own."""
    prompt = row["prompt"]
    tree = parse(prompt)
    owner = function(tree, row["entry_point"]) if tree is not None else None
    if owner is None or not owner.args.args:
        return row
    lines = prompt.split("\n")
    line = lines[owner.lineno - 1]
    found = re.fullmatch(r"(def \w+\()(.*)(\)(?: *->.*)?:.*)", line)
    if found is None or "(" in found[2] or "#" in line:
        return row
    starts = [argument.col_offset for argument in owner.args.args]
    if owner.args.vararg or owner.args.kwonlyargs or owner.args.posonlyargs or owner.args.kwarg:
        return row
    text = line.encode()
    ends = [*starts[1:], len((found[1] + found[2]).encode())]
    each = [text[a:b].decode().strip().rstrip(",") for a, b in zip(starts, ends, strict=True)]
    lines[owner.lineno - 1] = "\n".join([found[1], *(f"    {a}," for a in each), found[3]])
    return {**row, "prompt": "\n".join(lines)}


FAMILIES: dict[str, Callable[[Row, random.Random], Row]] = {
    "typos": _typos,
    "names": _names,
    "phrasing": _phrasing,
    "format": _format,
}
