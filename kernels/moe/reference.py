"""Mixture of experts in torch, fp32 inside.

A token's result depends on its own activations and experts only, bit for bit on CPU: rows go
through `kernels.linear`, elementwise operations are ones that vectorised and remainder loops
compute alike, and a token's experts are added in ascending order of their ids.
"""

import torch
from torch import Tensor

from kernels.formats import MX_BLOCK
from kernels.linear import linear
from kernels.moe.weights import ExpertWeights
from kernels.mxfp4 import PackedMXFP4, unpack

_E4M3_EXPONENT, _E4M3_LARGEST = 8, 448.0


def gate_topk(gate_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k experts of highest logit for each token, most likely first, and the softmax over
    only these. Of equal logits, the lower expert id comes first.

    Args:
        gate_logits: [T, E] float.
    Returns:
        (topk_ids [T, k] int32, topk_weights [T, k] fp32).
    Raises:
        ValueError: gate_logits is not a matrix, or k is not in 1 to E.
    """
    check_gate(gate_logits, k)
    values, ids = gate_logits.float().sort(dim=-1, descending=True, stable=True)
    return ids[:, :k].to(torch.int32), values[:, :k].softmax(dim=-1)


def fused_experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: ExpertWeights) -> Tensor:
    """Return the weighted sum of each token's experts: gate_up projection, clamped SwiGLU, down
    projection, both with bias.

    With g the even and u the odd rows of gate_up, `g` clamped from above at the limit and `u` on
    both sides, the activation is `(u + 1) * g * sigmoid(alpha * g)`. Only experts chosen by some
    token are decoded or computed; chosen experts that are not in `weights` add nothing here.

    Args:
        x: [T, H] float.
        topk_ids: [T, k] integer, below weights.num_experts, distinct within a row.
        topk_weights: [T, k] fp32.
    Returns:
        [T, H], dtype of x.
    Raises:
        ValueError: names the argument of a wrong shape or dtype.
    """
    check_experts(x, topk_ids, topk_weights, weights)
    check_ids(topk_ids, weights.num_experts)
    wide = round_to_mxfp8(x) if weights.mxfp8 else x.float()
    out = torch.zeros_like(wide)
    for expert, tokens, slots in _tokens_by_expert(topk_ids.long() - weights.first_expert, weights.num_local):
        bias = weights.gate_up_bias[expert].float()
        hidden = linear(wide[tokens], _dense_expert(weights.gate_up, expert), bias)
        hidden = _swiglu(hidden, weights.swiglu_limit, weights.swiglu_alpha)
        if weights.mxfp8:
            hidden = round_to_mxfp8(hidden)
        hidden = linear(hidden, _dense_expert(weights.down, expert), weights.down_bias[expert].float())
        out.index_add_(0, tokens, hidden * topk_weights[tokens, slots, None])
    return out.to(x.dtype)


def _tokens_by_expert(local_ids: Tensor, num_local: int) -> list[tuple[int, Tensor, Tensor]]:
    """Return (expert, tokens [n] ascending, their slots [n]) for the experts 0 to num_local - 1
    with at least one token, in ascending order."""
    k = local_ids.shape[1]
    pairs = ((local_ids >= 0) & (local_ids < num_local)).reshape(-1).nonzero()[:, 0]
    experts = local_ids.reshape(-1)[pairs]
    groups = torch.split(pairs[experts.argsort(stable=True)], experts.bincount().tolist())
    return [(expert, group // k, group % k) for expert, group in enumerate(groups) if len(group)]


def _dense_expert(weights: PackedMXFP4 | Tensor, expert: int) -> Tensor:
    """Return an expert's weights, [N, K] fp32."""
    if isinstance(weights, PackedMXFP4):
        return unpack(weights.expert(expert), torch.float32)[0]
    return weights[expert].float()


def _swiglu(hidden: Tensor, limit: float, alpha: float) -> Tensor:
    """Compute [n, 2I], gate and up interleaved → [n, I]."""
    gate = hidden[:, 0::2].clamp(max=limit)
    up = hidden[:, 1::2].clamp(min=-limit, max=limit)
    # Not torch.sigmoid: its vectorised loop and its remainder loop round differently, so a row's
    # result would depend on its position.
    return (up + 1) * (gate / (1 + torch.exp(gate * -alpha)))


def round_to_mxfp8(x: Tensor) -> Tensor:
    """Return the values of MXFP8 (e4m3) for [..., K], K a multiple of 32, in fp32: groups of 32
    share the scale 2^(floor(log2(max|x|)) - 8), but at least 2^-126. Values are rounded to nearest
    even and saturate at 448.

    Follows: OCP Microscaling Formats (MX) Specification 1.0, section 6.3.
    """
    groups = x.float().reshape(*x.shape[:-1], x.shape[-1] // MX_BLOCK, MX_BLOCK)
    exponent = (torch.frexp(groups.abs().amax(-1, keepdim=True)).exponent - 1 - _E4M3_EXPONENT).clamp(
        min=-126
    )
    values = torch.ldexp(groups, -exponent).clamp(-_E4M3_LARGEST, _E4M3_LARGEST).to(torch.float8_e4m3fn)
    return torch.ldexp(values.float(), exponent).view(x.shape)


def check_gate(gate_logits: Tensor, k: int) -> None:
    """Refuse arguments that `gate_topk` cannot take.

    Raises:
        ValueError: names the argument.
    """
    if gate_logits.ndim != 2:
        raise ValueError(f"gate_logits must be [T, E], got shape {list(gate_logits.shape)}")
    if not 1 <= k <= gate_logits.shape[1]:
        raise ValueError(f"k must be from 1 to the {gate_logits.shape[1]} experts, got {k}")


def check_experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: ExpertWeights) -> None:
    """Refuse arguments that `fused_experts` cannot take, except ids out of range (`check_ids`).

    Raises:
        ValueError: names the argument.
    """
    check_tokens(x, weights)
    if topk_ids.ndim != 2 or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(f"topk_ids must be [{x.shape[0]}, k], got shape {list(topk_ids.shape)}")
    if topk_ids.dtype.is_floating_point:
        raise ValueError(f"topk_ids must be integers, got {topk_ids.dtype}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(f"topk_weights must be {list(topk_ids.shape)}, got shape {list(topk_weights.shape)}")
    if topk_weights.dtype != torch.float32:
        raise ValueError(f"topk_weights must be torch.float32, got {topk_weights.dtype}")


def check_tokens(x: Tensor, weights: ExpertWeights) -> None:
    """Refuse activations that do not fit the experts.

    Raises:
        ValueError: names the argument.
    """
    if x.ndim != 2 or x.shape[1] != weights.hidden_size:
        raise ValueError(f"x must be [T, {weights.hidden_size}], got shape {list(x.shape)}")


def check_choice(x: Tensor, gate_logits: Tensor, k: int, weights: ExpertWeights) -> None:
    """Refuse activations and logits that do not fit together or the experts.

    Raises:
        ValueError: names the argument.
    """
    check_gate(gate_logits, k)
    check_tokens(x, weights)
    if gate_logits.shape != (x.shape[0], weights.num_experts):
        raise ValueError(
            f"gate_logits must be {[x.shape[0], weights.num_experts]}, got shape {list(gate_logits.shape)}"
        )


def check_ids(topk_ids: Tensor, num_experts: int) -> None:
    """Refuse ids of experts that do not exist. Reads the ids back from the device.

    Raises:
        ValueError: names the argument.
    """
    if topk_ids.numel() and not 0 <= int(topk_ids.min()) <= int(topk_ids.max()) < num_experts:
        raise ValueError(
            f"topk_ids must be from 0 to {num_experts - 1}, found {int(topk_ids.min())} to "
            f"{int(topk_ids.max())}"
        )
