# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Grouped product of tokens in MXFP8 with MXFP4 experts in the layout `natural`, for hardware with
instructions for products of scaled blocks (sm_100, gfx950). Rounding activations to 8 bits changes
results, as defined by `kernels.moe.reference.round_to_mxfp8`.

Weights are the left operand: tcgen05 requires 128 rows there, and there are few tokens. The gate_up
product writes the input of the down product, rounded in its epilogue.

Follows: OCP Microscaling Formats (MX) Specification 1.0, section 6.3.
"""

import triton
import triton.language as tl

from kernels.moe.tiles import rows_to_write, swiglu, tile_rows


@triton.jit
def to_mxfp8(values):
    """Convert [..., 32] fp32 to e4m3 of that shape, and e8m0 scales without the last axis."""
    largest = tl.max(tl.abs(values), -1)
    # 2^(floor(log2(largest)) - 8), 8 being e4m3's largest exponent; at least 2^-126, whose inverse
    # is finite.
    exponents = tl.maximum((largest.to(tl.uint32, bitcast=True) >> 23).to(tl.int32) - 8, 1)
    inverse = ((254 - exponents) << 23).to(tl.float32, bitcast=True)
    scaled = tl.minimum(tl.maximum(values * tl.expand_dims(inverse, -1), -448.0), 448.0)
    return scaled.to(tl.float8e4nv), exponents.to(tl.uint8)


@triton.jit
def quantize_rows(x_ptr, values_ptr, scales_ptr, width, x_stride, BLOCK: tl.constexpr):
    """Quantise a row of activations, with one program for each BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + column, mask=column < width, other=0.0).to(tl.float32)
    values, scales = to_mxfp8(x.reshape(BLOCK // 32, 32))
    group = tl.program_id(1) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    tl.store(values_ptr + row * width + column, values.reshape(BLOCK), mask=column < width)
    tl.store(scales_ptr + row * (width // 32) + group, scales, mask=group < width // 32)


@triton.jit
def expert_matmul_mxfp8(
    x_ptr,
    x_scales_ptr,
    blocks_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    out_scales_ptr,
    tiles_ptr,
    pairs_ptr,
    row_weights_ptr,
    N,
    K,
    out_stride,
    top_k,
    alpha,
    limit,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATE_UP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    expert, x_rows, exists = tile_rows(tiles_ptr, pairs_ptr, top_k, BLOCK_M, GATE_UP)
    if tl.max(exists.to(tl.int32), 0) == 0:
        return
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Past the last row the last row is read again; its results are not stored. Offsets within an
    # expert fit in 32 bits.
    row = tl.minimum(n, N - 1)
    k = tl.arange(0, BLOCK_K)
    in_row, in_scales = tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_K // 32)
    block_ptrs = (
        blocks_ptr + expert * N * (K // 2) + (row[:, None] * (K // 2) + in_row[None, :])
    )  # [BLOCK_N, BLOCK_K / 2]
    scale_ptrs = (
        scales_ptr + expert * N * (K // 32) + (row[:, None] * (K // 32) + in_scales[None, :])
    )  # [BLOCK_N, BLOCK_K / 32]
    x_ptrs = x_ptr + x_rows[None, :] * K + k[:, None]  # [BLOCK_K, BLOCK_M]
    # [BLOCK_M, BLOCK_K / 32]
    x_scale_ptrs = x_scales_ptr + x_rows[:, None] * (K // 32) + in_scales[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        left = K - start
        x = tl.load(x_ptrs + start, mask=exists[None, :] & (k < left)[:, None], other=0.0)
        x_scales = tl.load(
            x_scale_ptrs + start // 32, mask=exists[:, None] & (in_scales < left // 32)[None, :], other=0
        )
        weights = tl.load(block_ptrs + start // 2, mask=(in_row < left // 2)[None, :], other=0)
        scales = tl.load(scale_ptrs + start // 32, mask=(in_scales < left // 32)[None, :], other=0)
        total = tl.dot_scaled(weights, scales, "e2m1", x, x_scales, "e4m3", acc=total)
    out_rows, pairs, exists = rows_to_write(tiles_ptr, pairs_ptr, BLOCK_M, GATE_UP)
    total = total.T + tl.load(bias_ptr + expert * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATE_UP:
        gate, up = total.reshape(BLOCK_M, BLOCK_N // 2, 2).split()
        groups = swiglu(gate, up, alpha, limit).reshape(BLOCK_M, BLOCK_N // 64, 32)
        values, out_scales = to_mxfp8(groups)
        column = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        group = tl.program_id(0) * (BLOCK_N // 64) + tl.arange(0, BLOCK_N // 64)
        out_ptrs = out_ptr + out_rows[:, None] * out_stride + column[None, :]
        tl.store(
            out_ptrs, values.reshape(BLOCK_M, BLOCK_N // 2), mask=exists[:, None] & (column < N // 2)[None, :]
        )
        out_scale_ptrs = out_scales_ptr + out_rows[:, None] * (out_stride // 32) + group[None, :]
        tl.store(out_scale_ptrs, out_scales, mask=exists[:, None] & (group < N // 64)[None, :])
    else:
        out = total * tl.load(row_weights_ptr + pairs, mask=exists, other=0.0)[:, None]
        out_ptrs = out_ptr + out_rows[:, None] * out_stride + n[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=exists[:, None] & (n < N)[None, :])
