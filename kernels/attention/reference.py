"""Paged attention with sinks in torch, fp32 inside.

Queries are processed in tiles, keys in tiles that start at multiples of the tile's length, with a
running maximum and sum (FlashAttention-2), so memory is bounded for all lengths. Decodes of many
sequences, and the query tiles of prefill chunks, each run as one batch.

A query's result does not depend on how its sequence was cut into chunks or on the rest of the
batch, bit for bit on CPU: the query always meets the same key tiles in the same order, key tiles
that it cannot see add exact zeros, and the products have shapes for which a row's result was found
not to depend on the other rows (see `kernels/linear/reference.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels.attention.fp8 import FP8, FP8_MAX
from kernels.pointwise.reference import apply_rope

QUERY_TILES = (1, 16, 128)
"""Numbers of queries of a sequence that are computed together; a chunk is cut by the largest, and
its rest is padded to the smallest that holds it."""

KEY_TILE = 512
"""Number of keys in a tile; less for a smaller window."""

MIN_ROWS = 16
"""Minimum number of rows of a product, and the multiple to which its columns are padded; with fewer
rows the BLAS sums in another order."""

MAX_ELEMENTS = 1 << 22
"""Maximum number of elements in a batch's scores, and in its gathered keys."""


@dataclass(frozen=True, slots=True)
class _QueryTile:
    """`num_queries` rows of q, starting at `row`, of sequence `seq`; the first is at `position`.
    They see keys of `num_key_tiles` tiles."""

    seq: int
    row: int
    position: int
    num_queries: int
    first_key_tile: int
    num_key_tiles: int


def store_kv(
    k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor, kv_scales: Tensor | None = None
) -> None:
    """Write new keys and values into the cache, in place.

    Args:
        k, v: [T, num_kv_heads, head_dim], dtype of kv_cache; any float where that is fp8.
        kv_cache: [2, num_blocks, block_size, num_kv_heads, head_dim] of this layer. float8_e4m3fn
            holds `value / scale`, rounded to nearest even, at most ±448.
        slot_mapping: [T] int64, block * block_size + offset for each token; distinct except for
            slots of the null block.
        kv_scales: [2, num_kv_heads] fp32, positive, for K and for V; only for an fp8 cache. None if
            all are 1.
    Raises:
        ValueError: names the argument of a wrong shape or dtype.
        IndexError: a slot is outside the cache.
    """
    check_cache(kv_cache, kv_scales)
    num_kv_heads, head_dim = kv_cache.shape[3:]
    for name, tensor in (("k", k), ("v", v)):
        if tensor.ndim != 3 or tensor.shape[1:] != kv_cache.shape[3:]:
            raise ValueError(
                f"{name} must be [T, {num_kv_heads}, {head_dim}], got shape {list(tensor.shape)}"
            )
        _check_dtype(name, tensor, kv_cache)
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"v must have the {k.shape[0]} tokens of k, got {v.shape[0]}")
    check_slots(slot_mapping, k.shape[0])
    for part, new in ((0, k), (1, v)):
        slots = kv_cache[part].view(-1, num_kv_heads, head_dim)
        if kv_cache.dtype == FP8:
            wide = new.float() if kv_scales is None else new.float() / kv_scales[part][:, None]
            # As bytes: torch cannot index-copy fp8.
            slots, new = slots.view(torch.uint8), wide.clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8)
        slots.index_copy_(0, slot_mapping, new)


