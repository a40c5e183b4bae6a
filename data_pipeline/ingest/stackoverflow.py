"""Posts.xml of the Stack Exchange data dump: one record for each question with its answers.

The dump is one `<row .../>` a post, questions (PostTypeId 1) and answers (2) mixed, in the order of
their Id; the schema is https://meta.stackexchange.com/q/2677. It is read once, as a stream, from
the .xml or out of the .7z it comes in. Questions with a wanted tag and their answers go to a
temporary SQLite database on the disk (in SQLITE_TMPDIR or TMPDIR, gone with the process), and the
records are read from it in the order of the questions. Memory holds 16 bytes a wanted question.

Documents, in the sense of in = out + rejected, are the questions with a wanted tag. They are
rejected as `no_answer` (none given), `low_score` (none accepted, none with the score asked for), or
for their text as any document is; a row that is not a post is rejected as `malformed`. The other
posts of the dump, tens of millions, get no line each in the rejects files: they are counted by
kind in `posts.json`, whose counts add up to the rows of the file. A file that is not well-formed
XML to its end stops the run, since half a dump must not pass for the whole.

Entities cannot be declared: a file with a DOCTYPE is refused, which leaves no external entity and
no expansion.
"""

import re
import sqlite3
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, BinaryIO
from xml.parsers import expat

from data_pipeline.ingest.archive_members import ArchiveBomb
from data_pipeline.ingest.html_text import html_to_text
from data_pipeline.ingest.licenses import all_of
from data_pipeline.ingest.sources import SourceFile
from data_pipeline.records.record import Json, Record, Reject, record_id, reject_at
from data_pipeline.records.text import DocumentError, check_text
from megaphi.errors import RunError

READ_BYTES = 2**20
MAX_ROW_BYTES = 16 * 2**20  # posts have at most 30,000 characters; expat is slow on huge tokens
MAX_BODY = 2**18  # characters of HTML; the same limit with tags and entities
_INTEGER = re.compile(r"-?[0-9]{1,18}", re.ASCII)
_TAG_MARKS = re.compile(r"[<>|]+")  # <python><list> in older dumps, |python|list| in newer ones
_LICENSE = re.compile(r"CC BY-SA ([0-9.]+)")


@dataclass(frozen=True, kw_only=True)
class PostOptions:
    """Which posts become records.

    Attributes:
        tags: a question is wanted that has one of these.
        min_score: of an answer that is not the accepted one.
        max_answers: of a question, the accepted one first, then by score.
        site: host of the dump's site, for the addresses.
    """

    tags: tuple[str, ...]
    min_score: int
    max_answers: int
    site: str


@dataclass(frozen=True, kw_only=True)
class TextLimits:
    """Smallest and largest text of a record, UTF-8 bytes."""

    min_bytes: int
    max_bytes: int


Attributes = dict[str, str]


def parse_rows(stream: BinaryIO, name: str) -> Iterator[Attributes]:
    """Yield the attributes of each row of Posts.xml, in bounded memory.

    Args:
        stream: the XML.
        name: of the file, for messages.

    Raises:
        RunError: it is not well-formed to its end, not a Posts.xml, or declares a DOCTYPE.
        OSError: it cannot be read.
    """
    rows: list[Attributes] = []
    path: list[str] = []

    def fail(what: str) -> RunError:
        return RunError(f"{name}: line {parser.CurrentLineNumber}: {what}")

    def start(tag: str, attributes: Attributes) -> None:
        path.append(tag)
        if path == ["posts", "row"]:
            rows.append(attributes)
        elif path != ["posts"]:
            raise fail(f"<{'/'.join(path)[:80]}> where <posts/row> is expected: not a Posts.xml")

    def doctype(*declared: object) -> None:
        raise fail("a DOCTYPE, which the data dump has not; refused")

    parser = expat.ParserCreate("utf-8")
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda tag: path.pop()
    parser.StartDoctypeDeclHandler = doctype
    read = 0
    while True:
        data = stream.read(READ_BYTES)
        read += len(data)
        try:
            parser.Parse(data, not data)
        except expat.ExpatError as error:
            raise RunError(f"{name}: not well-formed XML: {error}; is the file complete?") from None
        if read - parser.CurrentByteIndex > MAX_ROW_BYTES:
            raise fail(f"a row longer than {MAX_ROW_BYTES} bytes")
        yield from rows
        rows.clear()
        if not data:
            return


def open_posts_file(file: SourceFile) -> Iterator[BinaryIO]:
    """Yield one stream: the XML of a .xml file, or of a .7z archive.

    Raises:
        OSError, ArchiveBomb: it cannot be read.
    """
    if file.path.endswith(".7z"):
        from data_pipeline.ingest.sevenzip import open_posts

        yield from open_posts(file.path, file.size)
    else:
        with open(file.path, "rb") as stream:
            yield stream


