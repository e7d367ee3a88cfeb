"""Mixture of experts in torch, fp32 inside.

A token's result depends on its own activations and experts only, bit for bit on CPU: rows go through `kernels.linear`, elementwise
operations are ones that vectorised and remainder loops compute alike, and a token's experts are added in ascending order of their ids.
"""

import torch
from torch import Tensor

from kernels.linear import linear
from kernels.mxfp4 import PackedMXFP4, unpack


def gate_topk(gate_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k experts of highest logit for each token, most likely first, and the softmax over just these. Ties: the lower expert id.

    Args:
        gate_logits: [T, E] float.
    Returns:
        (topk_ids [T, k] int32, topk_weights [T, k] fp32).
    Raises:
        ValueError: gate_logits is not a matrix, or k is not in 1 to E.
    """
    if gate_logits.ndim != 2:
        raise ValueError(f"gate_logits must be [T, E], got shape {list(gate_logits.shape)}")
    if not 1 <= k <= gate_logits.shape[1]:
        raise ValueError(f"k must be from 1 to the {gate_logits.shape[1]} experts, got {k}")
    values, ids = gate_logits.float().sort(dim=-1, descending=True, stable=True)
    return ids[:, :k].to(torch.int32), values[:, :k].softmax(dim=-1)


def fused_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: PackedMXFP4 | Tensor,
    gate_up_bias: Tensor,
    down: PackedMXFP4 | Tensor,
    down_bias: Tensor,
    *,
    swiglu_limit: float,
    swiglu_alpha: float,
) -> Tensor:
    """Weighted sum of each token's experts: gate_up projection, clamped SwiGLU, down projection, both with bias.

    With g the even and u the odd rows of gate_up, `g` clamped above at the limit and `u` to both sides of it, the activation is
    `(u + 1) * g * sigmoid(alpha * g)`. Only experts that some token chose are decoded or computed.

    Args:
        x: [T, H] float.
        topk_ids: [T, k] integer, distinct within a row.
        topk_weights: [T, k] fp32.
        gate_up: [E, 2I, H], packed or dense.
        gate_up_bias: [E, 2I] float.
        down: [E, H, I], packed or dense.
        down_bias: [E, H] float.
    Returns:
        [T, H], dtype of x.
    Raises:
        ValueError: names the argument of a wrong shape or dtype.
    """
    _check_experts(x, topk_ids, topk_weights, gate_up, gate_up_bias, down, down_bias)
    wide = x.float()
    out = torch.zeros_like(wide)
    for expert, tokens, slots in _tokens_by_expert(topk_ids):
        hidden = linear(wide[tokens], _dense_expert(gate_up, expert), gate_up_bias[expert].float())
        hidden = _swiglu(hidden, swiglu_limit, swiglu_alpha)
        hidden = linear(hidden, _dense_expert(down, expert), down_bias[expert].float())
        out.index_add_(0, tokens, hidden * topk_weights[tokens, slots, None])
    return out.to(x.dtype)


def _tokens_by_expert(topk_ids: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """(expert, tokens [n] ascending, their slots [n]) of the experts that are hit, in ascending order."""
    flat = topk_ids.reshape(-1).long()
    groups = torch.split(flat.argsort(stable=True), flat.bincount().tolist())
    k = topk_ids.shape[1]
    return [(expert, group // k, group % k) for expert, group in enumerate(groups) if len(group)]


def _dense_expert(weights: PackedMXFP4 | Tensor, expert: int) -> Tensor:
    """[N, K] fp32."""
    if isinstance(weights, PackedMXFP4):
        return unpack(weights.expert(expert), torch.float32)[0]
    return weights[expert].float()


def _swiglu(hidden: Tensor, limit: float, alpha: float) -> Tensor:
    """[n, 2I], gate and up interleaved → [n, I]."""
    gate = hidden[:, 0::2].clamp(max=limit)
    up = hidden[:, 1::2].clamp(min=-limit, max=limit)
    # Not torch.sigmoid: its vectorised loop and its remainder loop round differently, so a row's result would depend on its place.
    return (up + 1) * (gate / (1 + torch.exp(gate * -alpha)))


def _check_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: PackedMXFP4 | Tensor,
    gate_up_bias: Tensor,
    down: PackedMXFP4 | Tensor,
    down_bias: Tensor,
) -> None:
    if x.ndim != 2:
        raise ValueError(f"x must be [T, H], got shape {list(x.shape)}")
    num_tokens, hidden_size = x.shape
    if topk_ids.ndim != 2 or topk_ids.shape[0] != num_tokens:
        raise ValueError(f"topk_ids must be [{num_tokens}, k], got shape {list(topk_ids.shape)}")
    if topk_ids.dtype.is_floating_point:
        raise ValueError(f"topk_ids must be integers, got {topk_ids.dtype}")
    if len(gate_up.shape) != 3 or gate_up.shape[2] != hidden_size or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [E, 2I, {hidden_size}], got shape {list(gate_up.shape)}")
    num_experts, double_width, _ = gate_up.shape
    expected = {
        "topk_weights": (topk_weights.shape, tuple(topk_ids.shape)),
        "gate_up_bias": (gate_up_bias.shape, (num_experts, double_width)),
        "down": (down.shape, (num_experts, hidden_size, double_width // 2)),
        "down_bias": (down_bias.shape, (num_experts, hidden_size)),
    }
    for name, (shape, wanted) in expected.items():
        if tuple(shape) != wanted:
            raise ValueError(f"{name} must be {list(wanted)}, got shape {list(shape)}")
    if topk_weights.dtype != torch.float32:
        raise ValueError(f"topk_weights must be torch.float32, got {topk_weights.dtype}")
    if topk_ids.numel() and not 0 <= int(topk_ids.min()) <= int(topk_ids.max()) < num_experts:
        raise ValueError(f"topk_ids must be from 0 to {num_experts - 1}, found {int(topk_ids.min())} to {int(topk_ids.max())}")
