"""A block's attention on this process: rotary embedding, cache, context axis, kernel.

Suffixes: b batch, t time, n rows (b x t), h heads, c the parts q, k, v, k elements of a head,
m = h c k, s key positions.
"""

from functools import partial

from torch import Tensor, nn

from kernels import ops
from kernels.ops import DropoutSeed
from megaphi.config import Model
from megaphi.model.attention import AttentionOptions, Sequences, attention, attention_of_one
from megaphi.model.batch_info import BatchInfo
from megaphi.model.execution import Execution
from megaphi.parallel.context import attention_over_context


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(k)) V of this process's heads; it has no parameters.

    Args:
        config: the model.
        index: number of the block.
        execution: how the model is computed.
    """

    def __init__(self, config: Model, index: int, execution: Execution) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.backend = execution.attention
        self.context = execution.axes.context
        self.num_heads = config.num_heads // execution.axes.tensor.size
        self.first_head = execution.axes.tensor.rank * self.num_heads

    def forward(self, packed_nm: Tensor, batch: BatchInfo) -> Tensor:
        """The heads side by side, [n, h k], from the packed projection of the rows."""
        shape = (batch.size, batch.time, self.num_heads, 3, self.config.head_size)
        # unbound before they are transposed, so that their gradients come back in packed order
        packed_bthck = ops.rotary_packed(packed_nm.view(shape), *batch.rotary)
        query_bthk, key_bthk, value_bthk = packed_bthck.unbind(dim=3)
        attended_bhtk = attention_over_context(
            self.context,
            query_bthk,
            key_bthk,
            value_bthk,
            batch.dropout,
            partial(self.attend, batch),
        )
        return attended_bhtk.transpose(1, 2).flatten(0, 1).flatten(1)

    def attend(
        self,
        batch: BatchInfo,
        query_bhtk: Tensor,
        key_bhsk: Tensor,
        value_bhsk: Tensor,
        dropout: DropoutSeed | None,
    ) -> Tensor:
        """Attention to these keys and, in generation, to those before them, [b, h, t, k]."""
        key_mask_bs = None
        if batch.caches is not None:
            cache = batch.caches[self.index]
            key_bhsk, value_bhsk, key_mask_bs = cache.extend(key_bhsk, value_bhsk)
            if query_bhtk.shape[2] == 1:
                return attention_of_one(query_bhtk, key_bhsk, value_bhsk, key_mask_bs)
        options = AttentionOptions(
            backend=self.backend,
            dropout_probability=self.config.attention_dropout,
            site=2 * self.index + 1,
            first_head=self.first_head,
            num_heads=self.config.num_heads,
        )
        sequences = Sequences(
            dropout=dropout,
            documents=batch.documents,
            key_mask_bs=key_mask_bs,
            length=batch.time * self.context.size,
        )
        return attention(query_bhtk, key_bhsk, value_bhsk, options, sequences)
