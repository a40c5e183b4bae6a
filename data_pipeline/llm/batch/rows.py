"""The rows of a batch's output and error files: answers and failures by request.

The rows come in any order. Rows of requests that were not asked, second rows of a request, and
lines that are no rows are counted and change nothing.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from data_pipeline.llm.batch_journal import Member
from data_pipeline.llm.completion import AnswerReader, Bounds
from data_pipeline.llm.connection import CallError, error_object, reported_error
from data_pipeline.llm.ledger import Answer
from data_pipeline.records.record import Json

_UNDONE = ("batch_expired", "batch_cancelled")


class RowReader:
    """Reads the files of one batch.

    Args:
        members: its requests.
        reader: reads completions.

    Attributes:
        errors: why a request was not answered, by request.
        counts: `duplicate rows`, `unknown rows`, `unreadable rows` of the files that were read.
    """

    def __init__(self, members: Mapping[str, Member], reader: AnswerReader) -> None:
        self.members = members
        self._reader = reader
        self._counts: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._before: set[str] = set()
        self.errors: dict[str, CallError] = {}
        self.counts: Counter[str] = Counter()

    def begin(self) -> None:
        """A file begins, perhaps not for the first time."""
        self._counts.clear()
        self._seen = set(self._before)

    def end(self) -> None:
        """The file was read."""
        self.counts.update(self._counts)
        self._before = self._seen

    def take(self, lines: list[bytes | None], is_open: Callable[[str], bool]) -> dict[str, Answer]:
        """Read lines; returns the answers to requests that have none yet.

        Args:
            lines: as they stand in the file; None for one that is too long.
            is_open: whether a request is still without an answer.
        """
        answers: dict[str, Answer] = {}
        for line in lines:
            row = _parse(line)
            key = row.get("custom_id") if row is not None else None
            if row is None or not isinstance(key, str):
                self._counts["unreadable rows"] += 1
            elif key not in self.members:
                self._counts["unknown rows"] += 1
            else:
                self._counts["duplicate rows"] += key in self._seen
                self._seen.add(key)
                if key not in answers and is_open(key):
                    try:
                        answers[key] = self._answer(row, self.members[key])
                    except CallError as error:
                        self.errors.setdefault(key, error)
        return answers

    def _answer(self, row: dict[str, Any], member: Member) -> Answer:
        """The answer in a row.

        Raises:
            CallError: there is none.
        """
        response, error = row.get("response"), row.get("error")
        status = response.get("status_code") if isinstance(response, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        body = response.get("body") if isinstance(response, dict) else None
        if isinstance(code, str) and code in _UNDONE:
            raise CallError(code, "not done by the batch")
        if isinstance(response, dict) and status == 200:
            bounds = Bounds(member.prompt, member.completion)
            return self._reader.read(body, bounds)
        reported = error_object(body) or error_object({"error": error})
        if type(status) is int and 300 <= status < 600:
            reported = reported or {"message": "a row of a batch, without a word"}
            raise reported_error(reported, status, self._reader.redact)
        if reported is not None:
            raise reported_error(reported, 200, self._reader.redact)
        # Such as status code 0: nothing says that it was not billed.
        raise CallError("no_status", "a row without answer or HTTP status", billed=True)


def _parse(line: bytes | None) -> dict[str, Json] | None:
    """The JSON object of a line; None when it holds none."""
    try:
        row = json.loads((line or b"").decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
