"""Keys and values of the tokens so far, kept while a text is generated.

All shapes are fixed when the caches are made, and where the next token goes is a tensor on the
device: a pass over one token is the same kernels on the same addresses every time, which is what a
CUDA graph needs.

Suffixes: b batch, h heads, t tokens of a pass, s places of the cache, k elements of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class CachePlace:
    """Where a batch stands; one for the caches of all blocks."""

    next_1: Tensor
    """int64 [1]: the place of the next token, the same in every row."""
    visible_bs: Tensor | None
    """bool: the places that hold a token; None where the window holds nothing but tokens."""
    padded: bool
    """Whether a row begins with padding."""
    window: int = 0
    """Places that a single token looks at, its own included; 0 until the prompts have run."""

    def rows(self, index: Tensor) -> "CachePlace":
        """The same for some rows of the batch only."""
        visible_bs = None if self.visible_bs is None else self.visible_bs[index]
        return CachePlace(self.next_1, visible_bs, self.padded, self.window)


@dataclass
class BlockCache:
    """The cache of one block; `key_bhsk` and `value_bhsk` have room for the longest text."""

    key_bhsk: Tensor
    value_bhsk: Tensor
    place: CachePlace

    def extend(self, key_bhtk: Tensor, value_bhtk: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the keys and values of a pass.

        The first pass is that of the prompts, padded on the left; every other is over one token.

        Returns:
            The keys and values to look at, and which of them hold a token [b, s] (None: all do).
        """
        visible_bs = self.place.visible_bs
        if self.place.window == 0:
            num_tokens = key_bhtk.shape[2]
            self.key_bhsk[:, :, :num_tokens] = key_bhtk
            self.value_bhsk[:, :, :num_tokens] = value_bhtk
            # whole rows take a causal kernel, which needs no mask
            if visible_bs is None or not self.place.padded:
                return key_bhtk, value_bhtk, None
            return key_bhtk, value_bhtk, visible_bs[:, :num_tokens]
        assert key_bhtk.shape[2] == 1, "after the prompts, one token at a time"
        self.key_bhsk.index_copy_(2, self.place.next_1, key_bhtk)
        self.value_bhsk.index_copy_(2, self.place.next_1, value_bhtk)
        window = slice(self.place.window)
        keys, values = self.key_bhsk[:, :, window], self.value_bhsk[:, :, window]
        return keys, values, None if visible_bs is None else visible_bs[:, window]

    def rows(self, index: Tensor, place: CachePlace) -> "BlockCache":
        """The same for some rows of the batch only, which stand at `place`."""
        return BlockCache(self.key_bhsk[index], self.value_bhsk[index], place)


def new_caches(
    num_layers: int, shape: tuple[int, int, int, int], like: Tensor, place: CachePlace
) -> list[BlockCache]:
    """An empty cache for each block.

    Args:
        num_layers: blocks.
        shape: rows, heads, places, elements of a head.
        like: a tensor of the caches' device and dtype.
        place: where the batch stands.
    """
    # zeros: places that are not visible yet are multiplied by 0, and what was there might be NaN
    return [
        BlockCache(
            torch.zeros(shape, dtype=like.dtype, device=like.device),
            torch.zeros(shape, dtype=like.dtype, device=like.device),
            place,
        )
        for _ in range(num_layers)
    ]
