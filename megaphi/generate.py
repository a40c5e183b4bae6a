"""Text generation with a preallocated key/value cache.

The prompts of a batch are padded on the left so that all rows end together; padding is masked as a
key and does not count as a position, so a row's result is what it would be alone. The prompt runs
through the model once, every further token costs one pass over one position.

Suffixes: b batch, t prompt positions, v vocabulary.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megaphi.config import Model
from megaphi.model.phi import BlockCache, Phi


@torch.no_grad()  # not inference_mode: the rotary tables it would cache could not be trained with
def generate(
    model: Phi,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    eos_id: int | None = None,
    stop: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        model: the model, in evaluation mode.
        prompts: token ids of each row, at least one.
        max_new_tokens: most tokens that a row may get.
        temperature: 0 takes the most probable token, otherwise logits are divided by it.
        top_p: sample from the smallest set of tokens with at least this probability in all.
        seed: of the samples. Row i draws from a stream of its own that depends on (seed, i) only;
            a sequence gives each row its own seed instead, so that a row's samples do not depend
            on its place in the batch either.
        eos_id: token that ends a row; it is not part of the result.
        stop: called with the row and its tokens so far after each token; True ends the row.

    Returns:
        The new tokens of each row.

    Raises:
        ValueError: a prompt is empty, holds an id outside the vocabulary or leaves no room for
            `max_new_tokens` in the model's context; or a setting is out of range.
    """
    config = model.config
    _check(config, prompts, max_new_tokens, temperature, top_p)
    if not prompts or max_new_tokens == 0:
        return [[] for _ in prompts]
    device = _embedding(model).device
    sampler = _Sampler(temperature, top_p, _row_seeds(seed, len(prompts)))
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    padding_b = torch.tensor([longest - length for length in lengths], device=device)
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    tokens_bt = torch.tensor(rows, device=device)
    # padding stands at position 0; nobody sees it
    positions_bt = (torch.arange(longest, device=device) - padding_b[:, None]).clamp(min=0)
    caches = _new_caches(model, padding_b, longest + max_new_tokens - 1)

    results: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        logits_bv = _next_logits(model, tokens_bt, positions_bt, caches)
        next_b = sampler(logits_bv)
        for row, token in enumerate(next_b.tolist()):
            if row not in running:
                continue
            if token == eos_id:
                running.discard(row)
                continue
            results[row].append(token)
            if stop is not None and stop(row, results[row]):
                running.discard(row)
        if not running:
            break
        tokens_bt, positions_bt = next_b[:, None], positions_bt[:, -1:] + 1
    return results


def _check(
    config: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> None:
    """Raise a `ValueError` for a call that cannot be served."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, not {max_new_tokens}")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or above, not {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
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


def _row_seeds(seed: int | Sequence[int], num_rows: int) -> list[int]:
    """A 63-bit seed for each row."""
    if isinstance(seed, int):
        texts = [f"{seed}/{row}" for row in range(num_rows)]
    elif len(seed) == num_rows:
        texts = [str(value) for value in seed]
    else:
        raise ValueError(f"{len(seed)} seeds for {num_rows} prompts")
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    return [int.from_bytes(digest[:8], "little") >> 1 for digest in digests]


def _embedding(model: Phi) -> Tensor:
    """The token embedding, for its device and dtype."""
    assert model.embedding is not None, "this is a part of a model"
    return model.embedding.tokens.weight


def _new_caches(model: Phi, padding_b: Tensor, capacity: int) -> list[BlockCache]:
    """An empty cache a block, for `capacity` positions of which each row's first are padding."""
    config = model.config
    weight = _embedding(model)
    shape = (len(padding_b), config.num_heads, capacity, config.head_size)
    mask_bs = None
    if padding_b.any():
        mask_bs = torch.arange(capacity, device=weight.device) >= padding_b[:, None]
    return [
        BlockCache(weight.new_empty(shape), weight.new_empty(shape), 0, mask_bs)
        for _ in range(config.num_layers)
    ]


def _next_logits(
    model: Phi, tokens_bt: Tensor, positions_bt: Tensor, caches: list[BlockCache]
) -> Tensor:
    """Logits [b, v] after the last position; the head runs on no other."""
    normed_nd = model.hidden(tokens_bt, positions=positions_bt, caches=caches)
    assert model.head is not None
    logits_bv: Tensor = model.head(normed_nd.view(*tokens_bt.shape, -1)[:, -1])
    return logits_bv


class _Sampler:
    """Picks a token for each row; each row has a random stream of its own."""

    def __init__(self, temperature: float, top_p: float, seeds: list[int]) -> None:
        self.temperature = temperature
        self.top_p = top_p
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits_bv: Tensor) -> Tensor:
        """Return int64 [b]; one number is drawn from every row's stream, needed or not."""
        if self.temperature == 0.0:
            return logits_bv.argmax(dim=-1)
        probability_bv = (logits_bv.double() / self.temperature).softmax(dim=-1)
        sorted_bv, order_bv = probability_bv.sort(dim=-1, descending=True, stable=True)
        reached_bv = sorted_bv.cumsum(dim=-1)
        # a token stays while the more probable ones before it have not reached top_p
        kept_bv = reached_bv - sorted_bv < self.top_p
        total_b = (sorted_bv * kept_bv).sum(dim=-1, keepdim=True)
        uniform_b = torch.stack(
            [torch.rand(1, dtype=torch.float64, generator=g) for g in self.generators]
        ).to(logits_bv.device)
        place_b = torch.searchsorted(reached_bv, uniform_b * total_b, right=True)
        # rounding must not lead past the last token that is kept
        place_b = torch.minimum(place_b, kept_bv.sum(dim=-1, keepdim=True) - 1)
        return order_bv.gather(-1, place_b)[:, 0]
