"""Text out of tokens as they come, ended by stop texts that no token border hides."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack

from megaphi.generate.loop import Finish, Settings, stream_tokens
from megaphi.model.phi import Phi

Decode = Callable[[list[int]], str]
"""Text of token ids; bytes that are no UTF-8 become U+FFFD, as in `tokenizers`."""

_REPLACEMENT = "\ufffd"
# Only the newest tokens are decoded for each new one. Some kept ones stand before them, because a
# decoder may treat the first token of a text in its own way.
_WINDOW_TOKENS = 32
_KEPT_TOKENS = 8


class TextRow:
    """The text of one row, from its tokens one after another.

    Text is given out once it is certain: not while it ends in a half of a character, and not while
    it may be the beginning of a stop text.

    Args:
        decode: text of token ids.
        stops: texts that end the row; none is part of its text. The one that is complete first
            ends it, at the same place however the text is cut into tokens.

    Attributes:
        text: what has been given out.
        stopped: whether a stop text has come; further tokens are ignored.

    Raises:
        ValueError: a stop text is empty.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise ValueError("a stop text must not be empty")
        self.text = ""
        self.stopped = False
        self._decode = decode
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        self._known = 0  # characters of the window that were taken
        self._held = ""  # may begin a stop text

    def add(self, token: int) -> str:
        """Take a token; returns the text that is certain now and was not before."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        # an unfinished character decodes to one U+FFFD at the end, whatever stands before it
        certain = text.removesuffix(_REPLACEMENT)
        fresh, self._known = certain[self._known :], max(self._known, len(certain))
        if certain == text and len(self._tokens) >= _WINDOW_TOKENS:
            self._tokens = self._tokens[-_KEPT_TOKENS:]
            self._known = len(self._decode(self._tokens))
        return self._give_out(fresh)

    def finish(self) -> str:
        """No token follows; returns the rest of the text."""
        if self.stopped:
            return ""
        given = self._give_out(self._decode(self._tokens)[self._known :])
        rest = "" if self.stopped else self._held
        self._tokens, self._known, self._held = [], 0, ""
        self.text += rest
        return given + rest

    def _give_out(self, fresh: str) -> str:
        """Append to what is held, look for stop texts, and hold what may begin one."""
        pending = self._held + fresh
        found = [
            (place + len(stop), place) for stop in self._stops if (place := pending.find(stop)) >= 0
        ]
        if found:
            self.stopped = True
            keep = min(found)[1]
        else:
            keep = len(pending) - self._may_begin(pending)
        self._held = "" if found else pending[keep:]
        self.text += pending[:keep]
        return pending[:keep]

    def _may_begin(self, text: str) -> int:
        """Length of the longest end of a text that is the beginning of a stop text."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


@dataclass(frozen=True)
class TextEvent:
    """New text of a row."""

    row: int
    text: str
    num_tokens: int
    """Tokens of the row so far, those of a stop text included."""
    finish: Finish | None
    """Set in the last event of the row."""


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued by."""

    text: str
    num_tokens: int
    """Tokens that were generated, those of the stop text included."""
    finish: Finish


def stream_text(
    model: Phi,
    prompts: Sequence[Sequence[int]],
    decode: Decode,
    *,
    max_new_tokens: int,
    stops: Sequence[str] | Sequence[Sequence[str]] = (),
    **settings: Unpack[Settings],
) -> Iterator[TextEvent]:
    """Continue each prompt and yield its text as it comes.

    The pieces of a row together are its completion. Every row has exactly one event with `finish`,
    its last; its text may be empty.

    Args:
        model: the model, in evaluation mode.
        prompts: token ids of each row, at least one.
        decode: text of token ids.
        max_new_tokens: most tokens that a row may get.
        stops: texts that end a row, the same for all rows, or a sequence for each.
        settings: see `Settings`; without `stop`.

    Raises:
        ValueError: as `generate` does; or a stop text is empty, or the rows' stops are not as many
            as the prompts.
    """
    assert "stop" not in settings, "stop texts end the rows here"
    rows = [TextRow(decode, texts) for texts in _stops_of_rows(stops, len(prompts))]
    fresh = [""] * len(rows)
    counts = [0] * len(rows)

    def stop(row: int, tokens: list[int]) -> bool:
        counts[row] = len(tokens)
        fresh[row] = rows[row].add(tokens[-1])
        return rows[row].stopped

    settings["stop"] = stop
    for event in stream_tokens(model, prompts, max_new_tokens=max_new_tokens, **settings):
        text = fresh[event.row] if event.token is not None else ""
        finish = event.finish
        if finish is not None:
            text += rows[event.row].finish()
            if rows[event.row].stopped:
                finish = "stop"
        if text or finish is not None:
            yield TextEvent(event.row, text, counts[event.row], finish)


def generate_text(
    model: Phi,
    prompts: Sequence[Sequence[int]],
    decode: Decode,
    *,
    max_new_tokens: int,
    stops: Sequence[str] | Sequence[Sequence[str]] = (),
    **settings: Unpack[Settings],
) -> list[Completion]:
    """Continue each prompt as text; arguments and errors are those of `stream_text`."""
    pieces: list[list[TextEvent]] = [[] for _ in prompts]
    for event in stream_text(
        model, prompts, decode, max_new_tokens=max_new_tokens, stops=stops, **settings
    ):
        pieces[event.row].append(event)
    completions = []
    for events in pieces:
        last = events[-1]
        assert last.finish is not None, "the last event of a row says why it ended"
        text = "".join(event.text for event in events)
        completions.append(Completion(text, last.num_tokens, last.finish))
    return completions


def _stops_of_rows(
    stops: Sequence[str] | Sequence[Sequence[str]], num_rows: int
) -> list[Sequence[str]]:
    """The stop texts of each row."""
    if isinstance(stops, str):
        raise ValueError("stops must be a sequence of texts, not one text")
    if all(isinstance(stop, str) for stop in stops):
        return [[str(stop) for stop in stops]] * num_rows
    if len(stops) != num_rows:
        raise ValueError(f"stop texts for {len(stops)} rows and {num_rows} prompts")
    return list(stops)
