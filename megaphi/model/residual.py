"""Where a block ends: both branches go into the residual stream, which is normalized at once.

Suffixes: n rows, d hidden width.
"""

from torch import Tensor, nn

from kernels import ops
from kernels.ops import DropoutSeed
from megaphi.config import Model
from megaphi.parallel.tensor import TensorAxis, local


class AddAndNorm(nn.LayerNorm):
    """r' = r + dropout(attention + bias) + dropout(mlp + bias), and LayerNorm(r').

    On one process biases, dropout, residual add and LayerNorm are one operation. Dropout is linear:
    under tensor parallelism each process masks its addend of the branches, before the one reduction
    that adds them up and cuts them into rows.

    Args:
        config: the model.
        index: number of the block.
        axis: the tensor axis.
    """

    def __init__(self, config: Model, index: int, axis: TensorAxis) -> None:
        super().__init__(config.hidden_size, eps=config.layer_norm_epsilon)
        self.index = index
        self.axis = axis
        self.probability = config.residual_dropout

    def forward(  # type: ignore[override]
        self,
        attention: tuple[Tensor, Tensor],
        mlp: tuple[Tensor, Tensor],
        residual_nd: Tensor,
        dropout: DropoutSeed | None,
    ) -> tuple[Tensor, Tensor]:
        """Add and normalize.

        Args:
            attention: the branch [n, d] without its bias, and the bias [d]; under tensor
                parallelism this process's addend of all rows.
            mlp: the other branch, likewise.
            residual_nd: this process's rows of the residual stream.
            dropout: position in the run's random numbers; None means no dropout.

        Returns:
            LayerNorm(r') and r', both [n, d].
        """
        (attention_nd, attention_bias_d), (mlp_nd, mlp_bias_d) = attention, mlp
        attention_bias_d, mlp_bias_d = local(attention_bias_d), local(mlp_bias_d)
        weight_d, bias_d = local(self.weight), local(self.bias)
        site = 2 * self.index
        if self.axis.size == 1:
            return ops.bias_dropout_add_layer_norm(
                attention_nd,
                attention_bias_d,
                mlp_nd,
                mlp_bias_d,
                residual_nd,
                weight_d,
                bias_d,
                self.eps,
                self.probability,
                dropout,
                site=site,
            )
        # one process adds the biases; times 0, not left out, so that the others have gradients too
        share = 1.0 if self.axis.rank == 0 else 0.0
        branches_nd = ops.bias_dropout_add(
            attention_nd,
            share * attention_bias_d,
            mlp_nd,
            share * mlp_bias_d,
            self.probability,
            dropout,
            site=site,
        )
        residual_nd = residual_nd + self.axis.sum_and_cut(branches_nd)
        return ops.layer_norm(residual_nd, weight_d, bias_d, self.eps), residual_nd