class _Spool:
    """The wanted questions and their answers, on the disk."""

    def __init__(self, name: str, options: PostOptions) -> None:
        self._name = name
        # The empty name is SQLite's private database on disk: deleted as it is opened.
        self.database = sqlite3.connect("", isolation_level=None)
        for pragma in (
            "temp_store=FILE",
            "journal_mode=OFF",
            "synchronous=OFF",
            "cache_size=-65536",
        ):
            self.database.execute(f"PRAGMA {pragma}")
        self.database.execute("CREATE TABLE questions(id INTEGER PRIMARY KEY, title, post)")
        self.database.execute(
            "CREATE TABLE answers(question INTEGER, id INTEGER, score INTEGER, post)"
        )
        self.database.execute("BEGIN")
        self.counts: Counter[str] = Counter()
        self.last_question = 0
        self._options = options
        self._tags = {tag.lower() for tag in options.tags}
        self._wanted = array("q")  # ids, ascending
        self._accepted = array("q")  # of the same questions, 0 for none

    def add(self, row: Attributes) -> None:
        """Take a post.

        Raises:
            DocumentError: `malformed`.
            RunError: the questions are not in order.
        """
        kind, number = _integer(row, "PostTypeId"), _integer(row, "Id")
        if kind == 1:
            self._add_question(number, row)
        elif kind == 2:
            self._add_answer(number, row)
        else:
            self.counts["other_post"] += 1

    def _add_question(self, number: int, row: Attributes) -> None:
        if number <= self.last_question:
            if number == self.last_question:
                raise DocumentError("malformed", f"a second question {number}")
            raise RunError(
                f"{self._name}: question {number} comes after {self.last_question}: the posts are "
                "not in the order of Id, as the data dump has them; sort them"
            )
        self.last_question = number
        if self._tags.isdisjoint(split_tags(row.get("Tags", ""))):
            self.counts["not_tagged"] += 1
            return
        self.counts["question"] += 1
        self._wanted.append(number)
        self._accepted.append(_integer(row, "AcceptedAnswerId", 0))
        self.database.execute(
            "INSERT INTO questions VALUES (?, ?, ?)", (number, row.get("Title", ""), _pack(row))
        )

    def _add_answer(self, number: int, row: Attributes) -> None:
        question = _integer(row, "ParentId")
        score = _integer(row, "Score", 0)
        place = bisect_left(self._wanted, question)
        known = place < len(self._wanted) and self._wanted[place] == question
        if not known and question <= self.last_question:
            self.counts["answer_of_other_question"] += 1
            return
        # An answer may be older than its question, if two questions were merged: kept for later.
        accepted = known and self._accepted[place] == number
        if known and not accepted and score < self._options.min_score:
            self.counts["answer_low_score"] += 1
            # Its question has an answer all the same: a row without text remembers that.
            text = None
        else:
            text = _pack(row)
        self.database.execute(
            "INSERT INTO answers VALUES (?, ?, ?, ?)", (question, number, score, text)
        )

    def finish(self) -> None:
        """After the last row: find the answers of each question."""
        execute = self.database.execute
        execute("CREATE INDEX by_question ON answers(question, id)")
        orphans = execute(
            "SELECT count(*) FROM answers WHERE question NOT IN (SELECT id FROM questions)"
        ).fetchone()[0]
        self.counts["answer_of_other_question"] += orphans

    def questions(self) -> Iterator[tuple[int, str, Attributes]]:
        """(id, title, post) of the wanted questions, by id."""
        rows = self.database.execute("SELECT id, title, post FROM questions ORDER BY id")
        for number, title, post in rows:
            yield number, title, _unpack(post)

    def answers(
        self, question: int, accepted: int
    ) -> tuple[int, list[tuple[int, int, Attributes]]]:
        """How many answers a question has, and (id, score, post) of the chosen ones."""
        rows = self.database.execute(
            "SELECT id, score, post FROM answers WHERE question = ?"
            " ORDER BY id <> ?, score DESC, id",
            (question, accepted),
        ).fetchall()
        good = [
            (number, score, post)
            for number, score, post in rows
            if post is not None and (number == accepted or score >= self._options.min_score)
        ]
        chosen = [(n, s, _unpack(post)) for n, s, post in good[: self._options.max_answers]]
        with_text = sum(post is not None for _, _, post in rows)
        self.counts["answer_used"] += len(chosen)
        self.counts["answer_low_score"] += with_text - len(good)
        self.counts["answer_beyond_maximum"] += len(good) - len(chosen)
        return len(rows), chosen


_KEPT = ("Body", "Score", "OwnerUserId", "OwnerDisplayName", "ContentLicense", "CreationDate")


def _pack(row: Attributes) -> str:
    """The kept attributes of a post as one string."""
    kept = {**{key: row.get(key, "") for key in _KEPT}, "Tags": row.get("Tags", "")}
    kept["AcceptedAnswerId"] = row.get("AcceptedAnswerId", "")
    return "\0".join(kept.values())  # XML cannot hold NUL


