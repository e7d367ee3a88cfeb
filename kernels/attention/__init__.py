"""Attention over a paged KV cache, in the dtype of the model or in fp8."""

from torch import Tensor

from kernels.attention import reference
from kernels.attention.reference import store_kv
from kernels.backend import runs_triton
from kernels.cpu import attention as cpu

__all__ = ["paged_attention", "rope_and_store_kv", "store_kv"]


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
    """`kernels.attention.reference.paged_attention`, which defines it, by the kernel for this
    device."""
    if cpu.can_run(q) and kv_cache.dtype == q.dtype and kv_scales is None and not runs_triton(q):
        return cpu.paged_attention(
            q, kv_cache, block_table, context_lens, cu_seqlens_q, sinks, scale=scale, window=window
        )
    run = reference.paged_attention
    if runs_triton(q):
        from kernels.attention import paged

        run = paged.paged_attention
    return run(
        q,
        kv_cache,
        block_table,
        context_lens,
        cu_seqlens_q,
        sinks,
        scale=scale,
        window=window,
        kv_scales=kv_scales,
        max_query_len=max_query_len,
    )


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
    """`kernels.attention.reference.rope_and_store_kv`, which defines it, by the kernel for this
    device."""
    if cpu.can_run(qkv) and kv_cache.dtype == qkv.dtype and kv_scales is None and not runs_triton(qkv):
        return cpu.rope_and_store_kv(qkv, num_heads, cos, sin, kv_cache, slot_mapping)
    run = reference.rope_and_store_kv
    if runs_triton(qkv):
        from kernels.attention import rope_store

        run = rope_store.rope_and_store_kv
    return run(qkv, num_heads, cos, sin, kv_cache, slot_mapping, kv_scales=kv_scales)
