"""Mixture of experts: choice of experts and their computation."""

from typing import TYPE_CHECKING

from torch import Tensor

from kernels.backend import checks_indices, runs_triton
from kernels.cpu import experts as cpu
from kernels.cpu import gate as cpu_gate
from kernels.moe import reference
from kernels.mxfp4 import PackedMXFP4
from kernels.pointwise import add_rms_norm

if TYPE_CHECKING:
    from kernels.moe.routing import Routing

__all__ = ["fused_experts", "gate_topk", "gated_experts", "gated_experts_add_rms_norm"]


def gate_topk(gate_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`kernels.moe.reference.gate_topk`, which defines it, by the kernel for this device."""
    reference.check_gate(gate_logits, k)
    if runs_triton(gate_logits):
        from kernels.moe import routing

        return routing.choose(gate_logits.contiguous(), k)
    return (
        cpu_gate.gate_topk(gate_logits, k)
        if cpu_gate.can_run(gate_logits)
        else reference.gate_topk(gate_logits, k)
    )


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
    first_expert: int = 0,
    num_experts: int | None = None,
    mxfp8_activations: bool = False,
) -> Tensor:
    """`kernels.moe.reference.fused_experts`, which defines it, by the kernel for these weights and
    this device.

    On a GPU, expert ids are taken as they are (`kernels.backend.checks_indices`).
    """
    arguments = (x, topk_ids, topk_weights, gate_up, gate_up_bias, down, down_bias)
    reference.check_experts(*arguments, first_expert, num_experts)
    reference.check_mxfp8(mxfp8_activations, gate_up, down)
    total = gate_up.shape[0] if num_experts is None else num_experts
    if _triton_takes(x, gate_up, down, mxfp8_activations):
        from kernels.moe import combine, grouped

        if checks_indices():
            reference.check_ids(topk_ids, total)
        results, routing = grouped.fused_experts(
            *arguments,
            swiglu_limit=swiglu_limit,
            swiglu_alpha=swiglu_alpha,
            first_expert=first_expert,
            num_experts=total,
            mxfp8_activations=mxfp8_activations,
        )
        return combine.combine(results, routing)
    reference.check_ids(topk_ids, total)
    return _without_triton(
        *arguments,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
        first_expert=first_expert,
        num_experts=total,
        mxfp8_activations=mxfp8_activations,
    )


def gated_experts(
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
    mxfp8_activations: bool = False,
) -> Tensor:
    """`fused_experts` of the choice that `gate_topk` makes; on a GPU choice and routing are one
    launch.

    Args:
        gate_logits: [T, num_experts] float.
    """
    weights = (gate_up, gate_up_bias, down, down_bias)
    if not _triton_takes(x, gate_up, down, mxfp8_activations):
        arguments = (x, *gate_topk(gate_logits, k), *weights)
        reference.check_experts(*arguments, first_expert, gate_logits.shape[1])
        reference.check_mxfp8(mxfp8_activations, gate_up, down)
        return _without_triton(
            *arguments,
            swiglu_limit=swiglu_limit,
            swiglu_alpha=swiglu_alpha,
            first_expert=first_expert,
            num_experts=gate_logits.shape[1],
            mxfp8_activations=mxfp8_activations,
        )
    from kernels.moe import combine

    results, routing = _summands(
        x, gate_logits, k, *weights, swiglu_limit, swiglu_alpha, first_expert, mxfp8_activations
    )
    return combine.combine(results, routing)


def gated_experts_add_rms_norm(
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
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
    mxfp8_activations: bool = False,
) -> tuple[Tensor, Tensor]:
    """`kernels.pointwise.add_rms_norm` of a residual stream and `gated_experts`, with the bits of
    the two; on a GPU the norm and the sum over a token's experts are one launch.

    Args:
        residual: [T, H], dtype of x; may be overwritten.
        norm_weight: [H] float.
    Returns:
        (the sum, its RMSNorm), both as residual.
    """
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual must be {list(x.shape)} {x.dtype} as x is, got {list(residual.shape)} {residual.dtype}"
        )
    if norm_weight.shape != x.shape[-1:]:
        raise ValueError(f"norm_weight must be {list(x.shape[-1:])}, got shape {list(norm_weight.shape)}")
    weights = (gate_up, gate_up_bias, down, down_bias)
    if _triton_takes(x, gate_up, down, mxfp8_activations):
        from kernels.moe import combine

        results, routing = _summands(
            x, gate_logits, k, *weights, swiglu_limit, swiglu_alpha, first_expert, mxfp8_activations
        )
        return combine.combine_add_rms_norm(results, routing, residual, norm_weight, eps)
    delta = gated_experts(
        x,
        gate_logits,
        k,
        *weights,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
        first_expert=first_expert,
        mxfp8_activations=mxfp8_activations,
    )
    return add_rms_norm(residual, delta, norm_weight, eps)


def _summands(
    x: Tensor,
    gate_logits: Tensor,
    k: int,
    gate_up: PackedMXFP4 | Tensor,
    gate_up_bias: Tensor,
    down: PackedMXFP4 | Tensor,
    down_bias: Tensor,
    swiglu_limit: float,
    swiglu_alpha: float,
    first_expert: int,
    mxfp8_activations: bool,
) -> "tuple[Tensor, Routing]":
    """What `gated_experts` adds up, by Triton, for `kernels.moe.combine`."""
    from kernels.moe import grouped

    reference.check_gate(gate_logits, k)
    if x.shape[:1] != gate_logits.shape[:1]:
        raise ValueError(
            f"gate_logits must have a row for each of {x.shape[0]} tokens, got shape "
            f"{list(gate_logits.shape)}"
        )
    reference.check_weights(x, gate_up, gate_up_bias, down, down_bias, first_expert, gate_logits.shape[1])
    reference.check_mxfp8(mxfp8_activations, gate_up, down)
    return grouped.gated_experts(
        x,
        gate_logits.contiguous(),
        k,
        gate_up,
        gate_up_bias,
        down,
        down_bias,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
        first_expert=first_expert,
        mxfp8_activations=mxfp8_activations,
    )


def _triton_takes(
    x: Tensor, gate_up: PackedMXFP4 | Tensor, down: PackedMXFP4 | Tensor, mxfp8_activations: bool
) -> bool:
    if not runs_triton(x):
        return False
    from kernels.moe import grouped

    return grouped.can_run(x, gate_up, down, mxfp8_activations)


def _without_triton(
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
    first_expert: int,
    num_experts: int,
    mxfp8_activations: bool,
) -> Tensor:
    """By the C++ kernel or the reference; arguments, ids among them, have been checked."""
    if (
        isinstance(gate_up, PackedMXFP4)
        and isinstance(down, PackedMXFP4)
        and gate_up_bias.dtype == down_bias.dtype
        and cpu.can_run(x, gate_up, down, gate_up_bias.dtype)
        and not mxfp8_activations
    ):
        return cpu.fused_experts(
            x,
            topk_ids,
            topk_weights,
            gate_up,
            gate_up_bias,
            down,
            down_bias,
            swiglu_limit=swiglu_limit,
            swiglu_alpha=swiglu_alpha,
            first_expert=first_expert,
        )
    return reference.fused_experts(
        x,
        topk_ids,
        topk_weights,
        gate_up,
        gate_up_bias,
        down,
        down_bias,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
        first_expert=first_expert,
        num_experts=num_experts,
        mxfp8_activations=mxfp8_activations,
    )