def _unpack(packed: str) -> Attributes:
    return dict(zip((*_KEPT, "Tags", "AcceptedAnswerId"), packed.split("\0"), strict=True))


def _integer(row: Attributes, name: str, default: int | None = None) -> int:
    """An attribute as an integer.

    Raises:
        DocumentError: `malformed`: it is missing without a default, or is no integer.
    """
    text = row.get(name) or ("" if default is None else str(default))
    if not _INTEGER.fullmatch(text):
        raise DocumentError("malformed", f"{name} is {text[:40]!r}, not an integer")
    return int(text)


def split_tags(text: str) -> list[str]:
    """The tags of a post, in lower case."""
    return [tag for tag in _TAG_MARKS.split(text.lower()) if tag]


def read_posts(
    file: SourceFile, source: str, options: PostOptions, limits: TextLimits, notes: list[Json]
) -> Iterator[Record | Reject]:
    """Yield the record or reject of each wanted question, and the rejects of malformed rows.

    Args:
        file: Posts.xml, or a .7z archive that holds it.
        source: label of the records.
        options: which posts.
        limits: of the texts.
        notes: the counts of all rows are added to it at the end.

    Raises:
        RunError: the file cannot be read to its end, or is not a Posts.xml.
    """
    spool = _Spool(file.path, options)
    with closing(spool.database):
        rows = malformed = 0
        try:
            for stream in open_posts_file(file):
                for row in parse_rows(stream, file.path):
                    rows += 1
                    try:
                        spool.add(row)
                    except DocumentError as error:
                        malformed += 1
                        yield reject_at(
                            source, f"{file.name}:row {rows}", error.reason, error.detail
                        )
        except (OSError, ArchiveBomb) as error:
            raise RunError(f"{file.path}: cannot be read to its end: {error}") from None
        spool.finish()
        for number, title, post in spool.questions():
            yield _outcome(spool, number, title, post, source, options, limits)
        counts = {**spool.counts, "malformed": malformed}
        if sum(counts.values()) != rows:
            raise RunError(f"{file.path}: {rows} rows, but {counts} do not add up to them")
        notes.append({"file": file.name, "rows": rows, "counts": dict(sorted(counts.items()))})


def _outcome(
    spool: _Spool,
    number: int,
    title: str,
    post: Attributes,
    source: str,
    options: PostOptions,
    limits: TextLimits,
) -> Record | Reject:
    """The record of a question, or why there is none."""
    url = f"https://{options.site}/questions/{number}"
    accepted = int(post["AcceptedAnswerId"] or 0)
    given, answers = spool.answers(number, accepted)
    try:
        if not answers:
            if given:
                raise DocumentError("low_score", f"none of {given} answers is good enough")
            raise DocumentError("no_answer", "has no answer")
        parts = [f"# {' '.join(title.split())}", _text(post)]
        for _, _, answer in answers:
            parts += ["## Answer", _text(answer)]
        text = check_text("\n\n".join(parts) + "\n", limits.min_bytes)
        size = len(text.encode("utf-8"))
        if size > limits.max_bytes:
            raise DocumentError("too_large", f"{size} bytes, above {limits.max_bytes}")
    except DocumentError as error:
        return reject_at(source, url, error.reason, error.detail)
    record = Record(id=record_id(source, url), text=text, source=source, lang="English", url=url)
    license_ = _licenses([post, *(answer for _, _, answer in answers)])
    if license_:
        record["license"] = license_
    record["meta"] = {
        "question": number,
        "score": int(post["Score"] or 0),
        "author": _author(post),
        "created": post["CreationDate"],
        "tags": split_tags(post["Tags"]),
        "answers": [
            {"id": n, "score": score, "accepted": n == accepted, "author": _author(answer)}
            for n, score, answer in answers
        ],
    }
    return record


def _text(post: Attributes) -> str:
    """The text of a post.

    Raises:
        DocumentError: `too_large`, or `empty`.
    """
    if len(post["Body"]) > MAX_BODY:
        raise DocumentError("too_large", f"a post of {len(post['Body'])} characters")
    text = html_to_text(post["Body"])
    if not text:
        raise DocumentError("empty", "a post without text")
    return text


def _licenses(posts: Iterable[Attributes]) -> str:
    """The SPDX expression of the posts' licences; "" if one has none, as in dumps before 2020."""
    found: list[Any] = [_LICENSE.fullmatch(post["ContentLicense"]) for post in posts]
    if not all(found):
        return ""
    return all_of(sorted({f"CC-BY-SA-{match[1]}" for match in found}))


def _author(post: Attributes) -> str:
    """Whom to name: the user's number, or the name that a deleted user left."""
    return post["OwnerUserId"] or post["OwnerDisplayName"]
