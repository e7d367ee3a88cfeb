"""Batches of sequences over a paged KV cache, in which everything that may not be read is NaN or
out of range, and their results."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.attention.reference import FP8, paged_attention, store_kv

BLOCK_SIZE = 16
SCALE = 0.37


@dataclass(frozen=True)
class AttentionCase:
    """Arguments of `paged_attention`, and the plain keys and values of each sequence as the cache
    holds them.

    Attributes:
        keys, values: per sequence [context_len, num_kv_heads, head_dim] float64.
    """

    q: Tensor
    kv_cache: Tensor
    kv_scales: Tensor | None
    block_table: Tensor
    context_lens: Tensor
    cu_seqlens_q: Tensor
    sinks: Tensor
    window: int | None
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """The tensors, in order of the arguments."""
        return self.q, self.kv_cache, self.block_table, self.context_lens, self.cu_seqlens_q, self.sinks

    def to(self, device: torch.device) -> "AttentionCase":
        """Return the case on another device; keys and values stay."""
        names = ("q", "kv_cache", "block_table", "context_lens", "cu_seqlens_q", "sinks")
        scales = None if self.kv_scales is None else self.kv_scales.to(device)
        return replace(self, kv_scales=scales, **{name: getattr(self, name).to(device) for name in names})

    def reference(self) -> Tensor:
        """Return the reference's result, on the CPU."""
        return paged_attention(*self.arguments, scale=SCALE, window=self.window, kv_scales=self.kv_scales)

    def expected(self) -> Tensor:
        """Return the result, query by query over exactly the keys it may see, with the sink as one
        more column; float64."""
        out = torch.empty(self.q.shape, dtype=torch.float64)
        group = self.q.shape[1] // self.kv_cache.shape[3]
        for seq, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            first_row, end_row = self.cu_seqlens_q[seq : seq + 2].tolist()
            for row in range(first_row, end_row):
                position = len(keys) - (end_row - row)
                first = 0 if self.window is None else max(0, position - self.window + 1)
                seen = slice(first, position + 1)
                k, v = (part[seen].repeat_interleave(group, dim=1) for part in (keys, values))
                logits = torch.einsum("hd,khd->hk", self.q[row].double(), k) * SCALE
                weights = torch.cat((logits, self.sinks.double()[:, None]), dim=1).softmax(1)[:, :-1]
                out[row] = torch.einsum("hk,khd->hd", weights, v)
        return out


def attention_case(
    lengths: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (6, 3),
    head_dim: int = 10,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
    scales: bool = False,
    seed: int = 0,
) -> AttentionCase:
    """Return a case with random queries, keys, values and sinks.

    Unwritten slots, other blocks, the null block and blocks wholly before the window are NaN. Table
    entries past a sequence's last block are out of range, those wholly before the window are the
    null block.

    Args:
        lengths: (query_len, context_len) of each sequence.
        heads: query heads, KV heads.
        scales: for each KV head of an fp8 cache; else none.
    """
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    max_blocks = max(-(-context // BLOCK_SIZE) for _, context in lengths) + 2
    num_blocks = 1 + sum(-(-context // BLOCK_SIZE) for _, context in lengths) + 5
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    shape = (2, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
    kv_cache = torch.full(shape, torch.nan).to(FP8 if fp8 else dtype)
    kv_scales = torch.rand(2, num_kv_heads, generator=generator) * 0.02 + 0.005 if scales else None
    block_table = torch.full((len(lengths), max_blocks), 2**31 - 1, dtype=torch.int32)
    all_keys, all_values = [], []
    for seq, (query_len, context_len) in enumerate(lengths):
        k, v = torch.randn(2, context_len, num_kv_heads, head_dim, generator=generator).to(dtype)
        oldest = 0 if window is None else context_len - query_len - window + 1
        for logical in range(-(-context_len // BLOCK_SIZE) if query_len else 0):
            first, end = logical * BLOCK_SIZE, min((logical + 1) * BLOCK_SIZE, context_len)
            block_table[seq, logical] = 0
            if end > oldest:
                block = block_table[seq, logical] = free.pop()
                slots = torch.arange(block * BLOCK_SIZE, block * BLOCK_SIZE + end - first)
                store_kv(k[first:end], v[first:end], kv_cache, slots, kv_scales)
        if fp8:
            factors = torch.ones(2, num_kv_heads) if kv_scales is None else kv_scales
            k, v = (_as_stored(part, factor[:, None]) for part, factor in zip((k, v), factors, strict=True))
        all_keys.append(k.double())
        all_values.append(v.double())
    query_lens = torch.tensor([0, *(query_len for query_len, _ in lengths)])
    return AttentionCase(
        q=torch.randn(int(query_lens.sum()), num_heads, head_dim, generator=generator).to(dtype),
        kv_cache=kv_cache,
        kv_scales=kv_scales,
        block_table=block_table,
        context_lens=torch.tensor([context for _, context in lengths], dtype=torch.int32),
        cu_seqlens_q=query_lens.cumsum(0).to(torch.int32),
        sinks=torch.randn(num_heads, generator=generator),
        window=window,
        keys=tuple(all_keys),
        values=tuple(all_values),
    )


def _as_stored(part: Tensor, factor: Tensor) -> Tensor:
    """Return the tensor as an fp8 cache holds it. Saturating: torch's own cast gives NaN in torch
    2.11."""
    largest = torch.finfo(FP8).max
    return (part.float() / factor).clamp(-largest, largest).to(FP8).float() * factor
