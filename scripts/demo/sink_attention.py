"""Causal attention with sinks and its gradient, for examples of one length."""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor


def sink_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None) -> Tensor:
    """Return softmax([q k^T / sqrt(D), sink]) v, without the sink's column, for N examples of L
    tokens.

    Args:
        q: [N, L, Hkv, G, D] float.
        k, v: [N, L, Hkv, D].
        sinks: [Hkv * G].
        window: keys visible to a query, itself included; None for all.
    Returns:
        [N, L, Hkv, G, D], contiguous.
    """
    attended: Tensor = _SinkAttention.apply(q, k, v, sinks, window)  # type: ignore[no-untyped-call]
    return attended


class _SinkAttention(torch.autograd.Function):
    """Written out because the scores are most of what a training step reads and writes: here they
    are written once and changed in place."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None) -> Tensor:
        count, length, kv_heads, group, width = q.shape
        query = q.permute(0, 2, 3, 1, 4).reshape(count * kv_heads, group * length, width)
        key, value = _by_head(k), _by_head(v)
        scores = torch.bmm(query, key.mT).view(count, kv_heads * group, length, length)
        scores.mul_(width**-0.5).add_(causal_mask(length, window))
        sink = sinks[:, None, None]
        largest = torch.maximum(scores.amax(-1, keepdim=True), sink)
        scores.sub_(largest).exp_()
        sink_share = (sink - largest).exp_()
        total = scores.sum(-1, keepdim=True).add_(sink_share)
        scores.div_(total)
        shares = scores.view(count * kv_heads, group * length, length)
        out = torch.bmm(shares, value)
        ctx.save_for_backward(query, key, value, shares, sink_share.div_(total), out)
        return out.view(count, kv_heads, group, length, width).permute(0, 3, 1, 2, 4).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, shares, sink_share, attended = ctx.saved_tensors
        count, length, kv_heads, group, width = gradients[0].shape
        out = gradients[0].permute(0, 2, 3, 1, 4).reshape(count * kv_heads, group * length, width)
        grad_value = torch.bmm(shares.mT, out)
        grad_scores = torch.bmm(out, value.mT)
        mean = (out * attended).sum(-1, keepdim=True)  # of grad_scores, weighted by the shares
        grad_scores.sub_(mean).mul_(shares).mul_(width**-0.5)
        grad_query = torch.bmm(grad_scores, key)
        grad_key = torch.bmm(grad_scores.mT, query)
        grad_sinks = -(sink_share * mean.view(sink_share.shape)).sum((0, 2, 3))
        shape = (count, kv_heads, length, width)
        return (
            grad_query.view(count, kv_heads, group, length, width).permute(0, 3, 1, 2, 4),
            grad_key.view(shape).transpose(1, 2),
            grad_value.view(shape).transpose(1, 2),
            grad_sinks,
            None,
        )


def _by_head(x: Tensor) -> Tensor:
    """[N, L, H, D] → [N * H, L, D]."""
    count, length, heads, width = x.shape
    return x.transpose(1, 2).reshape(count * heads, length, width)


@cache
def causal_mask(length: int, window: int | None) -> Tensor:
    """Return [length, length]: 0 where a query sees a key, else -inf."""
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    if window is not None:
        hidden |= torch.ones(length, length, dtype=torch.bool).tril(-window)
    return torch.zeros(length, length).masked_fill_(hidden, -math.inf)
