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

Suffixes: b batch, t time, d hidden width, h heads, c the parts q, k, v, k elements of a head,
f inner width of the MLP, v vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import ops
from kernels.ops import DropoutSeed
from megaphi.config import Model
from megaphi.model.attention import attention
from megaphi.model.linear import MakeLinear, make_linear
from megaphi.model.rotary import rotary_tables


@dataclass
class BlockCache:
    """Keys and values of one block while a text is generated.

    key_bhsk and value_bhsk are preallocated for the longest text; the first `length` positions are
    filled. `key_mask_bs` is False where a position is left padding.
    """

    key_bhsk: Tensor
    value_bhsk: Tensor
    length: int
    key_mask_bs: Tensor | None

    def extend(self, key_bhtk: Tensor, value_bhtk: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append t positions and return all keys, values and the mask so far."""
        end = self.length + key_bhtk.shape[2]
        assert end <= self.key_bhsk.shape[2], "the cache is full"
        self.key_bhsk[:, :, self.length : end] = key_bhtk
        self.value_bhsk[:, :, self.length : end] = value_bhtk
        self.length = end
        mask_bs = None if self.key_mask_bs is None else self.key_mask_bs[:, :end]
        return self.key_bhsk[:, :, :end], self.value_bhsk[:, :, :end], mask_bs


class Embedding(nn.Module):
    """Token embedding and the first LayerNorm."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, tokens_bt: Tensor) -> tuple[Tensor, Tensor]:
        """Return LayerNorm_0(r_0) and r_0, both [b, t, d]."""
        residual_btd = self.tokens(tokens_bt)
        norm = self.norm
        normed_btd = ops.layer_norm(residual_btd, norm.weight, norm.bias, norm.eps)
        return normed_btd, residual_btd


class Block(nn.Module):
    """Attention and MLP in parallel, then biases, dropout, residual add and the next LayerNorm.

    The rows of `qkv` are grouped by head ([heads, 3, head size]), so that cutting them into equal
    parts cuts between heads at any tensor-parallel size.
    """

    def __init__(self, config: Model, index: int, make: MakeLinear = make_linear) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.qkv = make("qkv", config.hidden_size, 3 * config.hidden_size)
        self.out = make("out", config.hidden_size, config.hidden_size)
        self.fc1 = make("fc1", config.hidden_size, config.ffn_size)
        self.fc2 = make("fc2", config.ffn_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(
        self,
        normed_btd: Tensor,
        residual_btd: Tensor,
        positions: Tensor | None = None,
        dropout: DropoutSeed | None = None,
        cache: BlockCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return LayerNorm_{i+1}(r_{i+1}) and r_{i+1}, both [b, t, d]."""
        attended_btd = self.attend(normed_btd, positions, dropout, cache)
        attention_btd = self.out.product(attended_btd)
        hidden_btf = ops.bias_gelu(self.fc1.product(normed_btd), self.fc1.bias)
        mlp_btd = self.fc2.product(hidden_btf)
        return ops.bias_dropout_add_layer_norm(
            attention_btd,
            self.out.bias,
            mlp_btd,
            self.fc2.bias,
            residual_btd,
            self.norm.weight,
            self.norm.bias,
            self.norm.eps,
            self.config.residual_dropout,
            dropout,
            site=2 * self.index,
        )

    def attend(
        self,
        normed_btd: Tensor,
        positions: Tensor | None,
        dropout: DropoutSeed | None,
        cache: BlockCache | None,
    ) -> Tensor:
        """Project, turn, attend; the heads' results side by side [b, t, d]."""
        config = self.config
        batch, time, _ = normed_btd.shape
        qkv_bthck = self.qkv(normed_btd).view(batch, time, config.num_heads, 3, config.head_size)
        cosine, sine = rotary_tables(
            config.max_sequence_length, config.rotary_dim, config.rotary_base, normed_btd.device
        )
        if positions is None:
            cosine, sine = cosine[:time], sine[:time]
        else:
            cosine, sine = cosine[positions], sine[positions]
        # unbound before they are transposed, so that their gradients come back in packed order
        query, key, value = ops.rotary_packed(qkv_bthck, cosine, sine).unbind(dim=3)
        query_bhtk, key_bhsk = query.transpose(1, 2), key.transpose(1, 2)
        value_bhsk, key_mask_bs = value.transpose(1, 2), None
        if cache is not None:
            key_bhsk, value_bhsk, key_mask_bs = cache.extend(key_bhsk, value_bhsk)
        attended_bhtk = attention(
            query_bhtk,
            key_bhsk,
            value_bhsk,
            dropout_probability=config.attention_dropout,
            dropout=dropout,
            site=2 * self.index + 1,
            key_mask_bs=key_mask_bs,
        )
        return attended_bhtk.transpose(1, 2).reshape(batch, time, config.hidden_size)


class Head(nn.Linear):
    """Untied output projection with a bias, and the loss under it."""

    def forward(self, normed_btd: Tensor, labels_bt: Tensor | None = None) -> Tensor:
        """Logits [b, t, v], or with labels the fp32 sum of the tokens' losses."""
        if labels_bt is None:
            return F.linear(normed_btd, self.weight, self.bias)
        return ops.linear_cross_entropy(
            normed_btd.flatten(0, 1), self.weight, self.bias, labels_bt.flatten()
        )


class Phi(nn.Module):
    """The whole decoder; `make` decides in which number format its blocks multiply."""

    def __init__(self, config: Model, make: MakeLinear = make_linear) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, i, make) for i in range(config.num_layers))
        self.head = Head(config.hidden_size, config.vocab_size)

    def forward(
        self,
        tokens_bt: Tensor,
        labels_bt: Tensor | None = None,
        *,
        dropout: DropoutSeed | None = None,
        positions: Tensor | None = None,
        caches: list[BlockCache] | None = None,
    ) -> Tensor:
        """Run the decoder.

        Args:
            tokens_bt: int64 token ids.
            labels_bt: int64 ids of the next tokens, for the loss.
            dropout: place in the run's random numbers; None means no dropout.
            positions: int64 [t] or [b, t] positions of the tokens; 0 … t-1 when not given.
            caches: one cache a block, for generation; they are extended.

        Returns:
            Logits [b, t, v], or with labels the fp32 sum of the tokens' losses.
        """
        normed_btd, residual_btd = self.embedding(tokens_bt)
        for index, block in enumerate(self.blocks):
            cache = None if caches is None else caches[index]
            normed_btd, residual_btd = block(normed_btd, residual_btd, positions, dropout, cache)
        logits_or_loss: Tensor = self.head(normed_btd, labels_bt)
        return logits_or_loss


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
