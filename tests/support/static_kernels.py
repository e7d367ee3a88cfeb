"""Attention and experts of a decode step in plain torch without any shape that depends on data, so that a CUDA graph can hold a whole model
before all its kernels can. They compute far more than they need."""

import torch
from torch import Tensor

from kernels.moe.reference import gate_topk
from kernels.mxfp4 import PackedMXFP4, unpack


def static_decode_attention(
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
    """`kernels.attention.paged_attention` for one query a sequence, over all positions of the block table at once."""
    num_seqs, num_heads, head_dim = q.shape
    block_size, num_kv_heads = kv_cache.shape[2:4]
    keys, values = (part[block_table.long()].flatten(1, 2).float() for part in kv_cache)  # [S, positions, KV, D]
    position = torch.arange(block_table.shape[1] * block_size, device=q.device)
    visible = position < context_lens[:, None]
    if window is not None:
        visible &= position >= context_lens[:, None] - window
    values = values.masked_fill(~visible[:, :, None, None], 0)
    queries = q.float().view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim) * scale
    scores = torch.einsum("skgd,spkd->skgp", queries, keys).masked_fill(~visible[:, None, None], -torch.inf)
    sink = sinks.float().view(1, num_kv_heads, -1, 1).expand(num_seqs, -1, -1, 1)
    weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("skgp,spkd->skgd", weights, values).reshape(num_seqs, num_heads, head_dim).to(q.dtype)


def static_experts(
    x: Tensor,
    gate_logits: Tensor,
    k: int,
    gate_up: PackedMXFP4 | Tensor,
    gate_up_bias: Tensor,
    down: PackedMXFP4 | Tensor,
    down_bias: Tensor,
    *,
    swiglu_limit: float,
    swiglu_alpha: float,
    first_expert: int = 0,
) -> Tensor:
    """`kernels.moe.gated_experts`: every expert for every token, weighted by 0 where it was not chosen."""
    topk_ids, topk_weights = gate_topk(gate_logits, k)
    wide = x.float()
    hidden = torch.einsum("th,enh->etn", wide, _dense(gate_up)) + gate_up_bias.float()[:, None]
    gate, up = hidden[..., 0::2].clamp(max=swiglu_limit), hidden[..., 1::2].clamp(-swiglu_limit, swiglu_limit)
    activated = (up + 1) * gate * torch.sigmoid(swiglu_alpha * gate)
    outputs = torch.einsum("eti,ehi->eth", activated, _dense(down)) + down_bias.float()[:, None]
    expert_ids = first_expert + torch.arange(len(outputs), device=x.device)
    chosen = (topk_ids.long()[None] == expert_ids[:, None, None]) * topk_weights[None]  # [E, T, k]
    return (outputs * chosen.sum(-1)[..., None]).sum(0).to(x.dtype)


def _dense(weights: PackedMXFP4 | Tensor) -> Tensor:
    return unpack(weights, torch.float32) if isinstance(weights, PackedMXFP4) else weights.float()
