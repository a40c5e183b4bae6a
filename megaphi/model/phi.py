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
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import ops
from kernels.ops import DropoutSeed
from megaphi.config import Model
from megaphi.data.documents import Documents
from megaphi.model.batch_info import BatchInfo, batch_info
from megaphi.model.cache import BlockCache
from megaphi.model.column_pair import BlockInput
from megaphi.model.execution import Execution, recomputed
from megaphi.model.residual import AddAndNorm
from megaphi.model.self_attention import SelfAttention
from megaphi.parallel.axes import Axes
from megaphi.parallel.tensor import embed, head_loss, local


class Embedding(nn.Module):
    """Token embedding and the first LayerNorm."""

    def __init__(self, config: Model, axes: Axes) -> None:
        super().__init__()
        self.axes = axes
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, tokens_bt: Tensor) -> tuple[Tensor, Tensor]:
        """Return LayerNorm_0(r_0) and r_0, both [n, d]."""
        tokens_n = self.axes.context.cut(tokens_bt).flatten()
        residual_nd = embed(tokens_n, local(self.tokens.weight), self.axes.tensor)
        norm = self.norm
        normed_nd = ops.layer_norm(residual_nd, local(norm.weight), local(norm.bias), norm.eps)
        return normed_nd, residual_nd


class Block(nn.Module):
    """Attention and MLP in parallel, then biases, dropout, residual add and the next LayerNorm.

    The rows of `qkv` are grouped by head ([heads, 3, head size]), so that cutting them into equal
    parts cuts between heads at any tensor-parallel size. The biases of `fc1`, `out` and `fc2` are
    added by the fused operations that follow.
    """

    def __init__(self, config: Model, index: int, execution: Execution) -> None:
        super().__init__()
        make, hidden = execution.make, config.hidden_size
        self.recompute = execution.recompute
        self.axis = execution.axes.tensor
        self.qkv = make("qkv", hidden, 3 * hidden)
        self.out = make("out", hidden, hidden)
        self.fc1 = make("fc1", hidden, config.ffn_size)
        self.fc2 = make("fc2", config.ffn_size, hidden)
        self.norm = AddAndNorm(config, index, self.axis)
        self.attend = SelfAttention(config, index, execution)

    @recomputed("full")
    def forward(
        self, normed_nd: Tensor, residual_nd: Tensor, batch: BatchInfo
    ) -> tuple[Tensor, Tensor]:
        """With r' = r + dropout(attention(y)) + dropout(mlp(y)), LayerNorm(r') and r', [n, d]."""
        y = BlockInput(normed_nd, self.qkv, self.fc1, self.axis, keep_rows=self.recompute == "full")
        attention_nd = self.out.product(self.attend(y.qkv(), batch))
        mlp_nd = self.second_half(y.fc1())
        branches = (attention_nd, self.out.bias), (mlp_nd, self.fc2.bias)
        normed_nd, residual_nd = self.norm(*branches, residual_nd, batch.dropout)
        return normed_nd, residual_nd

    @recomputed("selective")
    def second_half(self, inner_nf: Tensor) -> Tensor:
        """The MLP from its inner width on: fc2(GELU(fc1(y))), [n, d]."""
        return self.fc2.product(ops.bias_gelu(inner_nf, local(self.fc1.bias)))


class Head(nn.Linear):
    """Untied output projection with a bias, and the loss under it."""

    def __init__(self, config: Model, axes: Axes) -> None:
        super().__init__(config.hidden_size, config.vocab_size)
        self.axes = axes

    def forward(self, normed_nd: Tensor, labels_bt: Tensor | None = None) -> Tensor:
        """Logits [n, v], or with labels the fp32 sum of the tokens' losses."""
        weight_vd, bias_v = local(self.weight), local(self.bias)
        if labels_bt is None:
            return F.linear(normed_nd, weight_vd, bias_v)
        labels_n = self.axes.context.cut(labels_bt).flatten()
        return head_loss(normed_nd, weight_vd, bias_v, labels_n, self.axes.tensor)


class Phi(nn.Module):
    """The decoder, or the blocks `layers` of it with the embedding or the head at its ends."""

    def __init__(
        self, config: Model, execution: Execution | None = None, layers: range | None = None
    ) -> None:
        super().__init__()
        execution = execution or Execution()
        self.config = config
        self.axes = execution.axes
        layers = layers or range(config.num_layers)
        self.embedding = Embedding(config, self.axes) if layers.start == 0 else None
        self.blocks = nn.ModuleList()
        for index in layers:
            self.blocks.add_module(str(index), Block(config, index, execution))
        last = layers.stop == config.num_layers
        self.head = Head(config, self.axes) if last else None

    def forward(
        self,
        tokens_bt: Tensor,
        labels_bt: Tensor | None = None,
        *,
        dropout: DropoutSeed | None = None,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        caches: Sequence[BlockCache] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Run the complete decoder.

        Args:
            tokens_bt: int64 token ids.
            labels_bt: int64 ids of the next tokens, for the loss.
            dropout: position in the run's random numbers; None means no dropout.
            positions: int64 [t] or [b, t] positions of the tokens; 0 … t-1 when not given.
            documents: the documents of the rows, where a token may see its own one only.
            caches: one cache a block, for generation; they are extended.
            last_only: whether logits are needed for the last token of each row only.

        Returns:
            Logits [b, t, v] or [b, v], or with labels the fp32 sum of the tokens' losses, of this
            process's part of the sequences under context parallelism.
        """
        batch = dataclasses.replace(
            self.describe(tokens_bt.shape, tokens_bt.device, dropout, positions),
            documents=documents,
            caches=caches,
            last_only=last_only,
        )
        (result,) = self.run((tokens_bt,), batch, labels_bt)
        if labels_bt is not None or last_only:
            return result
        return result.view(*tokens_bt.shape, -1)

    def run(
        self, inputs: tuple[Tensor, ...], batch: BatchInfo, labels_bt: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Embedding, blocks and head, as far as they are in this part of the model.

        Args:
            inputs: the token ids [b, t], or what the part before has returned.
            batch: what the blocks need to know of it.
            labels_bt: int64 ids of the next tokens, for the loss.

        Returns:
            LayerNorm(r) and r, both [n, d]; with the head the logits [n, v] or the loss.
        """
        stream = self.run_blocks(inputs, batch)
        if self.head is None:
            return stream
        normed_nd = stream[0]
        if batch.last_only:
            normed_nd = normed_nd.view(batch.size, batch.time, -1)[:, -1]
        return (self.head(normed_nd, labels_bt),)

    def run_blocks(self, inputs: tuple[Tensor, ...], batch: BatchInfo) -> tuple[Tensor, ...]:
        """LayerNorm(r) and r, both [n, d], after the embedding and the blocks that are here."""
        stream = inputs if self.embedding is None else self.embedding(*inputs)
        for block in self.blocks:
            stream = block(*stream, batch)
        return stream

    def hidden(self, tokens_bt: Tensor) -> Tensor:
        """What the head reads, [n, d]."""
        batch = self.describe(tokens_bt.shape, tokens_bt.device)
        return self.run_blocks((tokens_bt,), batch)[0]

    def describe(
        self,
        shape: torch.Size,
        device: torch.device,
        dropout: DropoutSeed | None = None,
        positions: Tensor | None = None,
    ) -> BatchInfo:
        """What the blocks need to know of tokens of this shape; see `batch_info`."""
        return batch_info(self.config, self.axes.context, shape, device, dropout, positions)


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
