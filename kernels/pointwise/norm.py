# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""RMSNorm, alone or of the residual stream after an addition to it: `x / sqrt(mean(x^2) + eps) *
weight` over rows.

There is one program per row, which holds the row in registers: each element is read and written
once. fp32 inside; the sum of a residual and a delta is rounded to the stream's dtype before the
norm uses it, as in the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.pointwise import reference

MAX_WIDTH = 16384
"""Maximum number of elements in a row, which must fit into the registers of one program."""


@triton.jit
def norm_row(x, weight_ptr, at, in_row, width, eps):
    """Return the norm of [BLOCK] fp32, in fp32; elements outside the row are 0."""
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    return tl.load(weight_ptr + at, mask=in_row, other=0.0).to(tl.float32) * (x * scale)


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, x_stride, out_stride, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    in_row = at < width
    x = tl.load(x_ptr + row * x_stride + at, mask=in_row, other=0.0).to(tl.float32)  # [BLOCK]
    normed = norm_row(x, weight_ptr, at, in_row, width, eps)
    tl.store(out_ptr + row * out_stride + at, normed.to(out_ptr.dtype.element_ty), mask=in_row)


@triton.jit
def add_rms_norm_kernel(
    residual_ptr,
    delta_ptr,
    weight_ptr,
    out_ptr,
    residual_stride,
    delta_stride,
    out_stride,
    width,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    in_row = at < width
    residual = tl.load(residual_ptr + row * residual_stride + at, mask=in_row, other=0.0).to(
        tl.float32
    )  # [BLOCK]
    delta = tl.load(delta_ptr + row * delta_stride + at, mask=in_row, other=0.0).to(tl.float32)
    total = (residual + delta).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + row * residual_stride + at, total, mask=in_row)
    normed = norm_row(total.to(tl.float32), weight_ptr, at, in_row, width, eps)
    tl.store(out_ptr + row * out_stride + at, normed.to(out_ptr.dtype.element_ty), mask=in_row)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `kernels.pointwise.reference.rms_norm`.

    Raises:
        ValueError: the last axis of x or weight is not contiguous, or wider than MAX_WIDTH.
    """
    reference.check_rms_norm(x, weight)
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    check_layout(x=rows, weight=weight)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.numel():
        rms_norm_kernel[(rows.shape[0],)](rows, weight, out, rows.stride(0), width, width, eps, **tile(width))
    return out


def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `kernels.pointwise.reference.add_rms_norm`. `residual` is overwritten and returned.

    Raises:
        ValueError: as in `rms_norm`.
    """
    reference.check_add_rms_norm(residual, delta, weight)
    check_layout(residual=residual, delta=delta, weight=weight)
    num_rows, width = residual.shape
    normed = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    if residual.numel():
        add_rms_norm_kernel[(num_rows,)](
            residual,
            delta,
            weight,
            normed,
            residual.stride(0),
            delta.stride(0),
            width,
            width,
            eps,
            **tile(width),
        )
    return residual, normed


def tile(width: int) -> dict[str, int]:
    """Return the tile: one vector load per thread and tensor up to 2048 elements; 8 warps beyond,
    so that a batch of one row has enough bytes in flight."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 8)}


def check_layout(**tensors: Tensor) -> None:
    """Refuse rows that a program cannot hold or read.

    Raises:
        ValueError: names the argument.
    """
    for name, tensor in tensors.items():
        if tensor.shape[-1] > MAX_WIDTH:
            raise ValueError(f"{name} must be at most {MAX_WIDTH} wide, got {tensor.shape[-1]}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last axis, got strides {list(tensor.stride())}"
            )
