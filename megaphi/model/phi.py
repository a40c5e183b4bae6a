"""phi-1's decoder ("Textbooks Are All You Need", arXiv 2306.11644, section 2.3).

Each block runs attention and MLP side by side from one LayerNorm and adds both to the residual
stream once (as in CodeGen and GPT-J):

    r_0 = embedding(tokens);            y_0 = LayerNorm_0(r_0)
    r_{i+1} = r_i + dropout(attention_i(y_i)) + dropout(mlp_i(y_i))
    y_{i+1} = LayerNorm_{i+1}(r_{i+1})
    logits = head(y_L)

A block therefore *ends* with the LayerNorm that the next one reads, so that its biases, dropout,
residual add and that LayerNorm are one kernel; the last block's is the final LayerNorm. In Hugging
Face's names `embedding.norm` is layer 0's `input_layernorm`, `blocks.i.norm` is layer i + 1's, and
the last is `final_layernorm`.

Between the operations everything is rows: the flattened [b, t] tokens. Under tensor parallelism a
process holds a part of the rows between blocks, and all rows but a part of the heads and of the
MLP inside of one; under context parallelism it holds a part of every sequence.

Suffixes: b batch, t time, n rows (b x t, or this process's part of them), d hidden width, h heads,
c the parts q, k, v, k elements of a head, m = h c k, f inner width of the MLP, v vocabulary.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import ops
from kernels.ops import DropoutSeed
from megaphi.config import Model
from megaphi.data.documents import Documents
from megaphi.model.attention import HeadPart, attention, attention_of_one
from megaphi.model.attention_backends import Backend
from megaphi.model.cache import BlockCache
from megaphi.model.column_pair import column_pair
from megaphi.model.linear import MakeLinear, make_linear
from megaphi.model.rotary import rotary_tables
from megaphi.parallel.axes import Axes
from megaphi.parallel.context import attention_over_context
from megaphi.parallel.tensor import embed, local
from megaphi.parallel.tensor import linear_cross_entropy as vocabulary_parallel_cross_entropy

Recompute = Literal["none", "selective", "full"]
"""What the backward pass computes again: nothing, GELU, or whole blocks."""


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """Run `function` so that its backward pass computes again what it would have kept.

    Random numbers need no care: dropout is a function of the place in the run.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class Batch:
    """What a block needs to know of the rows beside their values."""

    size: int
    """Sequences."""
    time: int
    """Tokens of a sequence on this process."""
    rotary: tuple[Tensor, Tensor]
    """Cosines and sines of the tokens' positions."""
    dropout: DropoutSeed | None
    """Place in the run's random numbers; None means no dropout."""
    documents: Documents | None
    """Documents that a token may not see out of."""


class Embedding(nn.Module):
    """Token embedding and the first LayerNorm."""

    def __init__(self, config: Model, axes: Axes) -> None:
        super().__init__()
        self.axes = axes
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, tokens_n: Tensor) -> tuple[Tensor, Tensor]:
        """Return LayerNorm_0(r_0) and r_0, both [n, d]."""
        residual_nd = embed(tokens_n, local(self.tokens.weight), self.axes.tensor)
        norm = self.norm
        normed_nd = ops.layer_norm(residual_nd, local(norm.weight), local(norm.bias), norm.eps)
        return normed_nd, residual_nd


