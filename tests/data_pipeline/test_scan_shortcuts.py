"""The scan's and the signals' shortcuts change nothing: against plain forms of what they stand for.

The plain forms search whole texts with every pattern, one after the other; texts are drawn from
fragments that the shortcuts look at (key words, quotes, odd white space, letters that change when
they are put in lower case) and from what the patterns themselves generate.
"""

import ast
import importlib
import random
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_pipeline.heuristics.secrets import (
    LONG_WORD,
    PERSONAL,
    PLUGINS,
    RULES,
    SOLID_PLUGINS,
    Finding,
    Rule,
    is_personal_address,
    is_personal_email,
    looks_real,
    scan,
)
from data_pipeline.heuristics.signals import compute_signals
from tests.data_pipeline.test_secrets import LOOK_ALIKES, assigned, planted

QUICK = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def plugin(name: str) -> Any:
    pytest.importorskip("detect_secrets")
    module, class_name = name.split(".")
    return getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), class_name)()


def assert_solid(pattern: re.Pattern[str], words: tuple[str, ...]) -> None:
    """Every match holds no white space, is long and has one of the words in it."""

    @QUICK
    @given(st.from_regex(pattern))
    def check(text: str) -> None:
        matches = [match[0] for match in pattern.finditer(text)]
        assert matches
        for match in matches:
            assert match.split() == [match]
            assert len(match) >= LONG_WORD
            assert any(word in match.lower() for word in words)

    check()


@pytest.mark.parametrize("rule", [r for r in RULES if r.solid], ids=lambda r: r.words[0])
def test_matches_of_solid_rules_are_long_words_with_a_key_word(rule: Rule) -> None:
    assert_solid(rule.pattern, rule.words)


@pytest.mark.parametrize("kind", sorted(SOLID_PLUGINS))
def test_matches_of_solid_plugins_are_long_words_with_a_key_word(kind: str) -> None:
    (name,) = (name for name in PLUGINS if name.split(".")[0] == kind)
    for pattern in plugin(name).denylist:
        assert_solid(pattern, tuple(PLUGINS[name].split()))


# The patterns of personal data as they would be written without regard to speed.
PLAIN_PERSONAL = (
    re.compile(
        r"(?<![\w.+%-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@((?:[A-Za-z0-9-]{1,63}\.){1,5}([A-Za-z]{2,12}))\b"
        r"(?!\()"
    ),
    re.compile(r"(?<![\w.+-])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w-]|\.[0-9])"),
    re.compile(
        r"(?<![\w:.])[23][0-9a-fA-F]{3}:(?:[0-9a-fA-F]{0,4}:){1,6}[0-9a-fA-F]{0,4}(?![\w:])"
    ),
)


@pytest.mark.parametrize(
    ("ours", "plain"),
    zip(PERSONAL, PLAIN_PERSONAL, strict=True),
    ids=("email", "ipv4", "ipv6"),
)
def test_patterns_of_personal_data_equal_their_plain_forms(ours: Any, plain: Any) -> None:
    _, hint, pattern = ours

    @settings(QUICK, max_examples=150)
    @given(
        st.from_regex(plain) | st.text("a1@.:-+%_ \n2f3é(9", max_size=60),
        st.text("a1@.:-+ \n", max_size=3),
    )
    @example("a@b.-c.com", "")  # a label may begin with a hyphen
    def check(text: str, before: str) -> None:
        text = before + text
        expected = [match.span() for match in plain.finditer(text)]
        assert [match.span() for match in pattern.finditer(text)] == expected
        assert hint.search(text) or not expected

    check()


