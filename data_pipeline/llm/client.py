"""One request to an OpenAI-compatible server through the `openai` package, and what came of it.

The server counts as hostile: its answer is bounded in bytes and time, parsed here rather than by
the client's models, and checked before anything is made of it.
"""

import asyncio
import json
import math
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import openai

from data_pipeline.llm.ledger import Answer
from data_pipeline.llm.prices import Price
from data_pipeline.llm.secrets import Redactor, Secret
from data_pipeline.llm.transport import (
    MAX_BODY_BYTES,
    OPENAI_HOST,
    BaseUrl,
    GuardedTransport,
    UnfitAnswer,
)
from data_pipeline.records import Json, digest
from megaphi.errors import RunError

TEMPLATE_TOKENS = 256  # allowed for what a server's chat template adds to a prompt
QUOTED = 200  # characters of a server's error message that are shown


@dataclass(frozen=True, kw_only=True)
class Request:
    """A chat completion to ask for.

    Attributes:
        model: name of the model.
        messages: the prompt.
        parameters: everything else that goes into the body (`temperature`, `seed`, …).
        max_tokens: most tokens that the completion may have.
    """

    model: str
    messages: list[dict[str, str]]
    parameters: dict[str, Json]
    max_tokens: int

    @property
    def key(self) -> str:
        """SHA-256 of model, prompt and parameters."""
        return digest([self.model, self.messages, self.parameters, self.max_tokens])

    @property
    def prompt_bound(self) -> int:
        """Most tokens that the prompt can have: no token is shorter than a byte."""
        size = sum(len(message["content"].encode("utf-8")) for message in self.messages)
        return size + TEMPLATE_TOKENS


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


class Client:
    """Asks one server; used as an asynchronous context manager.

    Args:
        base: where it is.
        key: the API key.
        price: of its model.
        redact: keeps keys out of what the server sends back.
        deadline: seconds that one answer may take, from the first byte to the last.
        connections: how many to keep open.
        max_body: longest answer in bytes.
    """

    def __init__(
        self,
        base: BaseUrl,
        key: Secret | None,
        price: Price,
        redact: Redactor,
        *,
        deadline: float = 300.0,
        connections: int = 16,
        max_body: int = MAX_BODY_BYTES,
    ) -> None:
        self.base = base
        self.price = price
        self._redact = redact
        self._deadline = deadline
        # OpenAI's newer models refuse `max_tokens`; most other servers know nothing else.
        self._limit_name = "max_tokens" if base.host != OPENAI_HOST else "max_completion_tokens"
        self._openai = openai.AsyncOpenAI(
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

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._openai.close()

    def most(self, request: Request) -> int:
        """The most that a request can cost, in 1e-9 dollars."""
        return self.price.nano_dollars(request.prompt_bound, request.max_tokens)

    async def ask(self, request: Request) -> Answer:
        """Ask once.

        Raises:
            CallError: no usable answer; says whether to ask again.
            RunError: no request can succeed: the key is refused, there is no such model, or the
                server redirects elsewhere.
        """
        try:
            async with asyncio.timeout(self._deadline):
                raw = await self._openai.chat.completions.with_raw_response.create(
                    model=request.model,
                    messages=request.messages,  # type: ignore[arg-type]
                    extra_body={**request.parameters, self._limit_name: request.max_tokens},
                    # Servers that know the header charge a repeated request once.
                    extra_headers={"Idempotency-Key": request.key},
                )
                body = raw.http_response.content
        except TimeoutError:
            detail = f"no whole answer within {self._deadline:g} s"
            raise CallError("timeout", detail, billed=True) from None
        except openai.APIConnectionError as error:
            raise _connection_error(error.__cause__ or error) from None
        except openai.APIStatusError as error:
            raise self._status_error(error.response) from None
        except httpx2.HTTPError as error:  # while the body of an error was read
            raise _connection_error(error) from None
        return self._parse(body, request)

    def _status_error(self, response: httpx2.Response) -> Exception:
        """What an HTTP status means."""
        status = response.status_code
        said = self._quote(response.text)
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

    def _quote(self, text: str) -> str:
        """The server's message on one line, short and without keys."""
        clean = "".join(c if c.isprintable() else " " for c in self._redact(text))
        return " ".join(clean[: 4 * QUOTED].split())[:QUOTED] or "no message"

    def _parse(self, body: bytes, request: Request) -> Answer:
        """Read the body of a successful answer.

        Raises:
            CallError: it is not a chat completion; it may have been billed all the same.
        """
        try:
            completion = json.loads(body.decode("utf-8"))
            choice, message = _only_choice(completion)
        except (ValueError, RecursionError) as error:
            detail = self._quote(str(error))
            raise CallError("malformed", detail, billed=True) from None
        finish = choice.get("finish_reason")
        finish = finish if isinstance(finish, str) else ""
        content = message.get("content")
        prompt_tokens, completion_tokens = _usage(completion, request)
        problem = self._problem(content, finish, message)
        served = completion.get("model")
        return Answer(
            content=None if problem else content,
            finish_reason=self._quote(finish) if finish else "",
            problem=problem,
            served_model=self._quote(served) if isinstance(served, str) else "",
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            nano=self.price.nano_dollars(prompt_tokens, completion_tokens),
        )

    def _problem(self, content: Json, finish: str, message: dict[str, Json]) -> str | None:
        """Why a content cannot be used; None when it can."""
        if finish == "content_filter" or message.get("refusal"):
            return "refused"
        if not isinstance(content, str) or not content.strip():
            return "no_content"
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            return "surrogate"
        if "\0" in content:
            return "nul"
        return "key_echo" if self._redact.finds(content) else None


def _only_choice(completion: Json) -> tuple[dict[str, Any], dict[str, Any]]:
    """The choice of a completion and its message.

    Raises:
        ValueError: there is not exactly one.
    """
    choices = completion.get("choices") if isinstance(completion, dict) else None
    if not isinstance(choices, list) or len(choices) != 1:
        count = len(choices) if isinstance(choices, list) else "no"
        raise ValueError(f"{count} choices where one was asked for")
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise ValueError("a choice without a message")
    return choice, message


def _usage(completion: dict[str, Any], request: Request) -> tuple[int, int]:
    """Prompt and completion tokens as the server says, or the bounds where that cannot be true."""
    usage = completion.get("usage")
    counts: list[int] = []
    for name, bound in (
        ("prompt_tokens", request.prompt_bound),
        ("completion_tokens", request.max_tokens),
    ):
        count = usage.get(name) if isinstance(usage, dict) else None
        # `type` and not `isinstance`: true and false are no counts.
        counts.append(count if type(count) is int and 0 <= count <= bound else bound)
    return counts[0], counts[1]


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
