"""Choosing the next token of each row: the most probable one, or a sample.

Suffixes: b batch, v vocabulary.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def row_seeds(seed: int | Sequence[int], num_rows: int) -> list[int]:
    """A 63-bit seed for each row.

    Raises:
        ValueError: there is a seed for each row, but not as many as rows.
    """
    if isinstance(seed, int):
        texts = [f"{seed}/{row}" for row in range(num_rows)]
    elif len(seed) == num_rows:
        texts = [str(value) for value in seed]
    else:
        raise ValueError(f"{len(seed)} seeds for {num_rows} prompts")
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    return [int.from_bytes(digest[:8], "little") >> 1 for digest in digests]


class Sampler:
    """Picks a token for each row; each row has a random stream of its own.

    Args:
        temperature: 0 takes the most probable token, otherwise logits are divided by it.
        top_p: sample from the smallest set of tokens with at least this probability in all.
        seeds: one for each row, see `row_seeds`.
        num_tokens: most tokens that a row may get; their random numbers are drawn at once, so that
            sampling on a GPU never waits for the host.
        device: where the logits are.
    """

    def __init__(
        self,
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
        num_tokens: int,
        device: torch.device,
    ) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._uniform_bt: Tensor | None = None
        if temperature > 0:
            streams = [torch.Generator().manual_seed(seed) for seed in seeds]
            numbers = [
                torch.rand(num_tokens, dtype=torch.float64, generator=stream) for stream in streams
            ]
            self._uniform_bt = torch.stack(numbers).to(device)

    def keep(self, index: Tensor) -> None:
        """Go on with some rows of the batch only."""
        if self._uniform_bt is not None:
            self._uniform_bt = self._uniform_bt[index]

    def __call__(self, logits_bv: Tensor, step: int) -> Tensor:
        """The tokens [b], int64, after `step` others; each takes number `step` of its stream."""
        if self._uniform_bt is None:
            return logits_bv.argmax(dim=-1)
        uniform_b = self._uniform_bt[:, step : step + 1]
        probability_bv = (logits_bv.double() / self._temperature).softmax(dim=-1)
        if self._top_p == 1.0:
            reached_bv = probability_bv.cumsum(dim=-1)
            place_b = torch.searchsorted(reached_bv, uniform_b * reached_bv[:, -1:], right=True)
            # rounding must not lead past the last token
            return place_b.clamp(max=logits_bv.shape[1] - 1)[:, 0]
        sorted_bv, order_bv = probability_bv.sort(dim=-1, descending=True, stable=True)
        reached_bv = sorted_bv.cumsum(dim=-1)
        # a token stays while the more probable ones before it have not reached top_p
        kept_bv = reached_bv - sorted_bv < self._top_p
        total_b = (sorted_bv * kept_bv).sum(dim=-1, keepdim=True)
        place_b = torch.searchsorted(reached_bv, uniform_b * total_b, right=True)
        place_b = torch.minimum(place_b, kept_bv.sum(dim=-1, keepdim=True) - 1)
        return order_bv.gather(-1, place_b)[:, 0]