def plain_scan(text: str) -> list[Finding]:
    """`scan` without shortcuts: a rule's and a plugin's words are looked for in the whole text."""
    found, lowered = [], text.lower()
    for rule in RULES:
        if any(word in lowered for word in rule.words):
            group = 1 if rule.pattern.groups else 0
            for match in rule.pattern.finditer(text):
                if not rule.random or looks_real(match[group], rule.kind):
                    found.append(Finding(rule.kind, *match.span(group)))
    for match in PLAIN_PERSONAL[0].finditer(text):
        if is_personal_email(match[0]):
            found.append(Finding("email", *match.span()))
    for pattern in PLAIN_PERSONAL[1:]:
        for match in pattern.finditer(text):
            if is_personal_address(match[0]):
                found.append(Finding("ip_address", *match.span()))
    for name, words in PLUGINS.items():
        if any(word in lowered for word in words.split()):
            kind = name.split(".")[0]
            for value in sorted(set(plugin(name).analyze_string(text))):
                if len(value) >= 12 and looks_real(value, kind):
                    spans = (match.span() for match in re.finditer(re.escape(value), text))
                    found += [Finding(kind, *span) for span in spans]
    kept: list[Finding] = []
    for finding in sorted(found, key=lambda f: (f.start, -f.end)):
        if not kept or finding.start >= kept[-1].end:
            kept.append(finding)
        elif finding.end > kept[-1].end:
            kept[-1] = Finding(kept[-1].kind, kept[-1].start, finding.end)
    return kept


WORDS = sorted(
    {word for rule in RULES for word in rule.words} | set(" ".join(PLUGINS.values()).split())
)
NAMES = "api_key secret_key auth-token consumerSecrets token TOKEN passwd db_pwd aws_secret AKIA SK"
GAPS = [
    " ",
    "\n",
    "\t",
    "\x1c",
    "\x85",
    "\u2003",
    "",
    "",
    "'",
    '"',
    "=",
    ": str = '",
    '": "',
    ".",
    "@",
    "_",
]
# `K` is the Kelvin sign, whose lower case is k; the long s and the dotted I change as well.
ODD = ["\u212a", "\u017f", "\u0130", "é", "0123456789", "aB3dE5gH7jK9mN1pQ3sT5vW7", "x" * 40]


def hostile_text(draw: random.Random) -> str:
    """A text of planted secrets, whole and cut, with what stands around secrets."""
    values = [*planted(draw.randrange(10**6)).values(), *assigned(draw.randrange(10**6)).values()]
    pieces = []
    for _ in range(draw.randrange(2, 40)):
        value = draw.choice([*values, *LOOK_ALIKES])
        cut = value[: draw.randrange(len(value))] if draw.random() < 0.3 else value
        pieces += [draw.choice([cut, cut.upper(), *draw.choices(WORDS, k=3), *NAMES.split(), *ODD])]
        pieces += [draw.choice(GAPS)]
    return "".join(pieces)


EDGES = [
    # a user name longer than those of the planted URLs; no e-mail address hides the password
    "url = 'postgres://a_rather_long_user_name:abcdE123fgH@localhost/x'",
    # matched by `(?i:secret)`, but without a key word in lower case: the rule does not run
    "\u017fecret = 'aB3dE5gH7jK9mN1pQ3sT5vW7'",
    "to\u212aen = 'aB3dE5gH7jK9mN1pQ3sT5vW7'",  # while this one's lower case has it
]


@pytest.mark.parametrize("text", EDGES)
def test_edges_equal_plain_scans(text: str) -> None:
    pytest.importorskip("detect_secrets")
    assert scan(text, True) == plain_scan(text)


def test_scans_equal_plain_scans() -> None:
    pytest.importorskip("detect_secrets")
    draw = random.Random(20)
    kinds: set[str] = set()
    for _ in range(600):
        text = hostile_text(draw)
        expected = plain_scan(text)
        assert scan(text, True) == expected, text
        kinds.update(finding.kind for finding in expected)
    assert len(kinds) >= 20, kinds  # the texts hold enough for the comparison to mean something


