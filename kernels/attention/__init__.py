"""Attention over a paged KV cache."""

from kernels.attention.reference import paged_attention, rope_and_store_kv, store_kv

__all__ = ["paged_attention", "rope_and_store_kv", "store_kv"]
