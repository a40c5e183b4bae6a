"""A batch in a model: the prompts at once, then a token for each row at a time.

On a GPU a pass over one token is hundreds of kernels of a few microseconds each, and starting them
from Python takes longer than running them: the pass is recorded as a CUDA graph and replayed. The
graph reads and writes fixed addresses (`megaphi.model.cache`) and looks at a fixed number of
places, so that number grows in steps: one graph serves `GRAPH_WINDOW` tokens.

Suffixes: b batch, t prompt positions, s places of the cache, v vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megaphi.model.cache import CachePlace, new_caches
from megaphi.model.phi import Phi

# Recording takes about as long as ten eager tokens, and a window of this size that is half empty
# costs less than a tenth of reading phi-1's weights.
GRAPH_WINDOW = 256


class Decoder:
    """The rows of a batch in a model with caches.

    Args:
        model: the model, in evaluation mode.
        prompts: token ids of each row, at least one row and one token each.
        capacity: tokens that the longest row may have.
        graphs: record and replay CUDA graphs; the model must be on a CUDA device.
        window_step: places that are looked at are a multiple of this. Not given: `GRAPH_WINDOW`
            with graphs, else 1, which wastes nothing.
    """

    def __init__(
        self,
        model: Phi,
        prompts: Sequence[Sequence[int]],
        capacity: int,
        *,
        graphs: bool = False,
        window_step: int | None = None,
    ) -> None:
        assert model.embedding is not None, "this is a part of a model"
        config, weight = model.config, model.embedding.tokens.weight
        self._model = model
        self._device = weight.device
        self._graphs = graphs
        self._window_step = window_step or (GRAPH_WINDOW if graphs else 1)
        self._capacity = capacity
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits_bv = torch.empty(0)

        lengths = [len(prompt) for prompt in prompts]
        self._length = max(lengths)
        padding = [self._length - length for length in lengths]
        rows = [[0] * count + list(prompt) for count, prompt in zip(padding, prompts, strict=True)]
        self._prompts_bt = torch.tensor(rows, device=self._device)
        self._tokens_b1 = self._prompts_bt[:, -1:].clone()
        self._positions_b1 = torch.tensor(lengths, device=self._device)[:, None]
        visible_bs = None
        if any(padding) or self._window_step > 1:
            places = torch.arange(capacity, device=self._device)
            first_b1 = torch.tensor(padding, device=self._device)[:, None]
            visible_bs = (places >= first_b1) & (places < self._length)
        next_1 = torch.tensor([self._length], device=self._device)
        self._place = CachePlace(next_1, visible_bs, padded=any(padding))
        shape = (len(prompts), config.num_heads, capacity, config.head_size)
        self._caches = new_caches(config.num_layers, shape, weight, self._place)

    def prompt(self) -> Tensor:
        """Run the prompts; the logits [b, v] after their last tokens."""
        time = self._prompts_bt.shape[1]
        # padding stands at position 0; nobody sees it
        before_b1 = self._positions_b1 - time
        positions_bt = (torch.arange(time, device=self._device) + before_b1).clamp(min=0)
        return self._logits(self._prompts_bt, positions_bt)

    def step(self, tokens_b: Tensor) -> Tensor:
        """Append a token to each row; the logits [b, v] after it, good until the next call."""
        assert self._length < self._capacity, "the cache is full"
        self._tokens_b1.copy_(tokens_b[:, None])
        self._length += 1
        steps = -(-self._length // self._window_step)
        window = min(self._capacity, steps * self._window_step)
        if not self._graphs:
            self._place.window = window
            return self._one_token()
        if window != self._place.window:
            # the first pass of a shape is not recorded: it compiles kernels and fills work spaces
            self._place.window, self._graph = window, None
            return self._one_token()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self._device), torch.cuda.graph(self._graph):
                self._logits_bv = self._one_token()
        self._graph.replay()
        return self._logits_bv

    def keep(self, index: Tensor) -> None:
        """Go on with some rows only, and in this order."""
        self._tokens_b1 = self._tokens_b1[index]
        self._positions_b1 = self._positions_b1[index]
        self._place = self._place.rows(index)
        self._caches = [cache.rows(index, self._place) for cache in self._caches]
        if self._graphs:
            self._graph, self._place.window = None, -1  # another shape: recorded anew

    def _one_token(self) -> Tensor:
        """A pass over one token of each row, on fixed addresses."""
        if self._place.visible_bs is not None:
            self._place.visible_bs.index_fill_(1, self._place.next_1, True)
        logits_bv = self._logits(self._tokens_b1, self._positions_b1)
        self._place.next_1 += 1
        self._positions_b1 += 1
        return logits_bv

    def _logits(self, tokens_bt: Tensor, positions_bt: Tensor) -> Tensor:
        """Logits [b, v] after the last position; the head runs on no other."""
        logits_bv: Tensor = self._model(
            tokens_bt, positions=positions_bt, caches=self._caches, last_only=True
        )
        return logits_bv
