"""Fits requests to servers that refuse, rename or need a parameter.

OpenAI's reasoning models take no temperature and call the limit `max_completion_tokens`, others
refuse a seed or a system message, or want a budget of thoughts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from data_pipeline.llm.completion import Request
from data_pipeline.llm.options import ParameterOptions
from data_pipeline.records.record import Json

LIMIT = "max_tokens"
# They say how an answer is read or bounded.
_OURS = ("model", "messages", "n", "best_of", "stream", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True, kw_only=True)
class Adjustments:
    """What to change in every request.

    Attributes:
        leave_out: parameters that are not sent.
        rename: new name by parameter.
        add: value by parameter, in place of one of ours that has its name.
        reasoning_tokens: room for thoughts, above that for the answer.
        merge_system: put the system message in front of the user's.
    """

    leave_out: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    add: Mapping[str, Json] = field(default_factory=dict)
    reasoning_tokens: int = 0
    merge_system: bool = False

    def __post_init__(self) -> None:
        if self.reasoning_tokens < 0:
            raise ValueError(f"`reasoning_tokens` {self.reasoning_tokens}: must be 0 or more")
        if LIMIT in self.leave_out:
            raise ValueError(
                f"`leave_out` {LIMIT}: nothing else bounds what an answer costs; `rename` gives "
                "it another name"
            )
        for name in self.add:
            if name in _OURS:
                raise ValueError(f"`set` {name}: is set by megaphi, from options of its own")
            if name in self.leave_out:
                raise ValueError(f"`set` {name}: is also in `leave_out`")
        for name in self.rename.values():
            if name in _OURS and name != "max_completion_tokens":
                raise ValueError(f"`rename`: {name} means something else")

    def apply(self, request: Request) -> Request:
        """The request as the server takes it.

        Raises:
            ValueError: a parameter to leave out or rename is not in it, or two get one name.
        """
        sent = {**request.parameters, **self.add}
        for option, names in (("leave_out", self.leave_out), ("rename", self.rename)):
            for name in names:
                if name not in sent and not (option == "rename" and name == LIMIT):
                    known = ", ".join([*sent, LIMIT])
                    raise ValueError(f"`{option}` {name}: not sent; the parameters are {known}")
        sent = {name: value for name, value in sent.items() if name not in self.leave_out}
        final = [self.rename.get(name, name) for name in [*sent, LIMIT]]
        if len(set(final)) < len(final):
            raise ValueError(f"`rename`: two parameters get one name, of {', '.join(final)}")
        messages = request.messages
        if self.merge_system and messages[0]["role"] == "system":
            text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            messages = [{"role": "user", "content": text}, *messages[2:]]
        return replace(
            request,
            messages=messages,
            parameters=sent,
            max_tokens=request.max_tokens + self.reasoning_tokens,
            names=dict(self.rename),
        )

    def config(self) -> dict[str, Json]:
        """What differs from the default; names alone change no answer."""
        fields = {k: v for k, v in vars(self).items() if v and k != "rename"}
        return {"adjustments": fields} if fields else {}


def read_adjustments(
    options: ParameterOptions,
) -> Adjustments:
    """Adjustments as they are typed: `OLD=NEW` and `NAME=VALUE`, whose value is JSON or a word.

    Raises:
        ValueError: one cannot be used.
    """
    return Adjustments(
        leave_out=options.leave_out,
        rename=_pairs("rename", options.rename),
        add={name: _value(text) for name, text in _pairs("set", options.set).items()},
        reasoning_tokens=options.reasoning_tokens,
        merge_system=options.merge_system,
    )


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not (name.isidentifier() and sign and value):
            raise ValueError(f"`{option}` {text}: expected NAME=VALUE")
        if name in pairs:
            raise ValueError(f"`{option}` {name}: given twice")
        pairs[name] = value
    return pairs


def _value(text: str) -> Json:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text


def _refuse(word: str) -> None:
    """JSON has no NaN and no infinity."""
    raise ValueError(word)
