# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Attention over the paged KV cache in Triton, for prefill chunks and decodes in one launch.

    out = sum_j p_j v_j / (sum_j p_j + exp(sink)),  p_j = exp(scale * q·k_j), j over the
    visible keys, in tiles with a running maximum
    (FlashAttention-2, arXiv 2307.08691)

The rows of a tile are (query, head of the KV head's group) pairs, so a key is read once for all
heads that share it. There are two kinds of Triton program, distinguished by their number:

- prefill tiles: BLOCK_M // GROUP queries of a sequence that has more than one, over all keys that
  they see. Tiles of keys that every row sees are taken without masks, those at the diagonal after
  them; with a window, which is a few tiles, all are masked. The sink is the first key, of weight 1
  and without a value.
- decode splits: the one query of a sequence over a part of its context. The sums of several splits
  meet in `_merge_splits`, where the sink counts too, in the sum and in its maximum. A context that
  is one split is finished at once, as a prefill tile is.

The tile or split of a key depends on its sequence alone, so a result does not depend on the batch.
Nothing depends on data that the host would have to read: the number of programs follows from shapes
and `max_query_len`, and surplus programs end at once. A sequence's first tile is found as in vLLM's
unified attention: cu_seqlens_q[s] // queries + s, which leaves each sequence room for a partial
tile.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.fp8 import FP8
from kernels.attention.reference import check_attention, check_lengths
from kernels.backend import architecture, checks_indices
from kernels.formats import fp8_refusal

LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.0e38)

MIN_SPLIT = 256
"""Minimum number of keys in a split: 64 KiB of K and V in bf16, to which the sums that a split
leaves add 6 %."""
PROGRAMS_OF_A_DECODE = 256
"""Maximum number of programs of a decode, over all splits and KV heads: two for each processor of
an H100."""
MAX_GROUP = 128
"""Maximum number of query heads per KV head; each query takes that many rows of a tile."""
MIN_PROGRAMS = 4
"""Minimum number of programs per decode and KV head in a batch that fills the GPU anyway, so that
one long context among short ones does not wait for a single program."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile constants.

    Attributes:
        block_m: rows of a prefill tile.
        block_n, decode_n: keys of a tile, in prefill and in decode.
        max_registers: maximum number of registers per thread; None for the compiler's choice.
    """

    block_m: int
    block_n: int
    decode_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


_SAFE = Tiles(64, 32, 32, num_warps=4, num_stages=2)
"""Tiles for all unknown cases: at most 24 KiB of shared memory at a head_dim of 64 in 16 bits, no
spills on any target. Not pipelined."""
_SMALL = Tiles(32, 16, 16, num_warps=4, num_stages=2)
"""Tiles for heads so large that few of them fit into shared memory."""
_FULL = Tiles(128, 64, 128, num_warps=8, num_stages=3, max_registers=128)
_WINDOWED = Tiles(128, 64, 64, num_warps=8, num_stages=3, max_registers=128)
_WINDOWED_BLACKWELL = Tiles(64, 64, 64, num_warps=8, num_stages=3)
_AMPERE = Tiles(64, 32, 64, num_warps=4, num_stages=3)
_AMD = Tiles(64, 64, 64, num_warps=4, num_stages=2)
_TILES = {
    # (without, with a window), from the kernel report. Two programs of 8 warps and 128 registers
    # fit one of NVIDIA's processors. With a window 128 rows spill on sm_100; on sm_90 8 warps on 64
    # rows compute every weight twice.
    "sm_80": (_AMPERE, _AMPERE),
    "sm_86": (_AMPERE, _AMPERE),
    "sm_89": (_AMPERE, _AMPERE),
    "sm_90": (_FULL, _WINDOWED),
    "sm_100": (_FULL, _WINDOWED_BLACKWELL),
    "sm_103": (_FULL, _WINDOWED_BLACKWELL),
    "sm_120": (_AMPERE, _AMPERE),
    "gfx942": (_AMD, _AMD),
    "gfx950": (_AMD, _AMD),
}


def choose_tiles(target: str, dtype: torch.dtype, head_dim: int, window: int | None) -> Tiles:
    """Return the tile constants for an architecture. They do not depend on the batch, so neither do
    results.

    Args:
        target: architecture, as `kernels.backend.architecture` names it.
        dtype: dtype of the queries.
    """
    if dtype.itemsize > 2 or head_dim > 64:  # tests, and models other than gpt-oss
        return _SAFE if head_dim * dtype.itemsize <= 256 else _SMALL
    return _TILES.get(target, (_SAFE, _SAFE))[window is not None]


