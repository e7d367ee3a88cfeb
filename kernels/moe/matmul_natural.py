# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Grouped product of tokens with experts whose rows are stored as in checkpoints: MXFP4 in the
layout `natural`, or dense.

    out[row] = SwiGLU(W[e] x[token] + bias[e])              for the gate_up product
    out[pair] = gate weight * (W[e] x[row] + bias[e])       for the down product

MXFP4 goes through `tl.dot_scaled`, which compiles to decoding instructions or bit operations and a
bf16 product, depending on the hardware; with fp32 activations it is decoded here, exactly, and
multiplied in fp32.
"""

import triton
import triton.language as tl

from kernels.moe.tiles import rows_to_write, swiglu, tile_rows


@triton.jit
def decode_e2m1(blocks, exponents, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Decode uint8 [BLOCK_N, BLOCK_K / 2], two values each, and e8m0 [BLOCK_N, BLOCK_K / 32] to
    fp32 [BLOCK_N, BLOCK_K]."""
    codes = tl.join(blocks & 15, blocks >> 4).reshape(BLOCK_N, BLOCK_K).to(tl.uint32)
    # As an fp32 number that is too small by 2^126; the scale's exponent 0 is a subnormal, half of
    # 2^-126.
    values = (((codes & 8) << 28) | ((codes & 7) << 22)).to(tl.float32, bitcast=True) * 2.0**126
    exponents = exponents.to(tl.uint32)
    scales = tl.where(exponents == 0, 1 << 22, exponents << 23).to(tl.float32, bitcast=True)
    scales = tl.broadcast_to(scales[:, :, None], (BLOCK_N, BLOCK_K // 32, 32)).reshape(BLOCK_N, BLOCK_K)
    return values * scales


@triton.jit
def expert_matmul_natural(
    x_ptr,
    blocks_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    tiles_ptr,
    pairs_ptr,
    row_weights_ptr,
    N,
    K,
    x_stride,
    out_stride,
    top_k,
    alpha,
    limit,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATE_UP: tl.constexpr,
    PACKED: tl.constexpr,
    EVEN_K: tl.constexpr,
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
    if PACKED:
        block_ptrs = (
            blocks_ptr + expert * N * (K // 2) + (row[:, None] * (K // 2) + in_row[None, :])
        )  # [BLOCK_N, BLOCK_K / 2]
        scale_ptrs = (
            scales_ptr + expert * N * (K // 32) + (row[:, None] * (K // 32) + in_scales[None, :])
        )  # [BLOCK_N, BLOCK_K / 32]
    else:
        # [BLOCK_N, BLOCK_K]
        block_ptrs = blocks_ptr + expert * N * K + (row[:, None] * K + k[None, :])
    x_ptrs = x_ptr + x_rows[:, None] * x_stride + k[None, :]  # [BLOCK_M, BLOCK_K]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        left = K - start
        if EVEN_K:
            x = tl.load(x_ptrs + start, mask=exists[:, None], other=0.0)
        else:
            x = tl.load(x_ptrs + start, mask=exists[:, None] & (k < left)[None, :], other=0.0)
        if PACKED:
            weights = tl.load(block_ptrs + start // 2, mask=(in_row < left // 2)[None, :], other=0)
            exponents = tl.load(scale_ptrs + start // 32, mask=(in_scales < left // 32)[None, :], other=0)
        elif EVEN_K:
            weights = tl.load(block_ptrs + start)
        else:
            weights = tl.load(block_ptrs + start, mask=(k < left)[None, :], other=0.0)
        if PACKED and x.dtype != tl.float32:
            total = tl.dot_scaled(x, None, "bf16", weights.T, exponents, "e2m1", acc=total, fast_math=True)
        else:
            if PACKED:
                weights = decode_e2m1(weights, exponents, BLOCK_N, BLOCK_K)
            total = tl.dot(x, weights.T, total, input_precision="ieee")
    out_rows, pairs, exists = rows_to_write(tiles_ptr, pairs_ptr, BLOCK_M, GATE_UP)
    total += tl.load(bias_ptr + expert * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATE_UP:
        gate, up = total.reshape(BLOCK_M, BLOCK_N // 2, 2).split()
        out = swiglu(gate, up, alpha, limit)  # [BLOCK_M, BLOCK_N / 2]
        n = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        num_columns = N // 2
    else:
        out = total * tl.load(row_weights_ptr + pairs, mask=exists, other=0.0)[:, None]
        num_columns = N
    out_ptrs = out_ptr + out_rows[:, None] * out_stride + n[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=exists[:, None] & (n < num_columns)[None, :])
