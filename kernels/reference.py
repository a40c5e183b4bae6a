"""The operations of the phi step in plain PyTorch, written from their formulas.

Each function is the twin of a kernel: it defines the result that a faster implementation has to
give, runs on every device, and is what CPU runs use. Suffixes name shapes: b batch, t time,
n = b x t rows, d hidden width, h heads, c the three parts of a packed projection, k elements of a
head, v vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True, kw_only=True)
class DropoutSeed:
    """Where in a run's random numbers a micro-batch stands.

    Masks are a pure function of (seed, step, site, global position), so they depend neither on how
    a step is cut into micro-batches and processes nor on what was drawn before.
    """

    seed: int
    """Seed of the run, below 2^64."""
    step: int
    """Optimizer step, below 2^32."""
    first_token: int
    """Position of the micro-batch's first token among all tokens of the step."""
    tokens_n: Tensor | None = None
    """int64 [n]: tokens from the first to each row's; 0 … n - 1 when not given."""


def philox_4x32(
    seed: int, counter: tuple[Tensor, Tensor | int, int, int], rounds: int = 7
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32 (Salmon et al., SC11, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        seed: 64-bit key; the low word is the first key word.
        counter: four 32-bit counter words; the first is an int64 tensor of any shape, the second
            a number or a tensor like it.
        rounds: 7 is the fewest that pass BigCrush, 10 the authors' default.

    Returns:
        Four int64 tensors of the shape of `counter[0]`, uniform in [0, 2^32).
    """
    key = [seed & _WORD, (seed >> 32) & _WORD]
    c0 = counter[0] & _WORD
    c1 = torch.zeros_like(c0) + (counter[1] & _WORD)
    c2, c3 = (torch.full_like(c0, word & _WORD) for word in counter[2:])
    for _ in range(rounds):
        # int64 products wrap, but their low 64 bits are those of the unsigned product
        product0 = c0 * _PHILOX_MULTIPLIERS[0]
        product1 = c2 * _PHILOX_MULTIPLIERS[1]
        c0 = ((product1 >> 32) & _WORD) ^ c1 ^ key[0]
        c2 = ((product0 >> 32) & _WORD) ^ c3 ^ key[1]
        c1, c3 = product1 & _WORD, product0 & _WORD
        key = [(key[i] + _PHILOX_KEY_STEPS[i]) & _WORD for i in range(2)]
    return c0, c1, c2, c3


def dropout_threshold(probability: float) -> int:
    """The 16-bit threshold below which a random word drops its element."""
    return round(probability * 65536)


def dropout_masks(
    shape: torch.Size, probability: float, dropout: DropoutSeed, site: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Two independent dropout masks for `shape` [tokens, elements], already scaled.

    One Philox call serves four neighbouring elements of both masks: mask a takes the low 16 bits
    of a word, mask b the high ones. Counter: group index within the step (two words), site, step.

    Args:
        shape: [n, m]; m is rounded up to a multiple of four for the numbering.
        probability: share of elements to drop, rounded to a multiple of 2^-16.
        dropout: place of the rows in the run.
        site: which dropout of the model this is.
        device: where the masks are made.

    Returns:
        fp32 masks a and b [n, m]: 0 where dropped, else 1 / (1 - probability).
    """
    rows, elements = shape
    groups = (elements + 3) // 4
    if dropout.tokens_n is None:
        index = torch.arange(rows * groups, dtype=torch.int64, device=device)
    else:
        index = dropout.tokens_n[:, None] * groups + torch.arange(groups, device=device)
        index = index.flatten()
    index += dropout.first_token * groups
    words = philox_4x32(dropout.seed, (index, index >> 32, site, dropout.step))
    word = torch.stack(words, dim=-1).view(rows, groups * 4)[:, :elements]
    threshold = dropout_threshold(probability)
    scale = 65536.0 / (65536.0 - threshold)
    low, high = word & 0xFFFF, word >> 16
    return (low >= threshold).float() * scale, (high >= threshold).float() * scale


def layer_norm(x_btd: Tensor, weight_d: Tensor, bias_d: Tensor, epsilon: float) -> Tensor:
    """LayerNorm over the last dimension, statistics in fp32, result in the dtype of `x_btd`."""
    return F.layer_norm(x_btd, (x_btd.shape[-1],), weight_d, bias_d, epsilon)


def bias_dropout_add(
    attention_nd: Tensor,
    attention_bias_d: Tensor,
    mlp_nd: Tensor,
    mlp_bias_d: Tensor,
    probability: float = 0.0,
    dropout: DropoutSeed | None = None,
    site: int = 0,
) -> Tensor:
    """mask_a (attention + bias_a) + mask_b (mlp + bias_b), for branches that are summed later.

    The masks are those of `bias_dropout_add_layer_norm`, which this is the first part of.
    """
    branches = masked_branches(
        attention_nd, attention_bias_d, mlp_nd, mlp_bias_d, probability, dropout, site
    )
    return (branches[0] + branches[1]).to(attention_nd.dtype)


def masked_branches(
    attention_btd: Tensor,
    attention_bias_d: Tensor,
    mlp_btd: Tensor,
    mlp_bias_d: Tensor,
    probability: float,
    dropout: DropoutSeed | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    """Both branches with their bias and their dropout, in fp32."""
    attention_btd = attention_btd.float() + attention_bias_d.float()
    mlp_btd = mlp_btd.float() + mlp_bias_d.float()
    if dropout is None or dropout_threshold(probability) == 0:
        return attention_btd, mlp_btd
    shape = attention_btd.flatten(0, -2).shape
    mask_a, mask_b = dropout_masks(shape, probability, dropout, site, attention_btd.device)
    return attention_btd * mask_a.view_as(mlp_btd), mlp_btd * mask_b.view_as(mlp_btd)


def bias_dropout_add_layer_norm(
    attention_btd: Tensor,
    attention_bias_d: Tensor,
    mlp_btd: Tensor,
    mlp_bias_d: Tensor,
    residual_btd: Tensor,
    weight_d: Tensor,
    bias_d: Tensor,
    epsilon: float,
    probability: float = 0.0,
    dropout: DropoutSeed | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:
    """End of a phi block: biases, dropout of both branches, residual add, LayerNorm.

        r = residual + mask_a * (attention + bias_a) + mask_b * (mlp + bias_b);  y = LayerNorm(r)

    Args:
        attention_btd: output projection of the attention, without its bias.
        attention_bias_d: its bias.
        mlp_btd: second MLP projection, without its bias.
        mlp_bias_d: its bias.
        residual_btd: residual stream.
        weight_d: LayerNorm scale.
        bias_d: LayerNorm shift.
        epsilon: added to the variance.
        probability: dropout of each branch.
        dropout: place in the run's random numbers; None means no dropout.
        site: which dropout of the model this is.

    Returns:
        y and r, both [b, t, d] in the dtype of `residual_btd`; the sum is made in fp32.
    """
    attention_btd, mlp_btd = masked_branches(
        attention_btd, attention_bias_d, mlp_btd, mlp_bias_d, probability, dropout, site
    )
    residual_btd = (residual_btd.float() + attention_btd + mlp_btd).to(residual_btd.dtype)
    return layer_norm(residual_btd, weight_d, bias_d, epsilon), residual_btd


def rotary_packed(qkv_bthck: Tensor, cosine_tr: Tensor, sine_tr: Tensor) -> Tensor:
    """Rotary position embedding of the queries and keys inside a packed projection.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) with x1 the first r elements of a head and x2 the
    next r (Su et al., arXiv 2104.09864, in the element order of GPT-NeoX and Hugging Face's Phi).
    The other elements of the queries and keys, and all values, stay.

    Args:
        qkv_bthck: packed projection, c = 3. A faster implementation may write the result over it:
            do not use it afterwards.
        cosine_tr: fp32 cosines of position x frequency, [t, r] or [b, t, r].
        sine_tr: fp32 sines, likewise.

    Returns:
        A tensor like `qkv_bthck`; the arithmetic is fp32.
    """
    size, half = qkv_bthck.shape[-1], cosine_tr.shape[-1]
    cosine, sine = cosine_tr.unsqueeze(-2), sine_tr.unsqueeze(-2)

    def turn(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = x1.float(), x2.float()
        y1, y2 = x1 * cosine - x2 * sine, x2 * cosine + x1 * sine
        return y1.to(qkv_bthck.dtype), y2.to(qkv_bthck.dtype)

    # one split and one concatenation, of a head's three parts side by side: autograd runs backward
    # through them in one copy each
    sizes = [half, half, size - 2 * half, half, half, 2 * size - 2 * half]
    q1, q2, q_rest, k1, k2, k_rest_and_v = torch.split(qkv_bthck.flatten(-2), sizes, dim=-1)
    parts = (*turn(q1, q2), q_rest, *turn(k1, k2), k_rest_and_v)
    return torch.cat(parts, dim=-1).view_as(qkv_bthck)


def bias_gelu(x_btf: Tensor, bias_f: Tensor) -> Tensor:
    """GELU(x + bias) in its tanh form (`gelu_new` in Hugging Face's Phi)."""
    return F.gelu(x_btf + bias_f, approximate="tanh")


class _LinearCrossEntropy(torch.autograd.Function):
    """Chunked head and loss; the gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        x_nd: Tensor,
        weight_vd: Tensor,
        bias_v: Tensor,
        labels_n: Tensor,
        chunk_rows: int,
    ) -> Tensor:
        """Return the summed loss, and keep the three gradients for `backward`."""
        with_gradients = any(ctx.needs_input_grad[:3])
        loss = torch.zeros((), dtype=torch.float32, device=x_nd.device)
        grad_x_nd = torch.empty_like(x_nd) if with_gradients else None
        grad_weight_vd = (
            torch.zeros_like(weight_vd, dtype=torch.float32) if with_gradients else None
        )
        grad_bias_v = torch.zeros_like(bias_v, dtype=torch.float32) if with_gradients else None
        for start in range(0, x_nd.shape[0], chunk_rows):
            rows = slice(start, min(start + chunk_rows, x_nd.shape[0]))
            logits_nv = F.linear(x_nd[rows], weight_vd, bias_v).float()
            labels = labels_n[rows, None]
            log_sum_n = torch.logsumexp(logits_nv, dim=-1, keepdim=True)
            loss += (log_sum_n - logits_nv.gather(-1, labels)).sum()
            if grad_x_nd is None or grad_weight_vd is None or grad_bias_v is None:
                continue
            grad_nv = logits_nv.sub_(log_sum_n).exp_()
            grad_nv.scatter_add_(-1, labels, torch.full_like(log_sum_n, -1.0))
            grad_bias_v += grad_nv.sum(dim=0)
            grad_nv = grad_nv.to(x_nd.dtype)
            torch.mm(grad_nv, weight_vd, out=grad_x_nd[rows])
            grad_weight_vd += grad_nv.t() @ x_nd[rows]
        if grad_x_nd is not None and grad_weight_vd is not None and grad_bias_v is not None:
            ctx.save_for_backward(
                grad_x_nd, grad_weight_vd.to(weight_vd.dtype), grad_bias_v.to(bias_v.dtype)
            )
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass made."""
        # multiplied in fp32: one over the tokens of a step, rounded to bf16, is off by up to 0.4%
        scaled = ((g.float() * grad_loss).to(g.dtype) for g in ctx.saved_tensors)
        return (*scaled, None, None)


def rows_per_chunk(device: torch.device) -> int:
    """Rows whose logits exist at a time in the head's loss, where nobody says another number.

    On a CPU smaller chunks stay in the cache (4,096 x 4,096 logits in bf16 on two cores: 71 ms
    against 138 ms).
    """
    return 512 if device.type == "cpu" else 4096


def linear_cross_entropy(
    x_nd: Tensor,
    weight_vd: Tensor,
    bias_v: Tensor,
    labels_n: Tensor,
    chunk_rows: int | None = None,
) -> Tensor:
    """Head projection and cross-entropy without ever holding all logits.

    Args:
        x_nd: final hidden states.
        weight_vd: head weight.
        bias_v: head bias.
        labels_n: int64 target ids, each in [0, v).
        chunk_rows: rows whose fp32 logits [chunk_rows, v] exist at a time; `rows_per_chunk` when
            not given.

    Returns:
        fp32 scalar, the sum of -log softmax(x W^T + b)[label] over the rows. Gradients of the
        weight add up in fp32 over the chunks.
    """
    if chunk_rows is None:
        chunk_rows = rows_per_chunk(x_nd.device)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_nd, weight_vd, bias_v, labels_n, chunk_rows
    )
    return loss


def adamw_step_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    step: Tensor,
    finite: Tensor,
    gradient_scale: Tensor,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    """One AdamW update in place (arXiv 1711.05101), without the host looking at any value.

        m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
        p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        parameters: fp32 parameters.
        gradients: fp32 gradients; used up.
        first_moments: fp32 m.
        second_moments: fp32 v.
        step: fp32 scalar t, already counting this update.
        finite: bool scalar; where False nothing changes.
        gradient_scale: fp32 scalar that multiplies the gradients (clipping).
        learning_rate: lr.
        beta1: b1.
        beta2: b2.
        epsilon: eps.
        weight_decay: wd.
    """
    if not parameters:
        return
    one = torch.ones_like(step)
    rate = torch.where(finite, learning_rate / (1 - beta1**step), 0.0 * one)
    root_correction = (1 - beta2**step).sqrt()
    zero = torch.zeros_like(step)
    for gradient in gradients:
        gradient.copy_(torch.where(finite, gradient * gradient_scale, zero))
    torch._foreach_mul_(first_moments, torch.where(finite, beta1 * one, one))
    torch._foreach_add_(first_moments, torch._foreach_mul(gradients, 1 - beta1))
    torch._foreach_mul_(second_moments, torch.where(finite, beta2 * one, one))
    torch._foreach_addcmul_(second_moments, gradients, gradients, value=1 - beta2)
    denominators = torch._foreach_sqrt(second_moments)
    torch._foreach_div_(denominators, root_correction)
    torch._foreach_add_(denominators, epsilon)
    torch._foreach_mul_(
        parameters, torch.where(finite, (1 - learning_rate * weight_decay) * one, one)
    )
    updates = torch._foreach_div(first_moments, denominators)
    torch._foreach_mul_(updates, -rate)
    torch._foreach_add_(parameters, updates)


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """fp32 scalar: the sum of squares over all elements of all tensors."""
    norms = torch._foreach_norm(tensors, 2.0, dtype=torch.float32)
    return torch.stack(norms).square().sum()