def plain_signals(text: str) -> dict[str, float]:
    """The signals that shortcuts compute, as their definitions say."""

    def length(pattern: str, within: str = text) -> int:
        return sum(len(match[0]) for match in re.finditer(pattern, within, re.DOTALL))

    total, space = max(len(text), 1), length(r"\s+")
    lines = max(len([line for line in text.split("\n") if line.strip()]), 1)
    string = (
        r'"""(?:[^"\\]|\\.|"(?!""))*+(?:"""|\Z)|' r"'''(?:[^'\\]|\\.|'(?!''))*+(?:'''|\Z)|"
        r'"(?:[^"\\\n]|\\.)*+"?|' r"'(?:[^'\\\n]|\\.)*+'?"
    )  # fmt: skip
    tokens = [m[0] for m in re.finditer(string + r"|#[^\n]*", text, re.DOTALL)]
    comments = sum(len(token) for token in tokens if token.startswith("#"))
    shares = {
        "alphanumeric_share": length(r"\w+") / max(len(text) - space, 1),
        "digit_share": length("[0-9]") / max(len(text) - space, 1),
        "whitespace_share": space / total,
        "non_ascii_share": sum(ord(c) > 127 for c in text) / total,
        "encoded_share": length(r"[A-Za-z0-9+/=_-]{64,}+|(?:\\x[0-9a-fA-F]{2}){16,}+") / total,
        "todo_share": len(re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b[^\n]*", text)) / lines,
        "number_share": length(r"(?<![\w.])[-+]?[0-9](?:[\w.]|(?<=[eE])[-+])*")
        / max(len(text) - space, 1),
        "comment_share": comments / total,
        "string_share": (sum(map(len, tokens)) - comments) / total,
    }
    return {name: round(share, 4) for name, share in shares.items()}


PIECES = [
    *(
        "TODO",
        "XXX",
        "FIXME!",
        "TODOS",
        "éTODO",
        "HACK",
        "1e-5",
        "-1",
        "a-1",
        "+.5",
        "1.e+-3",
        "é2",
    ),
    *(
        "٣",
        "2",
        ".",
        "e",
        "-",
        "+",
        "x" * 63,
        "y=" * 32,
        "\\xfa" * 15,
        "\\x0A" * 17,
        "\\",
        "#",
        "'",
    ),
    *('"', "'''", '"""', "\n", "\n", " ", "\t", "\x1c", "\x85", "\u3000", "日本", "👩", "_", "a b"),
]


def test_signals_equal_their_definitions() -> None:
    draw = random.Random(21)
    for _ in range(3000):
        text = "".join(draw.choices(PIECES, k=draw.randrange(60)))
        found: Any = compute_signals(text)
        expected = plain_signals(text)
        assert {name: found[name] for name in expected} == expected, text


STATEMENTS = '''"""Module."""
import os; from sys import path
@decorate
class C(Base):
    """Class."""
    x: int = ...
    async def f(self):
        """F."""
        async for i in y:
            pass
        else: ...
        async with a as b: import c
    def g(self): return lambda: ...
match os:
    case 1:
        pass
    case _:
        def h(): 'h'
try:
    if a: pass
    elif b: pass
    else:
        while c: break
except* E:
    ...
finally:
    with d: (...)
'''


def test_statements_equal_those_of_a_walk_of_the_tree() -> None:
    found: Any = compute_signals(STATEMENTS)
    nodes = [node for node in ast.walk(ast.parse(STATEMENTS)) if isinstance(node, ast.stmt)]
    sources = [ast.unparse(node) for node in nodes]
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    definitions = [n for n in nodes if isinstance(n, ast.ClassDef)]
    docstrings = [ast.get_docstring(node, clean=False) for node in functions]
    docstrings += [ast.get_docstring(node, clean=False) for node in definitions]
    docstrings += [ast.get_docstring(ast.parse(STATEMENTS), clean=False)]
    assert found["statements"] == len(nodes) == 29
    assert (found["functions"], found["classes"]) == (len(functions), len(definitions)) == (3, 1)
    passes = sum(source in ("pass", "...") for source in sources)
    assert found["pass_share"] == round(passes / len(nodes), 4)
    imports = sum(source.startswith(("import", "from")) for source in sources)
    assert found["import_share"] == round(imports / len(nodes), 4)
    assert found["documented_share"] == round(2 / 3, 4)
    length = sum(len(text) for text in docstrings if text is not None)
    assert found["docstring_share"] == round(length / len(STATEMENTS), 4)
