"""Options of the stages that ask a language model: where it is, what it may cost, how to ask."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from data_pipeline.runner.options import Count, Seconds

MAX_REQUESTS = 50_000  # in one file of the Batch API; OpenAI's limit
Usd = Annotated[float, "USD"]


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """An OpenAI-compatible server."""

    model: Annotated[tuple[str, ...], "NAME"]
    """Model, as the server calls it; may be repeated where several are asked."""
    base_url: Annotated[tuple[str, ...], "URL"]
    """Address of the server, such as .../v1; one for all models, or one for each."""
    api_key_env: Annotated[str, "NAME"] | None = None
    """Environment variable with the API key (default: OPENAI_API_KEY for api.openai.com,
    MEGAPHI_API_KEY for any other server)."""
    api_key_file: Annotated[Path, "FILE"] | None = None
    """File of mode 0600 with the API key."""

    def __post_init__(self) -> None:
        if len(set(self.model)) < len(self.model) or not self.model:
            raise ValueError("`model`: each model is named once")
        if len(self.base_url) not in (1, len(self.model)):
            raise ValueError("`base_url`: give one for all models, or one for each, in their order")


@dataclass(frozen=True, kw_only=True)
class ParameterOptions:
    """For servers that refuse, rename or need a parameter of a request."""

    leave_out: Annotated[tuple[str, ...], "NAME"] = ()
    """Parameter that is not sent, such as temperature or seed; may be repeated."""
    rename: Annotated[tuple[str, ...], "OLD=NEW"] = ()
    """Other name of a parameter, such as max_tokens=max_completion_tokens; may be repeated."""
    set: Annotated[tuple[str, ...], "NAME=VALUE"] = ()
    """Parameter to add, such as reasoning_effort=low; the value is JSON or a word; may be
    repeated."""
    reasoning_tokens: Count = 0
    """Room for the model's thoughts, above that for the answer; they are never kept."""
    merge_system: bool = False
    """Put the system message in front of the user's, for models that take none."""


@dataclass(frozen=True, kw_only=True)
class Money:
    """What it may cost; prices are never built in."""

    price_in: Usd | None = None
    """Dollars per million prompt tokens."""
    price_out: Usd | None = None
    """Dollars per million completion tokens."""
    prices: Annotated[Path, "FILE"] | None = None
    """YAML: MODEL: {input: USD, output: USD, batch: FACTOR}; the factor is the Batch API's."""
    max_cost: Usd | None = None
    """Hard cap on all that the ledger records; a server that is not this machine needs one."""
    yes: bool = False
    """Spend without asking."""
    estimate: bool = False
    """Print what it can cost at most, and stop."""
    ledger: Annotated[Path, "FILE"] | None = None
    """Answers paid for (default: OUT.ledger.jsonl)."""
    abandon_batches: bool = False
    """Give up what the ledger's batches have under way, and count it as paid."""

    def __post_init__(self) -> None:
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("`price_in` and `price_out` belong together")
        if self.max_cost is not None and not 0 <= self.max_cost <= 1e9:
            raise ValueError(f"`max_cost` {self.max_cost}: must be a sum in dollars, 0 or more")


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """What to do when the server fails."""

    attempts: Count = 6
    """How often a request is sent."""
    max_wait: Seconds = 60.0
    """Longest wait before asking again, also where the server asks for more."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"`attempts` {self.attempts}: at least 1 is needed")
        if not 0 <= self.max_wait <= 3600:
            raise ValueError(f"`max_wait` {self.max_wait}: must be from 0 to 3600 seconds")


@dataclass(frozen=True, kw_only=True)
class Batching:
    """The Batch API: files of requests, answered within a day for less."""

    backend: Literal["live", "batch"] = "live"
    """live: requests one by one, answered at once; batch: the Batch API."""
    poll_interval: Seconds = 60.0
    """Seconds between two looks at a batch."""
    batches: Count = 4
    """Batches at a time."""
    batch_requests: Count = MAX_REQUESTS
    """Requests of a batch."""
    batch_rounds: Count = 4
    """Batches that a request may be put into."""
    batch_settle: Seconds = 60.0
    """Seconds after which a batch that was started is in the server's list."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("batch_requests", 1, MAX_REQUESTS),
            ("batches", 1, 1000),
            ("batch_rounds", 1, 100),
            ("poll_interval", 0.01, 3600),
            ("batch_settle", 0, 3600),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"`{name}` {value:g}: must be from {least:g} to {most:g}")

    @property
    def is_used(self) -> bool:
        """Whether requests go through the Batch API."""
        return self.backend == "batch"


@dataclass(frozen=True, kw_only=True)
class Sending:
    """How fast and how persistently to ask; nothing here changes an answer."""

    requests_per_minute: Annotated[float, "N"] | None = None
    """No more than this many requests per minute."""
    tokens_per_minute: Annotated[float, "N"] | None = None
    """No more than this many tokens per minute, prompt and completion together."""
    in_flight: Count = 16
    """Requests at a time."""
    deadline: Seconds = 300.0
    """Seconds that one answer may take."""
    retries: RetryPolicy = RetryPolicy()
    batch_api: Batching = Batching()

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"`{name}` {value}: must be above 0")
        if self.in_flight < 1:
            raise ValueError(f"`in_flight` {self.in_flight}: at least 1 is needed")
        if not 0 < self.deadline <= 86_400:
            raise ValueError(f"`deadline` {self.deadline}: must be from 0 to 86400 seconds")


@dataclass(frozen=True, kw_only=True)
class Asking:
    """All that says how a language model is asked."""

    server: ServerOptions
    parameters: ParameterOptions = ParameterOptions()
    money: Money = Money()
    sending: Sending = Sending()
