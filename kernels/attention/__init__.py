"""Attention over a paged KV cache, in the dtype of the model or in fp8."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.attention import reference
from kernels.attention.reference import store_kv
from kernels.backend import triton_runs_on
from kernels.cpu import attention as cpu
from kernels.implementation import Implementation, by_device, slow_reference

__all__ = ["AttentionOperations", "paged_attention", "rope_and_store_kv", "select", "store_kv"]


class PagedAttention(Protocol):
    """Signature of `kernels.attention.reference.paged_attention`."""

    def __call__(
        self,
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
        """Compute attention for the queries of one step."""


class RopeAndStoreKV(Protocol):
    """Signature of `kernels.attention.reference.rope_and_store_kv`."""

    def __call__(
        self,
        qkv: Tensor,
        num_heads: int,
        cos: Tensor,
        sin: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        *,
        kv_scales: Tensor | None = None,
    ) -> Tensor:
        """Rotate queries and keys, store keys and values, and return the queries."""


@dataclass(frozen=True, slots=True)
class AttentionOperations:
    """An implementation's functions, as `kernels.attention.reference` defines them."""

    paged_attention: PagedAttention
    rope_and_store_kv: RopeAndStoreKV


def select(
    dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device
) -> Implementation[AttentionOperations]:
    """Select the implementation for activations of `dtype` and caches of `kv_dtype`."""
    slow = AttentionOperations(reference.paged_attention, reference.rope_and_store_kv)
    if kv_dtype != dtype and not triton_runs_on(device):
        why = "of an fp8 KV cache, which only Triton's kernel takes"
        return slow_reference(slow, why, is_capturable=False)
    cpp = AttentionOperations(cpu.paged_attention, cpu.rope_and_store_kv)
    return by_device(device, dtype, triton=_on_triton, cpp=cpp, reference=slow, is_capturable=False)


def _on_triton() -> AttentionOperations:
    from kernels.attention import paged, rope_store

    return AttentionOperations(paged.paged_attention, rope_store.rope_and_store_kv)


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
    """Compute `kernels.attention.reference.paged_attention` with the kernel for this device."""
    return select(q.dtype, kv_cache.dtype, q.device).run.paged_attention(
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
    """Compute `kernels.attention.reference.rope_and_store_kv` with the kernel for this device."""
    operations = select(qkv.dtype, kv_cache.dtype, qkv.device).run
    return operations.rope_and_store_kv(qkv, num_heads, cos, sin, kv_cache, slot_mapping, kv_scales=kv_scales)