@triton.jit
def _sequence_of_tile(cu_seqlens_ptr, tile, num_seqs, QUERIES: tl.constexpr):
    """Return the last sequence whose first tile is not after `tile`."""
    seq = -1
    for base in range(0, num_seqs, 128):
        index = base + tl.arange(0, 128)
        first_tile = tl.load(cu_seqlens_ptr + index, mask=index < num_seqs, other=0) // QUERIES + index
        seq += tl.sum(((first_tile <= tile) & (index < num_seqs)).to(tl.int32))
    return seq


@triton.jit
def _splits(context_len, first_key, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Return (keys of a split, number of splits) of the decode that sees first_key ..
    context_len."""
    num_keys = context_len - first_key
    split_len = tl.cdiv(tl.maximum(num_keys, 1), MAX_SPLITS * MIN_SPLIT) * MIN_SPLIT
    return split_len, tl.cdiv(num_keys, split_len)


@triton.jit
def _first_key(position, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """Return the start of a query's key tiles: that of the tile with the oldest key visible to
    it."""
    if WINDOW > 0:
        return tl.maximum(position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    return position * 0


@triton.jit
def _convert(x, dtype: tl.constexpr):
    """Return keys or values [BLOCK_N, BLOCK_D] in the form that the matrix product takes.

    The sum over an axis of length 1 compiles to no instruction, but the compiler does not carry the
    product's register layout back to the load across it. Otherwise fp8 would be loaded in 8 or 4
    bytes per thread, values would come byte by byte from shared memory, and each warp would convert
    the data that all of them need.
    """
    if x.dtype == tl.float8e4nv:
        return tl.sum(tl.reshape(x.to(dtype), (x.shape[0], 1, x.shape[1])), 1)
    return x.to(dtype)


@triton.jit
def _key_tile(
    q,  # [ROWS, BLOCK_D]
    sums,  # [ROWS, BLOCK_D] fp32
    maximum,  # [ROWS] fp32, base 2
    total,  # [ROWS] fp32
    start,
    position,  # [ROWS], position of each row's query
    oldest_key,
    end_key,
    k_ptr,  # base at this KV head
    v_ptr,
    table_ptr,  # base at this sequence
    log2_scale,
    SLOT: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the keys start .. start + BLOCK_N. With MASKED, a row counts only the keys that it sees,
    and only oldest_key .. end_key are read."""
    key = start + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    if MASKED:
        stored = (key >= oldest_key) & (key < end_key)
        block = tl.load(table_ptr + key // PAGE, mask=stored, other=0)
    else:
        block = tl.load(table_ptr + key // PAGE)
    offset = (block.to(tl.int64) * PAGE + key % PAGE)[:, None] * SLOT + dim[None, :]
    if MASKED:
        # Memory that was never written may be NaN, which weights of 0 would not remove.
        needed = stored[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + offset, mask=needed, other=0.0)  # [BLOCK_N, BLOCK_D]
        v = tl.load(v_ptr + offset, mask=needed, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        k = tl.load(k_ptr + offset, mask=(dim < HEAD_DIM)[None, :], other=0.0)
        v = tl.load(v_ptr + offset, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    else:
        k = tl.load(k_ptr + offset)
        v = tl.load(v_ptr + offset)
    k = _convert(k, q.dtype)
    v = _convert(v, q.dtype)
    scores = tl.dot(q, k.T, input_precision="ieee")  # [ROWS, BLOCK_N]
    if MASKED:
        visible = (key[None, :] <= position[:, None]) & stored[None, :]
        if WINDOW > 0:
            visible &= key[None, :] > position[:, None] - WINDOW
        scores = tl.where(visible, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * log2_scale)
    weights = tl.exp2(tl.fma(scores, log2_scale, -new_maximum[:, None]))
    shrink = tl.exp2(maximum - new_maximum)
    total = total * shrink + tl.sum(weights, 1)
    sums = tl.dot(weights.to(q.dtype), v, sums * shrink[:, None], input_precision="ieee")
    return sums, new_maximum, total


@triton.jit
def _attend_keys(
    q,
    maximum,  # [ROWS] fp32, at the start of the softmax, as `total`
    total,
    start,
    end_key,
    seen_by_all,  # keys before this one are visible to all rows
    position,
    oldest_key,
    k_ptr,
    v_ptr,
    table_ptr,
    log2_scale,
    SLOT: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    ONE_QUERY: tl.constexpr,
):
    """Add the keys start .. end_key; start is a multiple of BLOCK_N. Return (sums [ROWS, BLOCK_D],
    maximum, total)."""
    sums = tl.zeros((q.shape[0], BLOCK_D), tl.float32)
    if WINDOW == 0:
        masked_from = tl.maximum(seen_by_all // BLOCK_N * BLOCK_N, start)
        for at in range(start, masked_from, BLOCK_N):
            sums, maximum, total = _key_tile(
                q, sums, maximum, total, at, position, oldest_key, end_key, k_ptr, v_ptr, table_ptr,
                log2_scale,
                SLOT, PAGE, HEAD_DIM, BLOCK_D, BLOCK_N, WINDOW, False,
            )  # fmt: skip
        start = masked_from
    # Without a window one or two tiles are left: not worth the registers of a pipeline, or, for a
    # decode, even a loop.
    if WINDOW == 0 and ONE_QUERY:
        if start < end_key:
            sums, maximum, total = _key_tile(
                q, sums, maximum, total, start, position, oldest_key, end_key, k_ptr, v_ptr, table_ptr,
                log2_scale,
                SLOT, PAGE, HEAD_DIM, BLOCK_D, BLOCK_N, WINDOW, True,
            )  # fmt: skip
    else:
        for at in tl.range(start, end_key, BLOCK_N, num_stages=1 if WINDOW == 0 else None):
            sums, maximum, total = _key_tile(
                q, sums, maximum, total, at, position, oldest_key, end_key, k_ptr, v_ptr, table_ptr,
                log2_scale,
                SLOT, PAGE, HEAD_DIM, BLOCK_D, BLOCK_N, WINDOW, True,
            )  # fmt: skip
    return sums, maximum, total


@triton.jit
def _load_sinks(sinks_ptr, head, mask):
    """Return the sinks in base 2, kept finite."""
    return tl.clamp(tl.load(sinks_ptr + head, mask=mask, other=0.0).to(tl.float32) * LOG2E, -LARGEST, LARGEST)


@triton.jit
def _load_queries(
    q_ptr, row, stride, head, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FROM_FP8: tl.constexpr
):
    """Return the queries [ROWS, BLOCK_D], zeros where masked or past HEAD_DIM."""
    dim = tl.arange(0, BLOCK_D)
    pointers = q_ptr + row.to(tl.int64)[:, None] * stride + head[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(pointers, mask=mask[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    if FROM_FP8 and q.dtype == tl.bfloat16:
        # fp16 holds every fp8 key and value, and one instruction converts to it. It cuts off
        # queries only at magnitudes that no model has.
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    return q


@triton.jit(
    do_not_specialize=["num_tiles", "num_programs", "num_seqs", "max_blocks", "max_splits"],
    do_not_specialize_on_alignment=[
        "table_ptr",
        "context_lens_ptr",
        "cu_seqlens_ptr",
        "sinks_ptr",
        "scales_ptr",
    ],
)
def _attend(
    q_ptr,  # [T, KV * GROUP, HEAD_DIM]
    kv_ptr,  # [2, blocks, PAGE, KV, HEAD_DIM]
    scales_ptr,  # [2, KV] fp32, or None
    table_ptr,  # [S, max_blocks] int32
    context_lens_ptr,  # [S] int32
    cu_seqlens_ptr,  # [S + 1] int32
    sinks_ptr,  # [KV * GROUP]
    out_ptr,  # [T, KV * GROUP, HEAD_DIM]
    partial_ptr,  # [S, KV * GROUP, max_splits, HEAD_DIM] fp32
    stats_ptr,  # [2, S, KV * GROUP, max_splits] fp32: maxima, totals
    scale,
    q_stride,
    v_offset,
    num_tiles,  # prefill programs per KV head
    num_programs,  # programs per decode and KV head
    num_seqs,
    max_blocks,
    max_splits,
    KV: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DECODE_N: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    kv_head = tl.program_id(0) % KV
    work = tl.program_id(0) // KV
    SLOT: tl.constexpr = KV * HEAD_DIM
    FROM_FP8: tl.constexpr = kv_ptr.dtype.element_ty == tl.float8e4nv
    k_ptr = kv_ptr + kv_head * HEAD_DIM
    v_ptr = k_ptr + v_offset
    log2_scale = scale * LOG2E
    if scales_ptr is not None:
        log2_scale *= tl.load(scales_ptr + kv_head)
    dim = tl.arange(0, BLOCK_D)
    if work < num_tiles:
        # The last tile of a sequence sees most keys, so it starts first.
        tile = num_tiles - 1 - work
        QUERIES: tl.constexpr = BLOCK_M // GROUP
        seq = _sequence_of_tile(cu_seqlens_ptr, tile, num_seqs, QUERIES)
        first_row = tl.load(cu_seqlens_ptr + seq)
        num_queries = tl.load(cu_seqlens_ptr + seq + 1) - first_row
        context_len = tl.load(context_lens_ptr + seq)
        first_query = (tile - first_row // QUERIES - seq) * QUERIES
        if (num_queries > 1) & (first_query < num_queries):
            r = tl.arange(0, BLOCK_M)
            query = first_query + r // GROUP
            head = kv_head * GROUP + r % GROUP
            real = (query < num_queries) & (r < QUERIES * GROUP)
            first_position = context_len - num_queries + first_query
            position = first_position + r // GROUP
            oldest_key = tl.maximum(first_position - WINDOW + 1, 0) if WINDOW > 0 else 0
            v_scale = 1.0 if scales_ptr is None else tl.load(scales_ptr + KV + kv_head)
            q = _load_queries(q_ptr, first_row + query, q_stride, head, real, HEAD_DIM, BLOCK_D, FROM_FP8)
            sums, _, total = _attend_keys(
                q,
                _load_sinks(sinks_ptr, head, real),
                tl.full((BLOCK_M,), 1.0, tl.float32),
                _first_key(first_position, BLOCK_N, WINDOW),
                tl.minimum(first_position + QUERIES, context_len),
                first_position + 1,
                position,
                oldest_key,
                k_ptr,
                v_ptr,
                table_ptr + seq.to(tl.int64) * max_blocks,
                log2_scale,
                SLOT,
                PAGE,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_N,
                WINDOW,
                False,
            )
            out = sums * (v_scale / total)[:, None]
            pointers = (
                out_ptr
                + ((first_row + query).to(tl.int64) * (KV * GROUP) + head)[:, None] * HEAD_DIM
                + dim[None, :]
            )
            tl.store(
                pointers, out.to(out_ptr.dtype.element_ty), mask=real[:, None] & (dim < HEAD_DIM)[None, :]
            )
    else:
        seq = (work - num_tiles) // num_programs
        first_split = (work - num_tiles) % num_programs
        row = tl.load(cu_seqlens_ptr + seq)
        if tl.load(cu_seqlens_ptr + seq + 1) - row == 1:
            context_len = tl.load(context_lens_ptr + seq)
            g = tl.arange(0, BLOCK_G)
            real = g < GROUP
            head = kv_head * GROUP + g
            position = tl.zeros((BLOCK_G,), tl.int32) + (context_len - 1)
            oldest_key = tl.maximum(context_len - WINDOW, 0) if WINDOW > 0 else 0
            start_key = _first_key(context_len - 1, DECODE_N, WINDOW)
            split_len, num_splits = _splits(context_len, start_key, MIN_SPLIT, MAX_SPLITS)
            q = _load_queries(
                q_ptr, tl.zeros((BLOCK_G,), tl.int32) + row, q_stride, head, real, HEAD_DIM, BLOCK_D, FROM_FP8
            )
            sink = _load_sinks(sinks_ptr, head, real)
            for split in range(first_split, num_splits, num_programs):
                end_split = tl.minimum(start_key + (split + 1) * split_len, context_len)
                sums, maximum, total = _attend_keys(
                    q,
                    tl.where(num_splits == 1, sink, float("-inf")),
                    tl.zeros((BLOCK_G,), tl.float32) + tl.where(num_splits == 1, 1.0, 0.0),
                    start_key + split * split_len,
                    end_split,
                    end_split,
                    position,
                    oldest_key,
                    k_ptr,
                    v_ptr,
                    table_ptr + seq.to(tl.int64) * max_blocks,
                    log2_scale,
                    SLOT,
                    PAGE,
                    HEAD_DIM,
                    BLOCK_D,
                    DECODE_N,
                    WINDOW,
                    True,
                )
                v_scale = 1.0 if scales_ptr is None else tl.load(scales_ptr + KV + kv_head)
                mask = real[:, None] & (dim < HEAD_DIM)[None, :]
                if num_splits == 1:
                    out = sums * (v_scale / total)[:, None]
                    pointers = (
                        out_ptr + (row.to(tl.int64) * (KV * GROUP) + head)[:, None] * HEAD_DIM + dim[None, :]
                    )
                    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=mask)
                else:
                    at = (seq.to(tl.int64) * (KV * GROUP) + head) * max_splits + split
                    tl.store(partial_ptr + at[:, None] * HEAD_DIM + dim[None, :], sums * v_scale, mask=mask)
                    tl.store(stats_ptr + at, maximum, mask=real)
                    tl.store(
                        stats_ptr + num_seqs.to(tl.int64) * (KV * GROUP) * max_splits + at, total, mask=real
                    )


@triton.jit(
    do_not_specialize=["max_splits", "num_seqs"],
    do_not_specialize_on_alignment=["context_lens_ptr", "cu_seqlens_ptr", "sinks_ptr"],
)
def _merge_splits(
    partial_ptr,
    stats_ptr,
    context_lens_ptr,
    cu_seqlens_ptr,
    sinks_ptr,
    out_ptr,
    num_seqs,
    max_splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DECODE_N: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Add up the splits of one decode and query head, one program for each."""
    seq = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    row = tl.load(cu_seqlens_ptr + seq)
    context_len = tl.load(context_lens_ptr + seq)
    num_splits = _splits(context_len, _first_key(context_len - 1, DECODE_N, WINDOW), MIN_SPLIT, MAX_SPLITS)[1]
    if (tl.load(cu_seqlens_ptr + seq + 1) - row == 1) & (num_splits > 1):
        split = tl.arange(0, MAX_SPLITS)
        dim = tl.arange(0, BLOCK_D)
        at = tl.program_id(0).to(tl.int64) * max_splits + split
        real = split < num_splits
        maximum = tl.load(stats_ptr + at, mask=real, other=float("-inf"))
        total = tl.load(stats_ptr + num_seqs.to(tl.int64) * HEADS * max_splits + at, mask=real, other=0.0)
        mask = real[:, None] & (dim < HEAD_DIM)[None, :]
        sums = tl.load(partial_ptr + at[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
        sink = _load_sinks(sinks_ptr, head, True)
        top = tl.maximum(tl.max(maximum, 0), sink)
        shrink = tl.exp2(maximum - top)
        denominator = tl.sum(total * shrink, 0) + tl.exp2(sink - top)
        out = tl.sum(sums * shrink[:, None], 0) / denominator
        tl.store(
            out_ptr + (row.to(tl.int64) * HEADS + head) * HEAD_DIM + dim,
            out.to(out_ptr.dtype.element_ty),
            mask=dim < HEAD_DIM,
        )


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    sinks: Tensor,
    *,
    scale: float,
    window: int | None = None,
    kv_scales: Tensor | None = None,
    max_query_len: int | None = None,
) -> Tensor:
    """Compute `kernels.attention.reference.paged_attention`. There is no wait for the device, so a
    CUDA graph can hold this; the contents of block_table, context_lens and cu_seqlens_q are checked
    only if `checks_indices`.

    Raises:
        ValueError: as in the reference; also if q is not contiguous in each row, if there are more
            than MAX_GROUP query heads per KV head, or for an fp8 cache on a GPU without
            instructions that convert it.
    """
    check_attention(
        q,
        kv_cache,
        block_table,
        context_lens,
        cu_seqlens_q,
        sinks,
        window,
        scale=scale,
        kv_scales=kv_scales,
        max_query_len=max_query_len,
    )
    num_tokens, num_heads, head_dim = q.shape
    _, _, block_size, num_kv_heads, _ = kv_cache.shape
    num_seqs, max_blocks = block_table.shape
    group = num_heads // num_kv_heads
    if q.stride()[1:] != (head_dim, 1):
        raise ValueError(f"q must be contiguous in each row, got strides {q.stride()}")
    for name, tensor in (
        ("block_table", block_table),
        ("context_lens", context_lens),
        ("cu_seqlens_q", cu_seqlens_q),
        ("sinks", sinks),
    ):
        if not tensor.is_contiguous() or tensor.device != q.device:
            raise ValueError(
                f"{name} must be contiguous and on {q.device} as q is, got strides {tensor.stride()} on "
                f"{tensor.device}"
            )
    if kv_cache.device != q.device:
        raise ValueError(f"kv_cache must be on {q.device} as q is, got {kv_cache.device}")
    target = architecture(q.device)
    if kv_cache.dtype == FP8 and (reason := fp8_refusal(target)) is not None:
        raise ValueError(f"kv_cache: {reason}")
    if checks_indices():
        lengths, first_rows = context_lens.tolist(), cu_seqlens_q.tolist()
        check_lengths(lengths, first_rows, num_tokens, max_blocks * block_size, max_query_len)
        _check_block_table(block_table, kv_cache, lengths, first_rows, window)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if num_tokens == 0:
        return out
    tiles = choose_tiles(target, q.dtype, head_dim, window)
    if group > MAX_GROUP:
        raise ValueError(f"q has {group} heads to a KV head of kv_cache, the kernel takes {MAX_GROUP}")
    block_m = max(tiles.block_m, triton.next_power_of_2(group))
    most_splits = _split_limit(num_kv_heads)
    longest = (
        max_blocks * block_size if window is None else min(max_blocks * block_size, window + tiles.decode_n)
    )
    max_splits = min(most_splits, triton.cdiv(longest, MIN_SPLIT))
    programs = triton.cdiv(4 * _num_processors(q.device), num_seqs * num_kv_heads)
    num_programs = min(max(programs, MIN_PROGRAMS), max_splits)
    num_tiles = 0 if max_query_len == 1 else num_tokens // (block_m // group) + num_seqs
    partial = torch.empty(
        num_seqs if max_splits > 1 else 0,
        num_heads,
        max_splits,
        head_dim,
        dtype=torch.float32,
        device=q.device,
    )
    stats = torch.empty(2, *partial.shape[:3], dtype=torch.float32, device=q.device)
    shape = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "DECODE_N": tiles.decode_n,
        "WINDOW": window or 0,
        "MIN_SPLIT": MIN_SPLIT,
        "MAX_SPLITS": most_splits,
    }
    options = {} if tiles.max_registers is None or torch.version.hip else {"maxnreg": tiles.max_registers}
    _attend[((num_tiles + num_seqs * num_programs) * num_kv_heads,)](
        q,
        kv_cache,
        kv_scales,
        block_table,
        context_lens,
        cu_seqlens_q,
        sinks,
        out,
        partial,
        stats,
        scale,
        q.stride(0),
        kv_cache.stride(0),
        num_tiles,
        num_programs,
        num_seqs,
        max_blocks,
        max_splits,
        KV=num_kv_heads,
        GROUP=group,
        PAGE=block_size,
        BLOCK_M=block_m,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **shape,
        **options,
    )
    if max_splits > 1:
        _merge_splits[(num_seqs * num_heads,)](
            partial,
            stats,
            context_lens,
            cu_seqlens_q,
            sinks,
            out,
            num_seqs,
            max_splits,
            HEADS=num_heads,
            num_warps=1,
            **shape,
        )
    return out


def _check_block_table(
    block_table: Tensor,
    kv_cache: Tensor,
    context_lens: list[int],
    cu_seqlens_q: list[int],
    window: int | None,
) -> None:
    """Refuse an entry that would be read and is not a block of kv_cache."""
    _, num_blocks, block_size, _, _ = kv_cache.shape
    for seq, (context_len, table) in enumerate(zip(context_lens, block_table.tolist(), strict=True)):
        num_queries = cu_seqlens_q[seq + 1] - cu_seqlens_q[seq]
        oldest_key = 0 if window is None else max(0, context_len - num_queries - window + 1)
        for column in range(oldest_key // block_size, -(-context_len // block_size) if num_queries else 0):
            if not 0 <= table[column] < num_blocks:
                raise ValueError(
                    f"block_table[{seq}, {column}] is {table[column]}, kv_cache has {num_blocks} blocks"
                )


def _split_limit(num_kv_heads: int) -> int:
    """Return the maximum number of splits of a decode, a power of two."""
    return min(max(1 << (-(-PROGRAMS_OF_A_DECODE // num_kv_heads) - 1).bit_length(), 8), 64)


@cache
def _num_processors(device: torch.device) -> int:
    """Return the number of a GPU's processors; for the interpreter a number so small that a program
    takes several splits."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
