# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""`x @ weight.T + bias` in fp32 for a few tokens and few outputs: the gate of the experts, from
bf16 activations in one launch.

A BLAS needs fp32 activations, and splits so long a sum over so few outputs into several launches.
Here a program computes a few outputs of a few tokens, its threads lie along the sum, and products
are added up elementwise before one reduction at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 4
"""Number of outputs per program: 32 programs for 128 experts, which read their weights in about a
microsecond."""
_FEW = {"BLOCK_M": 1, "BLOCK_K": 1024, "num_warps": 4}
_MANY = {"BLOCK_M": 8, "BLOCK_K": 256, "num_warps": 4}
"""Tiles for 8 or more tokens: weights are read from the L2 cache once for 8 tokens."""


@triton.jit(do_not_specialize=["num_tokens"])
def narrow_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, x_stride, num_tokens, num_outputs, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x_ptr + token.to(tl.int64)[:, None, None] * x_stride
    weight_rows = weight_ptr + output.to(tl.int64)[None, :, None] * width
    totals = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, width, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K))[None, None, :]
        x = tl.load(x_rows + k, mask=(token < num_tokens)[:, None, None] & (k < width), other=0.0).to(
            tl.float32
        )
        weight = tl.load(weight_rows + k, mask=(output < num_outputs)[None, :, None] & (k < width), other=0.0)
        totals += x * weight
    total = tl.sum(totals, axis=2)  # [BLOCK_M, BLOCK_N]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + output, mask=output < num_outputs, other=0.0)[None, :]
    inside = (token < num_tokens)[:, None] & (output < num_outputs)[None, :]
    tl.store(out_ptr + token.to(tl.int64)[:, None] * num_outputs + output[None, :], total, mask=inside)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `kernels.linear.reference.linear` for fp32 weights; arguments have been checked
    there.

    Raises:
        ValueError: names the argument whose rows are not contiguous.
    """
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"x must be contiguous in its last axis, got strides {list(x.stride())}")
    if not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous, got strides {list(weight.stride())}")
    num_tokens, num_outputs = x.shape[0], weight.shape[0]
    out = torch.empty(num_tokens, num_outputs, dtype=torch.float32, device=x.device)
    if out.numel():
        tile = tile_for(num_tokens)
        grid = (triton.cdiv(num_tokens, tile["BLOCK_M"]), triton.cdiv(num_outputs, BLOCK_N))
        narrow_linear_kernel[grid](
            x, weight, bias, out, x.stride(0), num_tokens, num_outputs, x.shape[1], BLOCK_N=BLOCK_N, **tile
        )
    return out


def tile_for(num_tokens: int) -> dict[str, int]:
    """Return the tile constants and the number of warps."""
    return _FEW if num_tokens < 8 else _MANY
