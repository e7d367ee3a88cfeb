# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Cosine and sine of YaRN's rotary angles, for all tokens of a step in one launch.

At position 131071 an angle has 17 bits before the binary point. The fast sine of GPUs is inaccurate
for such arguments, so the angle, an fp32 product as in the reference, is reduced by multiples of
pi/2 in float64, and the remainder goes through Taylor polynomials: with |r| <= pi/4 the first
omitted terms are below 1e-11.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_TOKENS = 16


@triton.jit(do_not_specialize=["num_tokens"])
def yarn_kernel(
    positions_ptr,
    frequencies_ptr,
    cos_ptr,
    sin_ptr,
    num_tokens,
    half,
    concentration,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    pair = tl.arange(0, BLOCK_HALF)
    position = tl.load(positions_ptr + token, mask=token < num_tokens, other=0).to(tl.float32)
    frequency = tl.load(frequencies_ptr + pair, mask=pair < half, other=0.0)
    angle = (position[:, None] * frequency[None, :]).to(tl.float64)  # [BLOCK_TOKENS, BLOCK_HALF]
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = angle - quarters * 1.5707963267948966
    square = r * r
    sine = r * (
        1
        + square
        * (
            -1 / 6
            + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880 - square * (1 / 39916800))))
        )
    )
    cosine = 1 + square * (
        -1 / 2
        + square
        * (
            1 / 24
            + square * (-1 / 720 + square * (1 / 40320 + square * (-1 / 3628800 + square * (1 / 479001600))))
        )
    )
    quadrant = quarters.to(tl.int32) & 3
    swapped = (quadrant & 1) == 1
    cos = tl.where(swapped, sine, cosine)
    sin = tl.where(swapped, cosine, sine)
    cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos).to(tl.float32) * concentration
    sin = tl.where(quadrant >= 2, -sin, sin).to(tl.float32) * concentration
    at = token.to(tl.int64)[:, None] * half + pair[None, :]
    inside = (token < num_tokens)[:, None] & (pair < half)[None, :]
    tl.store(cos_ptr + at, cos, mask=inside)
    tl.store(sin_ptr + at, sin, mask=inside)


def cos_sin(positions: Tensor, frequencies: Tensor, concentration: float) -> tuple[Tensor, Tensor]:
    """Compute `kernels.pointwise.reference.cos_sin`; frequencies must be contiguous."""
    num_tokens, half = len(positions), len(frequencies)
    cos, sin = torch.empty(2, num_tokens, half, dtype=torch.float32, device=positions.device)
    if num_tokens:
        yarn_kernel[(triton.cdiv(num_tokens, BLOCK_TOKENS),)](
            positions.contiguous(),
            frequencies,
            cos,
            sin,
            num_tokens,
            half,
            concentration,
            BLOCK_TOKENS=BLOCK_TOKENS,
            BLOCK_HALF=triton.next_power_of_2(half),
        )
    return cos, sin