def rope_and_store_kv(
    qkv: Tensor,
    num_heads: int,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Rotate queries and keys by the angles of their positions, and write keys and values into the
    cache.

    Args:
        qkv: [T, num_heads + 2 * num_kv_heads, head_dim]: query heads, key heads, value heads. May
            be overwritten.
        num_heads: number of query heads.
        cos, sin: [T, head_dim / 2] fp32.
        kv_cache, slot_mapping, kv_scales: as in `store_kv`; keys are rounded to qkv's dtype first.
    Returns:
        The rotated queries, [T, num_heads, head_dim], dtype of qkv.
    Raises:
        ValueError, IndexError: as in `store_kv` and `apply_rope`.
    """
    check_rope_and_store(qkv, num_heads, cos, sin, kv_cache, slot_mapping, kv_scales)
    num_kv_heads = kv_cache.shape[3]
    q, k, v = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    store_kv(apply_rope(k, cos, sin), v, kv_cache, slot_mapping, kv_scales)
    return apply_rope(q, cos, sin)


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
    """Compute causal attention with learned sinks over a paged KV cache, for prefill chunks and
    decodes in one batch.

    The last query of a sequence is at position context_len - 1, those before it at the positions
    before.

    Args:
        q: [T, num_heads, head_dim] float.
        kv_cache: [2, num_blocks, block_size, num_kv_heads, head_dim], dtype of q or float8_e4m3fn,
            of this layer; K and V of q already stored.
        block_table: [num_seqs, max_blocks] int32 by position // block_size; not read are entries
            past a sequence's last block, and entries older than the window of all its queries.
        context_lens: [num_seqs] int32, lengths including the tokens of q.
        cu_seqlens_q: [num_seqs + 1] int32, the first row of each sequence in q, then T.
        sinks: [num_heads] float, finite: a logit in the softmax denominator, without a value.
        scale: positive factor of q·k; the sink is not scaled.
        window: keys visible to a query, itself included; None for all.
        kv_scales: as in `store_kv`.
        max_query_len: maximum number of queries of a sequence, if the host knows it: saves the GPU
            programs without work.
    Returns:
        [T, num_heads, head_dim], dtype of q.
    Raises:
        ValueError: names the argument of a wrong shape, dtype or value; num_heads is not a multiple
            of num_kv_heads.
    Follows: FlashAttention-2 (arXiv 2307.08691); sinks as in openai/gpt-oss torch/model.py `sdpa`.
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
    block_size = kv_cache.shape[2]
    lengths, first_rows = context_lens.tolist(), cu_seqlens_q.tolist()
    check_lengths(lengths, first_rows, q.shape[0], block_table.shape[1] * block_size, max_query_len)
    key_tile = _round_up(KEY_TILE if window is None else min(KEY_TILE, window), block_size)
    tiles = _query_tiles(lengths, first_rows, key_tile, window)
    num_kv_heads, head_dim = kv_cache.shape[3:]
    group = q.shape[1] // num_kv_heads
    out = torch.empty_like(q)
    for num_queries in QUERY_TILES:
        # Longest first: at each step the tiles that still have keys to see are then a prefix of the
        # batch.
        batch = sorted(
            (tile for tile in tiles if _padded(tile) == num_queries), key=lambda tile: -tile.num_key_tiles
        )
        elements = key_tile * num_kv_heads * max(_round_up(num_queries * group, MIN_ROWS), head_dim)
        size = max(1, MAX_ELEMENTS // elements)
        for start in range(0, len(batch), size):
            _attend(
                q,
                kv_cache,
                kv_scales,
                block_table,
                sinks,
                batch[start : start + size],
                num_queries,
                key_tile,
                scale,
                window,
                out,
            )
    return out


def _padded(tile: _QueryTile) -> int:
    return next(size for size in QUERY_TILES if size >= tile.num_queries)


def _query_tiles(
    context_lens: list[int], cu_seqlens_q: list[int], key_tile: int, window: int | None
) -> list[_QueryTile]:
    tiles = []
    for seq, context_len in enumerate(context_lens):
        first_row, end_row = cu_seqlens_q[seq], cu_seqlens_q[seq + 1]
        for row in range(first_row, end_row, QUERY_TILES[-1]):
            num_queries = min(QUERY_TILES[-1], end_row - row)
            position = context_len - (end_row - row)
            first_key = 0 if window is None else max(0, position - window + 1)
            first_key_tile = first_key // key_tile
            num_key_tiles = (position + num_queries - 1) // key_tile + 1 - first_key_tile
            tiles.append(_QueryTile(seq, row, position, num_queries, first_key_tile, num_key_tiles))
    return tiles


def _attend(
    q: Tensor,
    kv_cache: Tensor,
    kv_scales: Tensor | None,
    block_table: Tensor,
    sinks: Tensor,
    batch: list[_QueryTile],
    num_queries: int,
    key_tile: int,
    scale: float,
    window: int | None,
    out: Tensor,
) -> None:
    """Compute attention of the query tiles in `batch` (B), each padded to `num_queries` (Q) by
    repeating its last query, and write their rows of `out`.

    Inside, a row is a (query, head of a KV head's group) pair; there are R = Q * group of them,
    padded to MIN_ROWS.
    """
    device = q.device
    num_kv_heads, head_dim = kv_cache.shape[3:]
    group = q.shape[1] // num_kv_heads
    last = torch.tensor([tile.num_queries - 1 for tile in batch], device=device)[:, None]
    offset = torch.arange(num_queries, device=device).expand(len(batch), -1).minimum(last)  # [B, Q]
    q_rows = offset + torch.tensor([tile.row for tile in batch], device=device)[:, None]
    position = offset + torch.tensor([tile.position for tile in batch], device=device)[:, None]
    seqs = torch.tensor([tile.seq for tile in batch], device=device)
    first_key_tile = torch.tensor([tile.first_key_tile for tile in batch], device=device)
    newest_key = position[:, -1]
    oldest_key = position[:, 0] - (window - 1) if window is not None else torch.zeros_like(newest_key)

    grouped = q[q_rows].float().mul_(scale).view(len(batch), num_queries, num_kv_heads, group, head_dim)
    queries = grouped.permute(0, 2, 1, 3, 4).reshape(len(batch), num_kv_heads, num_queries * group, head_dim)
    missing = max(0, MIN_ROWS - num_queries * group)
    queries = functional.pad(queries, (0, 0, 0, missing))  # [B, KV, R, D]
    row_position = functional.pad(position.repeat_interleave(group, dim=1), (0, missing))  # [B, R]
    row_sink = functional.pad(
        sinks.float().view(num_kv_heads, group).repeat(1, num_queries), (0, missing)
    )  # [KV, R]

    # The sink starts the running softmax: it is the first maximum, with weight 1 and no value.
    maximum = row_sink.repeat(len(batch), 1, 1)  # [B, KV, R]
    total = torch.ones_like(maximum)
    sums = torch.zeros(*maximum.shape, _round_up(head_dim, MIN_ROWS), device=device)
    for step in range(batch[0].num_key_tiles):
        n = sum(tile.num_key_tiles > step for tile in batch)
        keys, values, key_position = _gather(
            kv_cache,
            kv_scales,
            block_table[seqs[:n]],
            first_key_tile[:n] + step,
            key_tile,
            oldest_key[:n],
            newest_key[:n],
        )
        scores = queries[:n] @ keys.transpose(2, 3)  # [n, KV, R, key_tile]
        all_visible = window is None and all(tile.position >= (step + 1) * key_tile for tile in batch[:n])
        if not all_visible:
            visible = key_position[:, None, :] <= row_position[:n, :, None]
            if window is not None:
                visible &= key_position[:, None, :] > row_position[:n, :, None] - window
            scores.masked_fill_(~visible[:, None], -torch.inf)
        new_maximum = maximum[:n].maximum(scores.amax(-1))
        weights = scores.sub_(new_maximum[..., None]).exp_()
        shrink = (maximum[:n] - new_maximum).exp()
        total[:n].mul_(shrink).add_(weights.sum(-1))
        sums[:n].mul_(shrink[..., None]).add_(weights @ values)
        maximum[:n] = new_maximum
    result = (sums / total[..., None])[:, :, : num_queries * group, :head_dim]
    result = result.view(len(batch), num_kv_heads, num_queries, group, head_dim).transpose(1, 2).flatten(2, 3)
    real = torch.arange(num_queries, device=device) <= last
    out[q_rows[real]] = result[real].to(out.dtype)


def _gather(
    kv_cache: Tensor,
    kv_scales: Tensor | None,
    block_table: Tensor,
    key_tiles: Tensor,
    key_tile: int,
    oldest_key: Tensor,
    newest_key: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return one tile of keys for each of n query tiles.

    Args:
        block_table: [n, max_blocks]; entries are read only for blocks with keys from oldest_key to
            newest_key.
        key_tiles, oldest_key, newest_key: [n].
    Returns:
        (keys [n, KV, key_tile, D] fp32, values [n, KV, key_tile, D padded to MIN_ROWS] fp32, key
        positions [n, key_tile]). Outside oldest_key to newest_key, values are zero, since 0 times
        an unwritten slot may be NaN; keys there are arbitrary.
    """
    block_size, num_kv_heads, head_dim = kv_cache.shape[2:]
    key_position = key_tiles[:, None] * key_tile + torch.arange(key_tile, device=kv_cache.device)
    first_positions = key_position[:, ::block_size]
    needed = (first_positions + block_size > oldest_key[:, None]) & (first_positions <= newest_key[:, None])
    column = (first_positions // block_size).clamp(max=block_table.shape[1] - 1)
    blocks = block_table.gather(1, column).long().masked_fill(~needed, 0).flatten()
    shape = (len(key_tiles), key_tile, num_kv_heads, head_dim)
    as_bytes = kv_cache.dtype == FP8  # torch cannot index fp8
    keys, values = (
        part.index_select(0, blocks).view(shape)
        for part in (kv_cache.view(torch.uint8) if as_bytes else kv_cache)
    )
    outside = (key_position < oldest_key[:, None]) | (key_position > newest_key[:, None])
    values = values.masked_fill_(outside[:, :, None, None], 0).transpose(1, 2)
    keys = keys.transpose(1, 2)
    if as_bytes:
        keys, values = keys.view(FP8), values.view(FP8)
    keys, values = keys.float(), values.float()
    if kv_scales is not None:
        keys, values = (
            part.mul_(scales[:, None, None]) for part, scales in zip((keys, values), kv_scales, strict=True)
        )
    return keys, functional.pad(values, (0, -head_dim % MIN_ROWS)), key_position


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def check_cache(kv_cache: Tensor, kv_scales: Tensor | None) -> None:
    """Refuse shapes, dtypes and strides of a cache and its scales.

    Raises:
        ValueError: names the argument.
    """
    if kv_cache.ndim != 5 or kv_cache.shape[0] != 2:
        raise ValueError(
            f"kv_cache must be [2, num_blocks, block_size, num_kv_heads, head_dim], got shape "
            f"{list(kv_cache.shape)}"
        )
    if not kv_cache[0].is_contiguous():
        raise ValueError("kv_cache must be contiguous in each of its halves")
    if kv_scales is None:
        return
    expected = (2, kv_cache.shape[3])
    if kv_cache.dtype != FP8:
        raise ValueError(f"kv_scales is for a kv_cache of {FP8}, which is {kv_cache.dtype}")
    if (
        tuple(kv_scales.shape) != expected
        or kv_scales.dtype != torch.float32
        or not kv_scales.is_contiguous()
    ):
        raise ValueError(
            f"kv_scales must be {list(expected)} float32, contiguous, got shape {list(kv_scales.shape)} of "
            f"{kv_scales.dtype}"
        )


def check_slots(slot_mapping: Tensor, num_tokens: int) -> None:
    """Refuse a slot mapping of a wrong shape or dtype.

    Raises:
        ValueError: slot_mapping is not [num_tokens] int64.
    """
    if slot_mapping.shape != (num_tokens,) or slot_mapping.dtype != torch.int64:
        raise ValueError(
            f"slot_mapping must be [{num_tokens}] int64, got shape {list(slot_mapping.shape)} of "
            f"{slot_mapping.dtype}"
        )


def check_rope_and_store(
    qkv: Tensor,
    num_heads: int,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_scales: Tensor | None = None,
) -> None:
    """Refuse shapes and dtypes that `rope_and_store_kv` cannot take.

    Raises:
        ValueError: names the argument.
    """
    check_cache(kv_cache, kv_scales)
    num_kv_heads, head_dim = kv_cache.shape[3:]
    if qkv.ndim != 3 or tuple(qkv.shape[1:]) != (num_heads + 2 * num_kv_heads, head_dim) or head_dim % 2:
        raise ValueError(
            f"qkv must be [T, {num_heads} + 2 * {num_kv_heads}, {head_dim}], the last even, got shape "
            f"{list(qkv.shape)}"
        )
    _check_dtype("qkv", qkv, kv_cache)
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) != (qkv.shape[0], head_dim // 2):
            raise ValueError(
                f"{name} must be [{qkv.shape[0]}, {head_dim // 2}], got shape {list(table.shape)}"
            )
    check_slots(slot_mapping, qkv.shape[0])


def check_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    sinks: Tensor,
    window: int | None,
    *,
    scale: float,
    kv_scales: Tensor | None = None,
    max_query_len: int | None = None,
) -> None:
    """Refuse shapes, dtypes and numbers that `paged_attention` cannot take; `check_lengths` checks
    the tensors' contents.

    Raises:
        ValueError: names the argument.
    """
    check_cache(kv_cache, kv_scales)
    num_kv_heads, head_dim = kv_cache.shape[3:]
    if q.ndim != 3 or q.shape[2] != head_dim:
        raise ValueError(f"q must be [T, num_heads, {head_dim}], got shape {list(q.shape)}")
    if q.shape[1] % num_kv_heads:
        raise ValueError(
            f"q has {q.shape[1]} heads, not a multiple of the {num_kv_heads} KV heads of kv_cache"
        )
    _check_dtype("q", q, kv_cache)
    if block_table.ndim != 2 or block_table.dtype != torch.int32:
        raise ValueError(
            f"block_table must be [num_seqs, max_blocks] int32, got shape {list(block_table.shape)} of "
            f"{block_table.dtype}"
        )
    num_seqs = block_table.shape[0]
    for name, tensor, length in (
        ("context_lens", context_lens, num_seqs),
        ("cu_seqlens_q", cu_seqlens_q, num_seqs + 1),
    ):
        if tuple(tensor.shape) != (length,) or tensor.dtype != torch.int32:
            raise ValueError(
                f"{name} must be [{length}] int32, got shape {list(tensor.shape)} of {tensor.dtype}"
            )
    if tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"sinks must be [{q.shape[1]}], got shape {list(sinks.shape)}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if max_query_len is not None and max_query_len < 1:
        raise ValueError(f"max_query_len must be at least 1, got {max_query_len}")


def check_lengths(
    context_lens: list[int],
    cu_seqlens_q: list[int],
    num_rows: int,
    max_context_len: int,
    max_query_len: int | None = None,
) -> None:
    """Refuse lengths that do not fit together.

    Args:
        num_rows: number of rows of q.
        max_context_len: number of positions that a row of the block table covers.
        max_query_len: as in `paged_attention`.
    Raises:
        ValueError: names the argument.
    """
    if cu_seqlens_q[0] != 0 or cu_seqlens_q[-1] != num_rows:
        raise ValueError(
            f"cu_seqlens_q must run from 0 to the {num_rows} rows of q, got {cu_seqlens_q[0]} to "
            f"{cu_seqlens_q[-1]}"
        )
    for seq, context_len in enumerate(context_lens):
        num_queries = cu_seqlens_q[seq + 1] - cu_seqlens_q[seq]
        if not 0 <= num_queries <= context_len:
            raise ValueError(
                f"cu_seqlens_q gives sequence {seq} {num_queries} queries, its context_lens is {context_len}"
            )
        if max_query_len is not None and num_queries > max_query_len:
            raise ValueError(
                f"max_query_len is {max_query_len}, cu_seqlens_q gives sequence {seq} {num_queries} queries"
            )
        if num_queries and context_len > max_context_len:
            raise ValueError(
                f"block_table holds {max_context_len} positions a sequence, context_lens of sequence {seq} "
                f"is {context_len}"
            )


def _check_dtype(name: str, tensor: Tensor, kv_cache: Tensor) -> None:
    if kv_cache.dtype == FP8:
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise ValueError(
                f"{name} must be of 16 or 32-bit floats over an fp8 kv_cache, got {tensor.dtype}"
            )
    elif tensor.dtype != kv_cache.dtype:
        raise ValueError(f"{name} must be {kv_cache.dtype} as kv_cache is, got {tensor.dtype}")
