"""The loop over tokens: run the model, pick a token for each row, see who has ended."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor

from megaphi.config import Model
from megaphi.device import is_gpu
from megaphi.generate.decoder import Decoder
from megaphi.generate.sampling import Sampler, row_seeds
from megaphi.model.phi import Phi

Finish = Literal["stop", "length"]
"""Why a row has ended: at its end of text or a stop, or at the most tokens it may get."""

# Tokens of each row between two looks at them: a look makes a GPU run dry, and what a row gets
# after its end is thrown away.
_BUNCH_ON_GPU = 16


class Settings(TypedDict, total=False):
    """What may be set alongside the model, the prompts and `max_new_tokens`."""

    temperature: float
    """0 (the default) takes the most probable token, otherwise logits are divided by it."""
    top_p: float
    """Sample from the smallest set of tokens with at least this probability in all; default 1."""
    seed: int | Sequence[int]
    """Of the samples, default 0. Row i draws from a stream of its own that depends on (seed, i)
    only; a sequence gives each row its own seed instead, so that a row's samples do not depend on
    its place in the batch either."""
    eos_id: int | None
    """Token that ends a row; it is not part of the result."""
    stop: Callable[[int, list[int]], bool] | None
    """Called with the row and its tokens so far for each token; True ends the row."""
    cuda_graphs: Literal["auto", "never"]
    """`auto` (the default) replays a CUDA graph for each token on a GPU."""
    bunch: int | None
    """Look at the tokens after every so many; default 1 on a CPU and 16 on a GPU."""


@dataclass(frozen=True)
class TokenEvent:
    """A new token of a row, or its end without one."""

    row: int
    token: int | None
    """None where the token that ends a text came."""
    finish: Finish | None
    """Set in the last event of the row."""


def generate(
    model: Phi,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    **settings: Unpack[Settings],
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        model: the model, in evaluation mode.
        prompts: token ids of each row, at least one.
        max_new_tokens: most tokens that a row may get.
        settings: see `Settings`.

    Returns:
        The new tokens of each row.

    Raises:
        ValueError: a prompt is empty, holds an id outside the vocabulary or leaves no room for
            `max_new_tokens` in the model's context; or a setting is out of range.
    """
    results: list[list[int]] = [[] for _ in prompts]
    for event in stream_tokens(model, prompts, max_new_tokens=max_new_tokens, **settings):
        if event.token is not None:
            results[event.row].append(event.token)
    return results


@torch.no_grad()  # not inference_mode: the rotary tables it would cache could not be trained with
def stream_tokens(
    model: Phi,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    **settings: Unpack[Settings],
) -> Iterator[TokenEvent]:
    """Continue each prompt and yield the tokens as they come, step by step, row by row.

    Arguments and errors are those of `generate`; errors come with the first step.
    """
    temperature, top_p = settings.get("temperature", 0.0), settings.get("top_p", 1.0)
    bunch, graphs = settings.get("bunch"), settings.get("cuda_graphs", "auto")
    _check(model.config, prompts, max_new_tokens, temperature, top_p, bunch, graphs)
    seeds = row_seeds(settings.get("seed", 0), len(prompts))
    if not prompts or max_new_tokens == 0:
        yield from (TokenEvent(row, None, "length") for row in range(len(prompts)))
        return
    assert model.embedding is not None, "this is a part of a model"
    device = model.embedding.tokens.weight.device
    on_gpu = is_gpu(device)
    capacity = max(map(len, prompts)) + max_new_tokens - 1
    decoder = Decoder(model, prompts, capacity, graphs=on_gpu and graphs == "auto")
    sampler = Sampler(temperature, top_p, seeds, max_new_tokens, device)
    rows = _Rows(len(prompts), max_new_tokens, settings.get("eos_id"), settings.get("stop"))
    tokens_b = torch.empty(0)
    bunch = bunch or (_BUNCH_ON_GPU if on_gpu else 1)
    for first in range(0, max_new_tokens, bunch):
        steps: list[Tensor] = []
        for step in range(first, min(first + bunch, max_new_tokens)):
            logits_bv = decoder.prompt() if step == 0 else decoder.step(tokens_b)
            tokens_b = sampler(logits_bv, step)
            steps.append(tokens_b)
        for tokens in torch.stack(steps).tolist():  # the one wait for the device
            yield from rows.take(tokens)
        if not rows.running:
            return
        kept = rows.compact()
        if kept is not None:
            index = torch.tensor(kept, device=device)
            decoder.keep(index)
            sampler.keep(index)
            tokens_b = tokens_b[index]


class _Rows:
    """Which rows still run, and their tokens so far."""

    def __init__(
        self,
        count: int,
        max_new_tokens: int,
        eos_id: int | None,
        stop: Callable[[int, list[int]], bool] | None,
    ) -> None:
        self.running = set(range(count))
        self._batch = list(range(count))  # the row at each place of the batch
        self._tokens: list[list[int]] = [[] for _ in range(count)]
        self._max_new_tokens = max_new_tokens
        self._eos_id = eos_id
        self._stop = stop

    def take(self, tokens: Sequence[int]) -> Iterator[TokenEvent]:
        """Events of the next token of each place; rows that have ended get none."""
        for row, token in zip(self._batch, tokens, strict=True):
            if row not in self.running:
                continue
            if token == self._eos_id:
                self.running.discard(row)
                yield TokenEvent(row, None, "stop")
                continue
            so_far = self._tokens[row]
            so_far.append(token)
            finish: Finish | None = None
            if self._stop is not None and self._stop(row, so_far):
                finish = "stop"
            elif len(so_far) == self._max_new_tokens:
                finish = "length"
            if finish is not None:
                self.running.discard(row)
            yield TokenEvent(row, token, finish)

    def compact(self) -> list[int] | None:
        """Once half of the batch has ended, the places to go on with; None before."""
        if 2 * len(self.running) > len(self._batch):
            return None
        kept = [place for place, row in enumerate(self._batch) if row in self.running]
        self._batch = [self._batch[place] for place in kept]
        return kept


def _check(
    config: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    bunch: int | None,
    graphs: str,
) -> None:
    """Raise a `ValueError` for a call that cannot be served."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, not {max_new_tokens}")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or above, not {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if bunch is not None and bunch < 1:
        raise ValueError(f"bunch must be above 0, not {bunch}")
    if graphs not in ("auto", "never"):
        raise ValueError(f"cuda_graphs must be auto or never, not {graphs}")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} has no token")
        if len(prompt) + max_new_tokens > config.max_sequence_length:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens; with {max_new_tokens} new ones that is "
                f"more than the model's {config.max_sequence_length}"
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {row} has an id outside the {config.vocab_size} of the model")
