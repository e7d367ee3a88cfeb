# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Grouped product of tokens with MXFP4 experts in the layout `wgmma.v1` (`kernels/mxfp4/wgmma.py`).
Weights are the left operand, which wgmma takes from registers, so they go from memory through
shared memory into registers, are decoded there and used.

    out[row] = SwiGLU(W[e] x[token] + bias[e])              for the gate_up product
    out[pair] = gate weight * (W[e] x[row] + bias[e])       for the down product

The 16 bytes of a thread, one load, are its fragments of four matrix instructions.
"""

import triton
import triton.language as tl

from kernels.moe.tiles import rows_to_write, swiglu, tile_rows

DECODE = tl.constexpr("""{ // mxfp4x8_bf16
    .reg .b32 r, s;
    and.b32 $0, $4, 0x81C081C0;
    mul.bf16x2 $0, $0, $5;
    shl.b32 r, $4, 4;
    and.b32 $1, r, 0x81C081C0;
    mul.bf16x2 $1, $1, $6;
    shf.l.wrap.b32 r, $4, $4, 10;
    and.b32 $2, r, 0x81C081C0;
    mul.bf16x2 $2, $2, $5;
    shl.b32 r, $4, 6;
    and.b32 r, r, 0x80C080C0;
    shf.l.wrap.b32 s, $4, $4, 14;
    and.b32 s, s, 0x01000100;
    or.b32 $3, r, s;
    mul.bf16x2 $3, $3, $6;
}""")
"""Assembly that decodes one word of 8 values ($4), with the scales of its even ($5) and odd row
($6), each twice in a register, to the registers of a fragment."""


@triton.jit
def bf16_pair(register):
    """Convert uint32 to [..., 2] bf16, the low half first. It compiles to nothing: both halves are
    already in place."""
    low = register.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (register >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def decode(words, exponents, STRIPS: tl.constexpr, CHUNKS: tl.constexpr):
    """Decode uint32 [STRIPS, CHUNKS * 128] and uint8 [STRIPS, CHUNKS * 32] to bf16 [STRIPS * 16,
    CHUNKS * 64]. Within a strip the even rows come first, as in the layout's fragments."""
    scales = exponents.to(tl.uint32) << 7  # bf16
    scales = (
        (scales | (scales << 16)).reshape(STRIPS, CHUNKS, 8, 2, 2).trans(0, 1, 2, 4, 3)
    )  # strip, chunk, g, group, parity
    even, odd = scales.reshape(STRIPS, CHUNKS, 8, 1, 2, 1, 2).split()
    even = tl.broadcast_to(even, (STRIPS, CHUNKS, 8, 4, 2, 2)).reshape(STRIPS, CHUNKS * 128)
    odd = tl.broadcast_to(odd, (STRIPS, CHUNKS, 8, 4, 2, 2)).reshape(STRIPS, CHUNKS * 128)
    # One word at a time: Triton does not define which elements of a tensor it passes to a piece of
    # assembly that takes several.
    r0, r1, r2, r3 = tl.inline_asm_elementwise(
        DECODE,
        "=r,=r,=r,=r,r,r,r",
        [words, even, odd],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )
    left, right = tl.join(bf16_pair(r0), bf16_pair(r1)), tl.join(bf16_pair(r2), bf16_pair(r3))
    # strip, chunk, g, t, fragment, value, parity, column half → rows (strip, parity, g), columns
    # (chunk, fragment, half, t, value)
    weights = tl.join(left, right).reshape(STRIPS, CHUNKS, 8, 4, 4, 2, 2, 2)
    return weights.trans(0, 6, 2, 1, 4, 7, 3, 5).reshape(STRIPS * 16, CHUNKS * 64)


@triton.jit
def expert_matmul_wgmma(
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
    NUM_STAGES: tl.constexpr,
):
    STRIPS: tl.constexpr = BLOCK_N // 16
    CHUNKS: tl.constexpr = BLOCK_K // 64
    expert, x_rows, exists = tile_rows(tiles_ptr, pairs_ptr, top_k, BLOCK_M, GATE_UP)
    if tl.max(exists.to(tl.int32), 0) == 0:
        return
    num_strips = tl.cdiv(N, 16)
    num_chunks = tl.cdiv(K, 64)
    # Past the last strip the last strip is read again; its results are not stored. Offsets within
    # an expert fit in 32 bits.
    strip = tl.minimum(tl.program_id(0) * STRIPS + tl.arange(0, STRIPS), num_strips - 1)
    k = tl.arange(0, BLOCK_K)
    in_words, in_scales = tl.arange(0, CHUNKS * 128), tl.arange(0, CHUNKS * 32)
    first_chunk = strip[:, None] * num_chunks
    words_ptr = blocks_ptr.to(tl.pointer_type(tl.uint32)) + expert * num_strips * num_chunks * 128
    word_ptrs = words_ptr + (first_chunk * 128 + in_words[None, :])  # [STRIPS, CHUNKS * 128]
    scale_ptrs = (
        scales_ptr + expert * num_strips * num_chunks * 32 + (first_chunk * 32 + in_scales[None, :])
    )  # [STRIPS, CHUNKS * 32]
    x_ptrs = x_ptr + x_rows[None, :] * x_stride + k[:, None]  # [BLOCK_K, BLOCK_M]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for chunk in tl.range(0, num_chunks, CHUNKS, num_stages=NUM_STAGES):
        left = num_chunks - chunk
        words = tl.load(word_ptrs + chunk * 128, mask=(in_words < left * 128)[None, :], other=0)
        exponents = tl.load(scale_ptrs + chunk * 32, mask=(in_scales < left * 32)[None, :], other=0)
        x = tl.load(x_ptrs + chunk * 64, mask=exists[None, :] & (k < K - chunk * 64)[:, None], other=0.0)
        weights = decode(words, exponents, STRIPS, CHUNKS)
        if x.dtype == tl.float32:
            total = tl.dot(weights.to(tl.float32), x, total, input_precision="ieee")
        else:
            total = tl.dot(weights, x, total)
    out_rows, pairs, exists = rows_to_write(tiles_ptr, pairs_ptr, BLOCK_M, GATE_UP)
    # Row 2i of an expert and its row 2i + 1 are in the same thread.
    even, odd = total.reshape(STRIPS, 2, 8, BLOCK_M).trans(0, 2, 3, 1).split()
    even, odd = even.reshape(BLOCK_N // 2, BLOCK_M), odd.reshape(BLOCK_N // 2, BLOCK_M)
    half = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    bias_ptrs = bias_ptr + expert * N + half * 2
    even += tl.load(bias_ptrs, mask=half * 2 < N, other=0.0).to(tl.float32)[:, None]
    odd += tl.load(bias_ptrs + 1, mask=half * 2 + 1 < N, other=0.0).to(tl.float32)[:, None]
    if GATE_UP:
        out = swiglu(even, odd, alpha, limit)  # [BLOCK_N / 2, BLOCK_M]
        out_ptrs = out_ptr + out_rows[None, :] * out_stride + half[:, None]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=exists[None, :] & (half * 2 < N)[:, None])
    else:
        row_weights = tl.load(row_weights_ptr + pairs, mask=exists, other=0.0)
        out = tl.join(even, odd).trans(0, 2, 1).reshape(BLOCK_N, BLOCK_M) * row_weights[None, :]
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        out_ptrs = out_ptr + out_rows[None, :] * out_stride + n[:, None]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=exists[None, :] & (n < N)[:, None])
