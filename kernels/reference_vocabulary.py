"""Cross-entropy over a part of the vocabulary, in plain PyTorch.

Under tensor parallelism a process has the logits of some of the vocabulary. It describes each row
by three numbers; those of all processes together give the loss, and what each needs to turn its
logits into their gradients. Suffixes: n rows, v this process's part of the vocabulary.
"""

import torch
from torch import Tensor


def vocabulary_statistics(logits_nv: Tensor, ids_n: Tensor) -> Tensor:
    """What a row of logits contributes to softmax and loss.

    Args:
        logits_nv: logits of this part of the vocabulary.
        ids_n: int64 targets, counted from this part's first column; outside of [0, v) the target
            is in another part.

    Returns:
        fp32 [3, n]: the maximum m, the sum of exp(z - m), and the target's logit, -inf where it is
        in another part.
    """
    logits_nv = logits_nv.float()
    maximum_n = logits_nv.amax(dim=1)
    total_n = (logits_nv - maximum_n[:, None]).exp_().sum(dim=1)
    here_n = (ids_n >= 0) & (ids_n < logits_nv.shape[1])
    column_n = ids_n.where(here_n, 0)[:, None]
    target_n = logits_nv.gather(1, column_n)[:, 0].masked_fill(~here_n, float("-inf"))
    return torch.stack((maximum_n, total_n, target_n))


def vocabulary_gradient_(
    logits_nv: Tensor, ids_n: Tensor, maximum_n: Tensor, total_n: Tensor
) -> None:
    """Overwrite logits with softmax - onehot, the gradient of the loss.

    Args:
        logits_nv: logits of this part of the vocabulary; the gradient has their dtype.
        ids_n: int64 targets as in `vocabulary_statistics`.
        maximum_n: fp32 maximum of the row in all parts.
        total_n: fp32 sum of exp(z - maximum) over all parts.
    """
    gradient_nv = (logits_nv.float() - maximum_n[:, None]).exp_().div_(total_n[:, None])
    here_n = (ids_n >= 0) & (ids_n < logits_nv.shape[1])
    gradient_nv.scatter_add_(1, ids_n.where(here_n, 0)[:, None], -here_n[:, None].float())
    logits_nv.copy_(gradient_nv)
