"""Which documents may be used: an allow-list of licences, and repositories that have opted out.

Licences are SPDX expressions (SPDX specification, annex D): `AND` binds tighter than `OR`, `WITH`
names an exception, which only adds permissions, and `+` means "or later". Names are compared
without case. What is not understood is not allowed.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from data_pipeline.ingest.options import PERMISSIVE, FilterFiles
from data_pipeline.records.record import Record, digest
from megaphi.errors import RunError

_TOKEN = re.compile(r"\s*(?:([()])|([A-Za-z0-9.+:-]+)|(\S))")
_IDENTIFIER = re.compile(r"[A-Za-z0-9.+:-]+", re.ASCII)
_REPOSITORY = re.compile(r"[^/\s]+/[^/\s]*")
_MAX_EXPRESSION = 4096  # characters
_MAX_DEPTH = 32


def all_of(licenses: Sequence[str]) -> str:
    """The SPDX expression that says that all of these apply."""
    if len(licenses) == 1:
        return licenses[0]
    return " AND ".join(f"({item})" if " or " in item.lower() else item for item in licenses)


def identifiers(expression: str) -> set[str]:
    """The licences that an expression names, in lower case."""
    words = [word.lower() for _, word, _ in _TOKEN.findall(expression) if word]
    return {word for word in words if word not in ("and", "or", "with")}


def is_allowed(expression: str, allowed: frozenset[str]) -> bool:
    """Whether a licence expression permits use under licences of an allow-list.

    Args:
        expression: SPDX expression.
        allowed: identifiers in lower case.
    """
    if len(expression) > _MAX_EXPRESSION:
        return False
    tokens = [(mark or word or f"?{odd}").lower() for mark, word, odd in _TOKEN.findall(expression)]
    try:
        verdict, end = _either(tokens, 0, allowed, 0)
    except _NotUnderstood:
        return False
    return verdict and end == len(tokens)


class _NotUnderstood(Exception):
    """The expression is not one of the grammar."""


def _either(tokens: list[str], at: int, allowed: frozenset[str], depth: int) -> tuple[bool, int]:
    """`both (OR both)*`, from token `at`; returns (allowed, next token)."""
    verdict, at = _both(tokens, at, allowed, depth)
    while at < len(tokens) and tokens[at] == "or":
        other, at = _both(tokens, at + 1, allowed, depth)
        verdict = verdict or other
    return verdict, at


def _both(tokens: list[str], at: int, allowed: frozenset[str], depth: int) -> tuple[bool, int]:
    """`one (AND one)*`."""
    verdict, at = _one(tokens, at, allowed, depth)
    while at < len(tokens) and tokens[at] == "and":
        other, at = _one(tokens, at + 1, allowed, depth)
        verdict = verdict and other
    return verdict, at


def _one(tokens: list[str], at: int, allowed: frozenset[str], depth: int) -> tuple[bool, int]:
    """`(expression)` or `identifier [WITH exception]`."""
    if at >= len(tokens) or depth > _MAX_DEPTH:
        raise _NotUnderstood
    if tokens[at] == "(":
        verdict, at = _either(tokens, at + 1, allowed, depth + 1)
        if at >= len(tokens) or tokens[at] != ")":
            raise _NotUnderstood
        return verdict, at + 1
    name = tokens[at]
    if name in ("and", "or", "with", ")") or name.startswith("?"):
        raise _NotUnderstood
    at += 1
    if at + 1 < len(tokens) and tokens[at] == "with":
        at += 2
    return name in allowed or name.removesuffix("+") in allowed, at


@dataclass(frozen=True)
class Filters:
    """The lists' content.

    Attributes:
        licenses: allowed identifiers, in lower case; None allows every document.
        opted_out: `owner/name`, or `owner/` for all of an owner's, in lower case.
    """

    licenses: frozenset[str] | None
    opted_out: frozenset[str]

    @property
    def digests(self) -> dict[str, str | None]:
        """What identifies each list, for the stage's configuration; None where there is none."""
        return {
            "licenses": None if self.licenses is None else digest(sorted(self.licenses)),
            "opt_out": digest(sorted(self.opted_out)) if self.opted_out else None,
        }

    def refusal(self, record: Record) -> tuple[str, str] | None:
        """(reason, detail) if the record must not be used, else None."""
        for repository in repositories(record):
            if matches_repository(repository, self.opted_out):
                return "opted_out", repository
        if self.licenses is not None:
            expression = record.get("license", "")
            if not is_allowed(expression, self.licenses):
                return "license", expression[:200] or "no licence is known"
        return None


def repositories(record: Record) -> list[str]:
    """The repositories that a record is known to lie in.

    The Stack names up to three: where the file has most stars, issues and forks.
    """
    meta = record.get("meta", {})
    names = [
        record.get("repo"),
        *(meta.get(f"max_{kind}_repo_name") for kind in ("issues", "forks")),
    ]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def matches_repository(repository: str, wanted: frozenset[str]) -> bool:
    """Whether `owner/name` is one of `wanted`, or its owner's `owner/` is."""
    name = repository.lower()
    return name in wanted or name.partition("/")[0] + "/" in wanted


def repository_pattern(text: str) -> str:
    """A repository as `matches_repository` compares it.

    Raises:
        ValueError: it is not `owner/name` or `owner/`.
    """
    if not _REPOSITORY.fullmatch(text):
        raise ValueError(f"{text!r}: a repository is OWNER/NAME, all of an owner's OWNER/")
    return text.lower()


@functools.lru_cache(maxsize=4)
def load_filters(files: FilterFiles) -> Filters:
    """Read the lists.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a line is not an identifier or a repository; the file and line are named.
    """
    licenses = None
    if files.licenses is not None:
        shipped = files.licenses == PERMISSIVE
        path = (
            resources.files("data_pipeline.ingest") / "permissive_licenses.txt"
            if shipped
            else Path(files.licenses)
        )
        lines = _read_lines(str(path))
        for number, line in lines:
            if not _IDENTIFIER.fullmatch(line):
                raise ValueError(f"{path}:{number}: {line!r} is not an SPDX identifier")
        if not lines:
            raise ValueError(f"{path}: names no licence; nothing could be kept")
        licenses = frozenset(line.lower() for _, line in lines)
    opted_out = []
    for number, line in _read_lines(files.opt_out) if files.opt_out else []:
        try:
            opted_out.append(repository_pattern(line))
        except ValueError as error:
            raise ValueError(f"{files.opt_out}:{number}: {error}") from None
    return Filters(licenses, frozenset(opted_out))


def load_same_filters(files: FilterFiles, digests: dict[str, str | None]) -> Filters:
    """Read the lists in a worker.

    Raises:
        RunError: they are not the ones that the run began with.
    """
    filters = load_filters(files)
    if filters.digests != digests:
        raise RunError(f"{files.licenses}, {files.opt_out}: changed during the run; run again")
    return filters


def _read_lines(path: str) -> list[tuple[int, str]]:
    """(line number, line) of a list, without comments and blank lines."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from None
    lines = ((n, line.partition("#")[0].strip()) for n, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in lines if line]