class Block(nn.Module):
    """Attention and MLP in parallel, then biases, dropout, residual add and the next LayerNorm.

    The rows of `qkv` are grouped by head ([heads, 3, head size]), so that cutting them into equal
    parts cuts between heads at any tensor-parallel size.
    """

    def __init__(
        self,
        config: Model,
        index: int,
        make: MakeLinear = make_linear,
        attention_backend: Backend = "sdpa",
        axes: Axes | None = None,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.attention_backend: Backend = attention_backend
        self.axes = axes or Axes()
        self.recompute = recompute
        self.qkv = make("qkv", config.hidden_size, 3 * config.hidden_size)
        self.out = make("out", config.hidden_size, config.hidden_size)
        self.fc1 = make("fc1", config.hidden_size, config.ffn_size)
        self.fc2 = make("fc2", config.ffn_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(
        self,
        normed_nd: Tensor,
        residual_nd: Tensor,
        batch: Batch,
        cache: BlockCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return LayerNorm_{i+1}(r_{i+1}) and r_{i+1}, both [n, d]."""
        if self.recompute == "full" and torch.is_grad_enabled():
            outputs: tuple[Tensor, Tensor] = recomputed(
                self.compute, normed_nd, residual_nd, batch, cache
            )
            return outputs
        return self.compute(normed_nd, residual_nd, batch, cache)

    def compute(
        self, normed_nd: Tensor, residual_nd: Tensor, batch: Batch, cache: BlockCache | None
    ) -> tuple[Tensor, Tensor]:
        """The block itself."""
        tensor = self.axes.tensor
        if tensor.overlaps:
            keep_rows = self.recompute == "full"
            packed_nm, inner_nf = column_pair(
                normed_nd, self.qkv, self.fc1, tensor, keep_rows=keep_rows
            )
            attention_nd = self.out.product(self.attend(packed_nm, batch, cache))
        else:
            # fc1 after the attention: in the backward pass its large gradient is gone before that
            rows_nd = tensor.gather(normed_nd)
            attention_nd = self.out.product(self.attend(self.qkv(rows_nd), batch, cache))
            inner_nf = self.fc1.product(rows_nd)
        if self.recompute == "selective" and torch.is_grad_enabled():
            mlp_nd = recomputed(self.second_half, inner_nf)
        else:
            mlp_nd = self.second_half(inner_nf)
        return self.add(attention_nd, mlp_nd, residual_nd, batch.dropout)

    def second_half(self, inner_nf: Tensor) -> Tensor:
        """The MLP from its inner width on, [n, d]."""
        return self.fc2.product(ops.bias_gelu(inner_nf, local(self.fc1.bias)))

    def add(
        self,
        attention_nd: Tensor,
        mlp_nd: Tensor,
        residual_nd: Tensor,
        dropout: DropoutSeed | None,
    ) -> tuple[Tensor, Tensor]:
        """Add both branches to the residual stream, and normalize it for the next block.

        Dropout is linear: under tensor parallelism each process masks its addend of the branches,
        before the one reduction that adds them up and cuts them into rows.
        """
        tensor, norm, probability = self.axes.tensor, self.norm, self.config.residual_dropout
        weight_d, bias_d = local(norm.weight), local(norm.bias)
        biases = local(self.out.bias), local(self.fc2.bias)
        site = 2 * self.index
        if tensor.size == 1:
            return ops.bias_dropout_add_layer_norm(
                attention_nd,
                biases[0],
                mlp_nd,
                biases[1],
                residual_nd,
                weight_d,
                bias_d,
                norm.eps,
                probability,
                dropout,
                site=site,
            )
        # one process adds the biases; times 0, not left out, so that the others have gradients too
        share = 1.0 if tensor.rank == 0 else 0.0
        branches_nd = ops.bias_dropout_add(
            attention_nd,
            share * biases[0],
            mlp_nd,
            share * biases[1],
            probability,
            dropout,
            site=site,
        )
        residual_nd = residual_nd + tensor.sum_and_cut(branches_nd)
        return ops.layer_norm(residual_nd, weight_d, bias_d, norm.eps), residual_nd

    def attend(self, packed_nm: Tensor, batch: Batch, cache: BlockCache | None) -> Tensor:
        """Turn the packed projection, attend; this process's heads side by side [n, h k]."""
        config, tensor = self.config, self.axes.tensor
        num_heads = config.num_heads // tensor.size
        shape = (batch.size, batch.time, num_heads, 3, config.head_size)
        # unbound before they are transposed, so that their gradients come back in packed order
        packed_bthck = ops.rotary_packed(packed_nm.view(shape), *batch.rotary)
        query_bthk, key_bthk, value_bthk = packed_bthck.unbind(dim=3)
        context, num_keys = self.axes.context, batch.time * self.axes.context.size

        def attend(
            query_bhtk: Tensor, key_bhsk: Tensor, value_bhsk: Tensor, place: DropoutSeed | None
        ) -> Tensor:
            key_mask_bs = None
            if cache is not None:
                key_bhsk, value_bhsk, key_mask_bs = cache.extend(key_bhsk, value_bhsk)
                if query_bhtk.shape[2] == 1:
                    return attention_of_one(query_bhtk, key_bhsk, value_bhsk, key_mask_bs)
            return attention(
                query_bhtk,
                key_bhsk,
                value_bhsk,
                backend=self.attention_backend,
                dropout_probability=config.attention_dropout,
                dropout=place,
                site=2 * self.index + 1,
                part=HeadPart(tensor.rank * num_heads, config.num_heads, num_keys),
                key_mask_bs=key_mask_bs,
                documents=batch.documents,
            )

        if context.size > 1:
            attended_bhtk = attention_over_context(
                context, query_bthk, key_bthk, value_bthk, batch.dropout, attend
            )
        else:
            query_bhtk, key_bhtk = query_bthk.transpose(1, 2), key_bthk.transpose(1, 2)
            attended_bhtk = attend(query_bhtk, key_bhtk, value_bthk.transpose(1, 2), batch.dropout)
        return attended_bhtk.transpose(1, 2).flatten(0, 1).flatten(1)


class Head(nn.Linear):
    """Untied output projection with a bias, and the loss under it."""

    def __init__(self, config: Model, axes: Axes) -> None:
        super().__init__(config.hidden_size, config.vocab_size)
        self.axes = axes

    def forward(self, normed_nd: Tensor, labels_n: Tensor | None = None) -> Tensor:
        """Logits [n, v], or with labels the fp32 sum of the tokens' losses."""
        weight_vd, bias_v = local(self.weight), local(self.bias)
        if labels_n is None:
            return F.linear(normed_nd, weight_vd, bias_v)
        axis = self.axes.tensor
        if axis.size == 1:
            return ops.linear_cross_entropy(normed_nd, weight_vd, bias_v, labels_n)
        rows_nd = axis.gather(normed_nd)
        return vocabulary_parallel_cross_entropy(rows_nd, weight_vd, bias_v, labels_n, axis)


class Phi(nn.Module):
    """The decoder, or the blocks `layers` of it with the embedding or the head at its ends.

    `make` decides in which number format its blocks multiply, `attention_backend` is what
    `megaphi.model.attention_backends.choose` decided on, `axes` cut layers and sequences over
    processes, and `recompute` says what the backward pass computes again instead of keeping.
    """

    def __init__(
        self,
        config: Model,
        make: MakeLinear = make_linear,
        attention_backend: Backend = "sdpa",
        axes: Axes | None = None,
        recompute: Recompute = "none",
        layers: range | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.axes = axes or Axes()
        layers = layers or range(config.num_layers)
        self.embedding = Embedding(config, self.axes) if layers.start == 0 else None
        self.blocks = nn.ModuleList()
        for index in layers:
            block = Block(config, index, make, attention_backend, self.axes, recompute)
            self.blocks.add_module(str(index), block)
        last = layers.stop == config.num_layers
        self.head = Head(config, self.axes) if last else None

    def forward(
        self,
        tokens_bt: Tensor,
        labels_bt: Tensor | None = None,
        *,
        dropout: DropoutSeed | None = None,
        positions: Tensor | None = None,
        caches: list[BlockCache] | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Run the whole decoder.

        Args:
            tokens_bt: int64 token ids.
            labels_bt: int64 ids of the next tokens, for the loss.
            dropout: place in the run's random numbers; None means no dropout.
            positions: int64 [t] or [b, t] positions of the tokens; 0 … t-1 when not given.
            caches: one cache a block, for generation; they are extended.
            documents: the documents of the rows, where a token may see its own one only.

        Returns:
            Logits [b, t, v], or with labels the fp32 sum of the tokens' losses, of this process's
            part of the sequences under context parallelism.
        """
        normed_nd = self.hidden(tokens_bt, dropout, positions, caches, documents)
        assert self.head is not None
        if labels_bt is not None:
            loss: Tensor = self.head(normed_nd, self.axes.context.cut(labels_bt).flatten())
            return loss
        logits_nv: Tensor = self.head(normed_nd)
        return logits_nv.view(*tokens_bt.shape, -1)

    def hidden(
        self,
        tokens_bt: Tensor,
        dropout: DropoutSeed | None = None,
        positions: Tensor | None = None,
        caches: list[BlockCache] | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """What the head reads, [n, d]; arguments as in `forward`."""
        assert self.embedding is not None
        batch = self.describe(tokens_bt.shape, tokens_bt.device, dropout, positions, documents)
        tokens_n = self.axes.context.cut(tokens_bt).flatten()
        normed_nd, residual_nd = self.embedding(tokens_n)
        normed_nd, _ = self.run_blocks(normed_nd, residual_nd, batch, caches)
        return normed_nd

    def run_blocks(
        self,
        normed_nd: Tensor,
        residual_nd: Tensor,
        batch: Batch,
        caches: list[BlockCache] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """LayerNorm(r) and r, both [n, d], after the blocks that are here."""
        for number, block in enumerate(self.blocks):
            cache = None if caches is None else caches[number]
            normed_nd, residual_nd = block(normed_nd, residual_nd, batch, cache)
        return normed_nd, residual_nd

    def describe(
        self,
        shape: torch.Size,
        device: torch.device,
        dropout: DropoutSeed | None,
        positions: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Batch:
        """What the blocks need to know of tokens of this shape, [b, whole time]."""
        config, context = self.config, self.axes.context
        size, time = shape[0], shape[1] // context.size
        cosine, sine = rotary_tables(
            config.max_sequence_length, config.rotary_dim, config.rotary_base, device
        )
        if context.size > 1:
            assert positions is None, "positions are those of the context axis"
            positions = context.positions(time, device)
            if dropout is not None:
                first_of_row = torch.arange(size, device=device)[:, None] * shape[1]
                tokens_n = (first_of_row + positions).flatten()
                dropout = dataclasses.replace(dropout, tokens_n=tokens_n)
        if positions is None:
            rotary = (cosine[:time], sine[:time])
        else:
            rotary = (cosine[positions], sine[positions])
        return Batch(size, time, rotary, dropout, documents)


def num_parameters(config: Model) -> int:
    """Parameters of a model of this shape, counted on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Phi(config).parameters())


def parameter_shapes(config: Model) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every parameter, in the order of the model, without building it."""
    hidden, inner = config.hidden_size, config.ffn_size

    def vectors(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}

    def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    shapes: dict[str, tuple[int, ...]] = {"embedding.tokens.weight": (config.vocab_size, hidden)}
    shapes |= vectors("embedding.norm")
    for block in (f"blocks.{index}" for index in range(config.num_layers)):
        shapes |= linear(f"{block}.qkv", 3 * hidden, hidden)
        shapes |= linear(f"{block}.out", hidden, hidden)
        shapes |= linear(f"{block}.fc1", inner, hidden)
        shapes |= linear(f"{block}.fc2", hidden, inner)
        shapes |= vectors(f"{block}.norm")
    return shapes | linear("head", config.vocab_size, hidden)
