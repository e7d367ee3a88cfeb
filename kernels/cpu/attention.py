"""Sink attention that reads the paged cache in place, and RoPE with the KV store."""

import ctypes

import torch
from torch import Tensor

from kernels.attention import reference
from kernels.cpu import native, structures


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
    """Compute `kernels.attention.reference.paged_attention` for a cache of q's dtype, without
    scales. A block outside the cache raises IndexError.

    A query's result is the same, bit for bit, for all splits of its sequence into chunks, all
    batches and all numbers of threads.
    """
    reference.check_attention(
        q, kv_cache, block_table, context_lens, cu_seqlens_q, sinks, window, scale=scale, kv_scales=kv_scales
    )
    _check_cache_dtype(kv_cache, q.dtype)
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, block_size, num_kv_heads = kv_cache.shape[1:4]
    if q.stride(2) != 1 or q.stride(1) != head_dim:
        q = q.contiguous()
    block_table, context_lens, cu_seqlens_q = (
        block_table.contiguous(),
        context_lens.contiguous(),
        cu_seqlens_q.contiguous(),
    )
    wide_sinks = sinks.float().contiguous()
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype)
    keys, values = kv_cache.unbind(0)
    arguments = structures.AttentionArgs(
        q.data_ptr(),  # not contiguous if it is a part of the projection's output
        native.pointer(keys),
        native.pointer(values),
        native.pointer(block_table),
        native.pointer(context_lens),
        native.pointer(cu_seqlens_q),
        native.pointer(wide_sinks),
        native.pointer(out),
        num_tokens,
        q.stride(0),
        len(context_lens),
        block_table.shape[1],
        num_blocks,
        block_size,
        num_heads,
        num_kv_heads,
        head_dim,
        window or 0,
        scale,
        native.DATA_TYPES[q.dtype],
    )
    status = native.ready().cantata_attention(ctypes.byref(arguments))
    if status:
        reference.check_lengths(
            context_lens.tolist(), cu_seqlens_q.tolist(), num_tokens, block_table.shape[1] * block_size
        )
        raise IndexError(f"block_table names a block outside the {num_blocks} of kv_cache")
    return out


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
    """Compute `kernels.attention.reference.rope_and_store_kv` for a cache of qkv's dtype, without
    scales. The returned queries are a part of `qkv`, rotated in place."""
    reference.check_rope_and_store(qkv, num_heads, cos, sin, kv_cache, slot_mapping, kv_scales)
    _check_cache_dtype(kv_cache, qkv.dtype)
    num_tokens, _, head_dim = qkv.shape
    num_blocks, block_size, num_kv_heads = kv_cache.shape[1:4]
    qkv, slot_mapping = qkv.contiguous(), slot_mapping.contiguous()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    keys, values = kv_cache.unbind(0)
    arguments = structures.RopeStoreArgs(
        native.pointer(qkv),
        native.pointer(cos),
        native.pointer(sin),
        native.pointer(keys),
        native.pointer(values),
        native.pointer(slot_mapping),
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        num_blocks * block_size,
        native.DATA_TYPES[qkv.dtype],
    )
    if native.ready().cantata_rope_and_store(ctypes.byref(arguments)):
        raise IndexError(f"slot_mapping names a slot outside the {num_blocks * block_size} of kv_cache")
    return qkv[:, :num_heads]


def _check_cache_dtype(kv_cache: Tensor, dtype: torch.dtype) -> None:
    if kv_cache.dtype != dtype:
        raise ValueError(f"kv_cache must be {dtype} as activations are, got {kv_cache.dtype}")
