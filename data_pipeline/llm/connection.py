"""The connection to an OpenAI-compatible server through the `openai` package.

Its transport is ours (`transport.py`); what HTTP says is turned into two kinds of errors: those of
one call, after which another may succeed, and those that end the run.
"""

import asyncio
import json
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
# Codes and types of errors that mean that the account can pay for nothing more. Words are no guide:
# some servers say "quota" of what passes within a minute.
_NO_MONEY = {
    *("insufficient_quota", "insufficient_balance", "insufficient_credits", "insufficient_funds"),
    *("billing_hard_limit_reached", "billing_not_active", "credits_exhausted", "quota_exhausted"),
}


class CallError(Exception):
    """A request was not answered.

    Attributes:
        reason: a short fixed word.
        detail: what the server answered, or what was seen.
        billed: whether the server may have charged for it.
        retry: whether asking again may help.
        overloaded: whether the server asked for fewer requests.
        retry_after: seconds that the server asked to wait; None when it did not.
        final: whether no other request can succeed either.
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
        final: bool = False,
    ) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.billed = billed
        self.retry = retry
        self.overloaded = overloaded
        self.retry_after = retry_after
        self.final = final


def quote(text: str, redact: Redactor) -> str:
    """What a server answered on one line, short and without keys."""
    clean = "".join(c if c.isprintable() else " " for c in redact(text))
    return " ".join(clean[: 4 * QUOTED].split())[:QUOTED] or "no message"


def error_object(body: Any) -> dict[str, Any] | None:
    """The error that a JSON body reports, with `message`, `code` and `type` as far as given.

    Returns:
        None where the body reports none.
    """
    if not isinstance(body, dict):
        return None
    error = body.get("error")
    if isinstance(error, dict) and error:
        return error
    if isinstance(error, str) and error:
        return {"message": error}
    # vLLM and FastAPI; not of a completion, which has choices.
    if body.get("object") == "error" or ("detail" in body and "choices" not in body):
        return {**body, "message": body.get("message") or json.dumps(body.get("detail"))}
    return None


def reported_error(
    error: dict[str, Any], status: int, redact: Redactor, retry_after: float | None = None
) -> CallError:
    """What an error object of a server means.

    Args:
        error: see `error_object`.
        status: HTTP status, or that of a batch's row; 200 where the error came as an answer.
        redact: keeps keys out of its words.
        retry_after: seconds that the server asked to wait.
    """
    names = {str(error.get(name)).lower() for name in ("code", "type") if error.get(name)}
    message = error.get("message")
    detail = quote(message if isinstance(message, str) else json.dumps(error), redact)
    code = error.get("code")
    if status == 200:  # then the code, if it is a number, is the status that was meant
        number = int(str(code)) if str(code).isdecimal() and len(str(code)) == 3 else 0
        status = number if 400 <= number < 600 else 200
    if names & _NO_MONEY or status == 402:
        return CallError("no_quota", detail, retry=False, final=True)
    reason = f"http_{status}" if status >= 300 else "error_object"
    return CallError(
        reason,
        detail,
        retry=(status in (200, 408, 409, 429) or status >= 500)
        and "invalid_request_error" not in names,
        overloaded=status in (429, 503, 529),
        retry_after=retry_after,
        final=300 <= status < 400 or status in (401, 403, 404, 405),
    )


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
        try:
            error = error_object(json.loads(response.text))
        except (ValueError, RecursionError):
            error = None
        wait = parse_retry_after(response.headers.get("retry-after"))
        found = reported_error(
            error or {"message": response.text}, status, self._redact, retry_after=wait
        )
        return self.run_error(found) if found.final else found

    def run_error(self, error: CallError) -> RunError:
        """What to tell the user of an error that no request can get past."""
        where, detail, reason = self.base.url, error.detail, error.reason
        if reason == "no_quota":
            return RunError(
                f"{where}: the account's quota or credit is used up: {detail}; the answers so far "
                "are kept, run again once there is more"
            )
        status = reason.removeprefix("http_")
        if status.startswith("3"):
            return RunError(f"{where}: redirects (HTTP {status}), which is not followed")
        if status in ("401", "403"):
            return RunError(f"{where}: the API key is refused (HTTP {status}): {detail}")
        return RunError(
            f"{where}: HTTP {status}: {detail}; check `base_url` (it mostly ends in /v1) and "
            "`model`"
        )


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
