"""Problems of programming contests with solutions: the data set deepmind/code_contests.

A row is a problem with thousands of solutions in several languages. It becomes one document: the
statement, then up to N different Python 3 solutions in the order of the row. Documents of one
solution each would repeat the statement, which near-deduplication takes out again. Incorrect
solutions, Python 2 and the tests are left out.
"""

from typing import Any, cast

from data_pipeline.ingest.html_text import fence
from data_pipeline.records.record import Json, Record, record_id
from data_pipeline.records.text import LONG_WORD, DocumentError, check_text

# Numbers of the data set's class labels (the Language and Source of contest_problem.proto).
PYTHON3 = 3
_SOURCES = ("unknown", "codechef", "codeforces", "hackerearth", "codejam", "atcoder", "aizu")
LICENSE = "CC-BY-4.0"
COLUMNS = (
    *("name", "description", "solutions", "source", "difficulty"),
    *("cf_contest_id", "cf_index", "cf_rating", "cf_tags"),
)
_META = ("difficulty", "cf_rating", "cf_tags")


def is_contest_row(row: dict[str, Json]) -> bool:
    """Whether a row looks like one of this data set."""
    return "solutions" in row and "description" in row and "name" in row


def contest_record(
    position: str,
    row: dict[str, Json],
    source: str,
    *,
    max_solutions: int,
    min_bytes: int,
    max_bytes: int,
) -> Record:
    """The document of one problem.

    Args:
        position: of the row, from which the id is made.
        row: the row, as Parquet or JSON gives it.
        source: label of the record.
        max_solutions: number of solutions to take.
        min_bytes: smallest text.
        max_bytes: largest text; solutions that would exceed it are left out.

    Raises:
        DocumentError: `missing_field`, `type`, `no_solution`, or what is wrong with the text.
    """
    for field in ("name", "description", "solutions"):
        if row.get(field) is None:
            raise DocumentError("missing_field", f"no field {field!r}")
    name, description = row["name"], row["description"]
    if not isinstance(name, str) or not isinstance(description, str):
        raise DocumentError("type", "name or description is not a string")
    text = f"# {' '.join(name.split())}\n\n{description.strip()}\n"
    if not description.strip():
        raise DocumentError("empty", "a problem without a statement")
    given = used = 0
    size = len(text.encode("utf-8", "surrogatepass"))
    for solution in _python3(row["solutions"]):
        given += 1
        code = solution.replace("\r\n", "\n").strip("\n")
        block = f"\n## Solution\n\n{fence(code, 'python')}\n"
        block_size = len(block.encode("utf-8", "surrogatepass"))
        if size + block_size <= max_bytes and _is_fit(code):
            text, size, used = text + block, size + block_size, used + 1
            if used == max_solutions:
                break
    if not used:
        raise DocumentError("no_solution", f"no usable one of {given} in Python 3")
    record = Record(
        id=record_id(source, position),
        text=check_text(text, min_bytes),
        source=source,
        lang="Python",
        license=LICENSE,
    )
    url = _url(row)
    if url:
        record["url"] = url
    meta = {key: row[key] for key in _META if row.get(key) is not None}
    number = row.get("source")
    if isinstance(number, int) and 0 <= number < len(_SOURCES):
        meta["contest_site"] = _SOURCES[number]
    record["meta"] = {"name": name, "solutions": used, **meta}
    return record


def _python3(solutions: Json) -> list[str]:
    """The different Python 3 solutions, in order.

    Raises:
        DocumentError: `type`.
    """
    if isinstance(solutions, list) and all(isinstance(item, dict) for item in solutions):
        pairs = [(item.get("language"), item.get("solution")) for item in solutions]
    elif isinstance(solutions, dict):
        languages, texts = solutions.get("language"), solutions.get("solution")
        if not isinstance(languages, list) or not isinstance(texts, list):
            raise DocumentError("type", "solutions hold no lists language and solution")
        if len(languages) != len(texts):
            raise DocumentError("type", f"{len(languages)} languages of {len(texts)} solutions")
        pairs = list(zip(languages, texts, strict=True))
    else:
        raise DocumentError("type", f"solutions is {type(solutions).__name__}")
    chosen = (text for language, text in pairs if language in (PYTHON3, "PYTHON3"))
    return list(dict.fromkeys(cast(Any, [text for text in chosen if isinstance(text, str)])))


def _is_fit(code: str) -> bool:
    """Whether a solution may stand in a document: a bad one must not cost the problem."""
    try:
        check_text(code, 1)
    except DocumentError:
        return False
    return max(map(len, code.split())) <= LONG_WORD


def _url(row: dict[str, Json]) -> str | None:
    """The problem's page, known for Codeforces."""
    contest, index = row.get("cf_contest_id"), row.get("cf_index")
    if isinstance(contest, int) and contest > 0 and isinstance(index, str) and index.isalnum():
        return f"https://codeforces.com/problemset/problem/{contest}/{index}"
    return None
