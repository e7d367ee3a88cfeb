# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Embedding lookup of the rows that a rank holds: a copy, or zeros for tokens of other ranks. There
is one program for each token and piece of its row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Number of elements per program: one 128-bit load for each thread of 4 warps in bf16."""


@triton.jit(do_not_specialize=["first_id", "num_rows"])
def embed_kernel(
    token_ids_ptr, weight_ptr, out_ptr, weight_stride, first_id, num_rows, width, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(token_ids_ptr + token) - first_id
    here = (row >= 0) & (row < num_rows)
    # [BLOCK]
    values = tl.load(weight_ptr + row * weight_stride + at, mask=(at < width) & here, other=0.0)
    tl.store(out_ptr + token * width + at, values, mask=at < width)


def embed(token_ids: Tensor, weight: Tensor, first_id: int) -> Tensor:
    """Compute `kernels.embedding.reference.embed`; arguments have been checked there.

    Raises:
        ValueError: weight is not contiguous in its last axis.
    """
    num_rows, width = weight.shape
    if width > 1 and weight.stride(1) != 1:
        raise ValueError(f"weight must be contiguous in its last axis, got strides {list(weight.stride())}")
    out = torch.empty(len(token_ids), width, dtype=weight.dtype, device=weight.device)
    if out.numel():
        grid = (len(token_ids), triton.cdiv(width, BLOCK))
        embed_kernel[grid](
            token_ids.contiguous(), weight, out, weight.stride(0), first_id, num_rows, width, BLOCK=BLOCK
        )
    return out
