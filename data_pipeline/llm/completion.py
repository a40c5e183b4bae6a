"""What is asked of a model, and what is made of its answer.

The server counts as hostile: its answer is parsed here rather than by the models of the `openai`
package, and checked before anything is made of it.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.llm.connection import CallError, error_object, quote, reported_error
from data_pipeline.llm.ledger import Answer
from data_pipeline.llm.prices import Price
from data_pipeline.llm.secrets import Redactor
from data_pipeline.llm.transport import OPENAI_HOST, BaseUrl
from data_pipeline.records.record import Json, digest

TEMPLATE_TOKENS = 256  # allowed for what a server's chat template adds to a prompt
MOST_TOKENS = 10**9  # a count above it is none


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
        max_tokens: most tokens that the completion may have, thoughts included.
        names: what the server calls a parameter, where that differs.
    """

    model: str
    messages: list[dict[str, str]]
    parameters: dict[str, Json]
    max_tokens: int
    names: dict[str, str] = field(default_factory=dict)

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
        names = {"max_tokens": limit, **self.names}
        fields = {**self.parameters, "max_tokens": self.max_tokens}
        named = {names.get(name, name): value for name, value in fields.items()}
        return {"model": self.model, "messages": self.messages, **named}

    def is_cut_off(self, answer: Answer) -> bool:
        """Whether an answer ends where its tokens ran out, whatever its finish reason says."""
        reason = answer.finish_reason.lower()
        if "length" in reason or "max" in reason or reason in ("incomplete", "error"):
            return True
        # Both at their bounds: the server did not count, see `_usage`.
        counted = answer.prompt_tokens != self.prompt_bound
        return counted and answer.completion_tokens >= self.max_tokens


class AnswerReader:
    """Reads chat completions.

    Args:
        price: of the model.
        redact: keeps keys out of what the server sends back.
    """

    def __init__(self, price: Price, redact: Redactor) -> None:
        self.price = price
        self.redact = redact

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
            CallError: it is none, or an error that came as an answer.
        """
        try:
            error = error_object(completion) or _error_of_choice(completion)
            if error is not None:
                raise reported_error(error, 200, self.redact)
            choice, message = _only_choice(completion)
        except ValueError as error:
            raise self._malformed(error) from None
        finish = choice.get("finish_reason")
        finish = finish if isinstance(finish, str) else ""
        content = _text_of(message)
        prompt_tokens, completion_tokens = _usage(completion, bounds)
        problem = self._problem(content, finish, message)
        served = completion.get("model")
        return Answer(
            content=None if problem else content,
            finish_reason=quote(finish, self.redact) if finish else "",
            problem=problem,
            served_model=quote(served, self.redact) if isinstance(served, str) else "",
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            nano=self.price.nano_dollars(prompt_tokens, completion_tokens),
        )

    def _malformed(self, error: Exception) -> CallError:
        return CallError("malformed", quote(str(error), self.redact), billed=True)

    def _problem(self, content: Json, finish: str, message: dict[str, Json]) -> str | None:
        """Why a content cannot be used; None when it can."""
        if finish.lower() in _REFUSALS or message.get("refusal"):
            return "refused"
        if not isinstance(content, str) or not content.strip():
            return "no_content"
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            return "surrogate"
        if "\0" in content:
            return "nul"
        return "key_echo" if self.redact.finds(content) else None


_REFUSALS = ("content_filter", "safety", "recitation", "prohibited_content", "blocklist", "refusal")


def _error_of_choice(completion: Json) -> dict[str, Any] | None:
    """The error in the first choice, where some routers put it."""
    choices = completion.get("choices") if isinstance(completion, dict) else None
    return error_object(choices[0]) if isinstance(choices, list) and choices else None


def _text_of(message: dict[str, Any]) -> Json:
    """The content of a message: a string, else whatever it is.

    Of a list of parts those of the type `text` are joined; thoughts are parts of other types. What
    repeats the thoughts that the server gives in a field of their own is no content.
    """
    content = message.get("content")
    if isinstance(content, list) and content and all(isinstance(p, dict) for p in content):
        texts = [part.get("text") for part in content if part.get("type") == "text"]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    for name in ("reasoning_content", "reasoning"):
        thoughts = message.get(name)
        if isinstance(content, str) and isinstance(thoughts, str) and thoughts.strip():
            content = content.lstrip().removeprefix(thoughts.strip())
    return content


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
    """Prompt and completion tokens as the server says, also above the bounds: so they are billed.

    Some servers count thoughts in `total_tokens` alone, others not in `completion_tokens` but apart
    from them. A server that does not count its completions gets the bounds of both.
    """
    usage = completion.get("usage")
    if not isinstance(usage, dict):
        return bounds.prompt, bounds.completion
    prompt = _count(usage, "prompt_tokens")
    written, total = _count(usage, "completion_tokens"), _count(usage, "total_tokens")
    if written is None:
        return max(prompt or 0, bounds.prompt), bounds.completion
    if prompt is None:
        prompt = bounds.prompt
    details = usage.get("completion_tokens_details")
    thoughts = _count(details, "reasoning_tokens") or 0 if isinstance(details, dict) else 0
    if thoughts > written:
        written += thoughts
    return prompt, max(written, (total or 0) - prompt)


def _count(usage: dict[str, Any], name: str) -> int | None:
    """A count of tokens; None where there is none that can be true."""
    count = usage.get(name)
    # `type` and not `isinstance`: true and false are no counts.
    if type(count) is float and count.is_integer():
        count = int(count)
    return count if type(count) is int and 0 <= count <= MOST_TOKENS else None
