"""What the kernels at the end of a phi block share: both branches of a row, with their dropout.

Philox-4x32-7 with the run's seed as key; one call makes four words for four neighbouring elements
of both masks, mask a from the low 16 bits of a word, mask b from the high ones. Counter:
(first_token + token of the row) ceil(d / 4) + element / 4 in two words, site, step, as in
`kernels.reference.dropout_masks`, whose masks these are bit for bit. A backward pass draws them
again from the same place in the run, so that no mask is ever stored.

Suffixes: n rows.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import DropoutSeed, dropout_threshold

# their values change from call to call and must not make new variants of a kernel
PLACE_ARGUMENTS = ("seed", "step", "site", "first_token")


@triton.jit  # type: ignore[untyped-decorator]
def dropout_row(  # type: ignore[no-untyped-def]
    row,
    seed,
    step,
    site,
    first_token,
    tokens_ptr,
    threshold: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """Scaled masks a and b of one row, fp32 [block]; 0 where dropped."""
    groups: tl.constexpr = (width + 3) // 4
    scale: tl.constexpr = 65536.0 / (65536 - threshold)
    token = tl.cast(first_token, tl.int64)
    if tokens_ptr is None:
        token += row
    else:
        token += tl.load(tokens_ptr + row)
    first = token * groups
    index = first + tl.arange(0, block // 4)
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    zero = low * 0
    word0, word1, word2, word3 = tl.philox(
        seed,
        low,
        high,
        zero + tl.cast(site, tl.uint32),
        zero + tl.cast(step, tl.uint32),
        n_rounds=7,
    )
    # join appends a dimension that runs fastest, so the outer pair is the low bit of the position
    joined = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    word = tl.reshape(joined, [block])
    mask_a = tl.where((word & 0xFFFF) >= threshold, scale, 0.0)
    mask_b = tl.where((word >> 16) >= threshold, scale, 0.0)
    return mask_a, mask_b


@triton.jit  # type: ignore[untyped-decorator]
def branch_rows(  # type: ignore[no-untyped-def]
    attention_ptr,
    attention_bias_ptr,
    mlp_ptr,
    mlp_bias_ptr,
    attention_stride,
    mlp_stride,
    row,
    inside,
    seed,
    step,
    site,
    first_token,
    tokens_ptr,
    threshold: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """Both branches of one row, with bias and dropout, fp32 [block]; 0 where not `inside`."""
    columns = tl.arange(0, block)
    attention = tl.load(attention_ptr + row * attention_stride + columns, mask=inside, other=0.0)
    attention_bias = tl.load(attention_bias_ptr + columns, mask=inside, other=0.0)
    mlp = tl.load(mlp_ptr + row * mlp_stride + columns, mask=inside, other=0.0)
    mlp_bias = tl.load(mlp_bias_ptr + columns, mask=inside, other=0.0)
    attention = attention.to(tl.float32) + attention_bias.to(tl.float32)
    mlp = mlp.to(tl.float32) + mlp_bias.to(tl.float32)
    if threshold > 0:
        mask_a, mask_b = dropout_row(
            row, seed, step, site, first_token, tokens_ptr, threshold, width, block
        )
        attention *= mask_a
        mlp *= mask_b
    return attention, mlp


def place_of(
    probability: float, dropout: DropoutSeed | None, site: int
) -> tuple[list[int], Tensor | None, int]:
    """Seed, step, site and first token; the rows' tokens; and the threshold, 0 for no dropout.

    Raises:
        ValueError: the probability is outside [0, 1).
    """
    threshold = 0 if dropout is None else dropout_threshold(probability)
    if not 0 <= threshold < 65536:
        raise ValueError(f"dropout probability {probability}: must be at least 0 and below 1")
    if dropout is None or threshold == 0:
        return [0, 0, 0, 0], None, 0
    # an operator's integers are signed 64-bit; the key keeps its bits
    seed = dropout.seed - 2**64 if dropout.seed >= 2**63 else dropout.seed
    return [seed, dropout.step, site, dropout.first_token], dropout.tokens_n, threshold
