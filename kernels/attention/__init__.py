"""Attention over a paged KV cache."""

from kernels.attention.reference import paged_attention, store_kv

__all__ = ["paged_attention", "store_kv"]
