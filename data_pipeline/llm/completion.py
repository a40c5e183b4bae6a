"""What is asked of a model, and what is made of its answer.

The server counts as hostile: its answer is parsed here rather than by the models of the `openai`
package, and checked before anything is made of it.
"""

import json
from dataclasses import dataclass
from typing import Any

from data_pipeline.llm.connection import CallError, quote
from data_pipeline.llm.ledger import Answer
from data_pipeline.llm.prices import Price
from data_pipeline.llm.secrets import Redactor
from data_pipeline.llm.transport import OPENAI_HOST, BaseUrl
from data_pipeline.records.record import Json, digest

TEMPLATE_TOKENS = 256  # allowed for what a server's chat template adds to a prompt


@dataclass(frozen=True)
class Bounds:
    """The most tokens that a request can take.

    Attributes:
        prompt: of the prompt.
        completion: of the answer.
    """

    prompt: int
    completion: int


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

    @property
    def bounds(self) -> Bounds:
        """The most tokens that it can take."""
        return Bounds(self.prompt_bound, self.max_tokens)

    def body(self, base: BaseUrl) -> dict[str, Json]:
        """The JSON body by which a server is asked for it."""
        # OpenAI's newer models refuse `max_tokens`; most other servers know nothing else.
        limit = "max_tokens" if base.host != OPENAI_HOST else "max_completion_tokens"
        messages = {"model": self.model, "messages": self.messages}
        return {**messages, **self.parameters, limit: self.max_tokens}


class AnswerReader:
    """Reads chat completions.

    Args:
        price: of the model.
        redact: keeps keys out of what the server sends back.
    """

    def __init__(self, price: Price, redact: Redactor) -> None:
        self.price = price
        self._redact = redact

    def parse(self, body: bytes, bounds: Bounds) -> Answer:
        """Read the body of a successful answer.

        Raises:
            CallError: it is not a chat completion; it may have been billed all the same.
        """
        try:
            return self.read(json.loads(body.decode("utf-8")), bounds)
        except (ValueError, RecursionError) as error:
            raise self._malformed(error) from None

    def read(self, completion: Json, bounds: Bounds) -> Answer:
        """The answer in a chat completion.

        Raises:
            CallError: it is none.
        """
        try:
            choice, message = _only_choice(completion)
        except ValueError as error:
            raise self._malformed(error) from None
        finish = choice.get("finish_reason")
        finish = finish if isinstance(finish, str) else ""
        content = message.get("content")
        prompt_tokens, completion_tokens = _usage(completion, bounds)
        problem = self._problem(content, finish, message)
        served = completion.get("model")
        return Answer(
            content=None if problem else content,
            finish_reason=quote(finish, self._redact) if finish else "",
            problem=problem,
            served_model=quote(served, self._redact) if isinstance(served, str) else "",
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            nano=self.price.nano_dollars(prompt_tokens, completion_tokens),
        )

    def _malformed(self, error: Exception) -> CallError:
        return CallError("malformed", quote(str(error), self._redact), billed=True)

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


def _usage(completion: dict[str, Any], bounds: Bounds) -> tuple[int, int]:
    """Prompt and completion tokens as the server says, or the bounds where that cannot be true."""
    usage = completion.get("usage")
    counts: list[int] = []
    for name, bound in (
        ("prompt_tokens", bounds.prompt),
        ("completion_tokens", bounds.completion),
    ):
        count = usage.get(name) if isinstance(usage, dict) else None
        # `type` and not `isinstance`: true and false are no counts.
        counts.append(count if type(count) is int and 0 <= count <= bound else bound)
    return counts[0], counts[1]
