"""The connection to an OpenAI-compatible server through the `openai` package.

Its transport is ours (`transport.py`); what HTTP says is turned into two kinds of errors: those of
one call, after which another may succeed, and those that end the run.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import openai

from data_pipeline.llm.secrets import Redactor, Secret
from data_pipeline.llm.transport import (
    MAX_BODY_BYTES,
    BaseUrl,
    GuardedTransport,
    UnfitAnswer,
)
from megaphi.errors import RunError

QUOTED = 200  # characters of a server's error message that are shown


class CallError(Exception):
    """A request was not answered.

    Attributes:
        reason: a short fixed word.
        billed: whether the server may have charged for it.
        retry: whether asking again may help.
        overloaded: whether the server asked for fewer requests.
        retry_after: seconds that the server asked to wait; None when it did not.
    """

    def __init__(
        self,
        reason: str,
        detail: str,
        *,
        billed: bool = False,
        retry: bool = True,
        overloaded: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.billed = billed
        self.retry = retry
        self.overloaded = overloaded
        self.retry_after = retry_after


def quote(text: str, redact: Redactor) -> str:
    """What a server said on one line, short and without keys."""
    clean = "".join(c if c.isprintable() else " " for c in redact(text))
    return " ".join(clean[: 4 * QUOTED].split())[:QUOTED] or "no message"


class Connection:
    """One server.

    Args:
        base: where it is.
        key: the API key.
        redact: keeps keys out of what the server sends back.
        deadline: seconds that one answer may take, from the first byte to the last.
        connections: how many to keep open.
        max_body: longest answer in bytes.
    """

    def __init__(
        self,
        base: BaseUrl,
        key: Secret | None,
        redact: Redactor,
        *,
        deadline: float = 300.0,
        connections: int = 16,
        max_body: int = MAX_BODY_BYTES,
    ) -> None:
        self.base = base
        self.deadline = deadline
        self._redact = redact
        self.openai = openai.AsyncOpenAI(
            api_key="held-by-the-transport",
            base_url=base.url,
            max_retries=0,
            timeout=deadline,
            http_client=httpx2.AsyncClient(
                transport=GuardedTransport(base, key, connections, max_body),
                trust_env=False,
                follow_redirects=False,
                timeout=deadline,
            ),
        )

    async def close(self) -> None:
        """Close what is open."""
        await self.openai.close()

    async def call(
        self, send: Callable[[openai.AsyncOpenAI], Awaitable[Any]], deadline: float | None = None
    ) -> bytes:
        """Make one call; returns the body of a successful answer.

        Args:
            send: makes the call on the client and returns its raw response.
            deadline: seconds instead of the usual ones.

        Raises:
            CallError: no answer; says whether to call again.
            RunError: no call can succeed: the key is refused, there is no such model, or the
                server redirects elsewhere.
        """
        seconds = deadline or self.deadline
        try:
            async with asyncio.timeout(seconds):
                raw = await send(self.openai)
                body: bytes = raw.http_response.content
        except TimeoutError:
            detail = f"no whole answer within {seconds:g} s"
            raise CallError("timeout", detail, billed=True) from None
        except (openai.OpenAIError, httpx2.HTTPError) as error:
            raise self.error(error) from None
        return body

    def error(self, error: openai.OpenAIError | httpx2.HTTPError) -> Exception:
        """What an exception of the client means."""
        if isinstance(error, openai.APIConnectionError):
            return _connection_error(error.__cause__ or error)
        if isinstance(error, openai.APIStatusError):
            return self.status_error(error.response)
        return _connection_error(error)  # while the body of an error was read

    def status_error(self, response: httpx2.Response) -> Exception:
        """What an HTTP status means."""
        status = response.status_code
        said = quote(response.text, self._redact)
        if status in (408, 409, 429) or status >= 500:
            return CallError(
                f"http_{status}",
                said,
                overloaded=status in (429, 503, 529),
                retry_after=parse_retry_after(response.headers.get("retry-after")),
            )
        where = self.base.url
        if 300 <= status < 400:
            return RunError(f"{where}: redirects (HTTP {status}), which is not followed")
        if status in (401, 403):
            return RunError(f"{where}: the API key is refused (HTTP {status}): {said}")
        if status in (402, 404, 405):
            return RunError(
                f"{where}: HTTP {status}: {said}; check --base-url (it mostly ends in /v1) and "
                "--model"
            )
        return CallError(f"http_{status}", said, retry=False)


def _connection_error(cause: BaseException) -> CallError:
    """What a failure below HTTP means."""
    kind = type(cause).__name__
    if isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout):
        return CallError("connection", f"cannot reach the server ({kind})")
    if isinstance(cause, UnfitAnswer):
        return CallError("malformed", str(cause), billed=True)
    # An AssertionError of the transport is our own fault and must not pass for the network's.
    assert isinstance(cause, httpx2.HTTPError | TimeoutError), kind
    return CallError("connection", f"the connection broke ({kind})", billed=True)


def parse_retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110 §10.2.3); None when it makes no sense."""
    if value is None or len(value) > 100:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value).timestamp()
        except (ValueError, TypeError, OverflowError):
            return None
        seconds = moment - time.time()
    return max(seconds, 0.0) if math.isfinite(seconds) else None
