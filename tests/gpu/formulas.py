"""The operations of a step from their formulas, in float64, differentiated by autograd.

Each takes the arguments of the function of its name in `kernels.ops`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kernels.reference import DropoutSeed, dropout_masks


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight + bias


def bias_dropout_add_layer_norm(
    attention: Tensor,
    attention_bias: Tensor,
    mlp: Tensor,
    mlp_bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    probability: float,
    dropout: DropoutSeed | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    a, b = attention + attention_bias, mlp + mlp_bias
    if dropout is not None:
        rows = residual.flatten(0, -2).shape
        masks = dropout_masks(rows, probability, dropout, site, residual.device)
        mask_a, mask_b = (mask.double().view_as(residual) for mask in masks)
        a, b = mask_a * a, mask_b * b
    r = residual + a + b
    return layer_norm(r, weight, bias, epsilon), r


def bias_dropout_add(
    attention: Tensor,
    attention_bias: Tensor,
    mlp: Tensor,
    mlp_bias: Tensor,
    probability: float,
    dropout: DropoutSeed,
    site: int,
) -> Tensor:
    masks = dropout_masks(attention.shape, probability, dropout, site, attention.device)
    mask_a, mask_b = (mask.double() for mask in masks)
    return mask_a * (attention + attention_bias) + mask_b * (mlp + mlp_bias)


def rotary_packed(qkv: Tensor, cosine_tr: Tensor, sine_tr: Tensor) -> Tensor:
    half = cosine_tr.shape[-1]
    angle = torch.complex(cosine_tr, sine_tr)[:, None, None, :]
    turned = torch.complex(qkv[..., :2, :half], qkv[..., :2, half : 2 * half]) * angle
    rest = qkv[..., :2, 2 * half :]
    queries_keys = torch.cat((turned.real, turned.imag, rest), dim=-1)
    return torch.cat((queries_keys, qkv[..., 2:, :]), dim=-2)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    z = x + bias
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    logits = x @ weight.t() + bias
    return (logits.logsumexp(-1) - logits.gather(-1, labels[:, None])[:, 0]).sum()


def vocabulary_statistics(logits: Tensor, ids: Tensor) -> Tensor:
    maximum = logits.amax(1)
    total = (logits - maximum[:, None]).exp().sum(1)
    return torch.stack((maximum, total, logits.gather(1, ids[:, None])[:, 0]))


def vocabulary_gradient_(logits: Tensor, ids: Tensor, maximum: Tensor, total: Tensor) -> None:
    onehot = torch.nn.functional.one_hot(ids, logits.shape[1])
    logits.copy_((logits - maximum[:, None]).exp() / total[:, None] - onehot)


def adamw_step_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    step: Tensor,
    finite: Tensor,
    scale: Tensor,
    **s: Any,
) -> None:
    assert bool(finite)
    lists = zip(parameters, gradients, first_moments, second_moments, strict=True)
    for p, g, m, v in lists:
        g = g * scale
        m.copy_(s["beta1"] * m + (1 - s["beta1"]) * g)
        v.copy_(s["beta2"] * v + (1 - s["beta2"]) * g * g)
        mean, square = m / (1 - s["beta1"] ** step), v / (1 - s["beta2"] ** step)
        update = mean / (square.sqrt() + s["epsilon"]) + s["weight_decay"] * p
        p.sub_(s["learning_rate"] * update)


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum()
