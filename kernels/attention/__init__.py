"""Attention over a paged KV cache."""

from torch import Tensor

from kernels.attention import reference
from kernels.attention.reference import store_kv
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
) -> Tensor:
    """`kernels.attention.reference.paged_attention`, which defines it, by the kernel for this device."""
    run = cpu.paged_attention if cpu.can_run(q) else reference.paged_attention
    return run(q, kv_cache, block_table, context_lens, cu_seqlens_q, sinks, scale=scale, window=window)


def rope_and_store_kv(qkv: Tensor, num_heads: int, cos: Tensor, sin: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> Tensor:
    """`kernels.attention.reference.rope_and_store_kv`, which defines it, by the kernel for this device."""
    run = cpu.rope_and_store_kv if cpu.can_run(qkv) else reference.rope_and_store_kv
    return run(qkv, num_heads, cos, sin, kv_cache, slot_mapping)
