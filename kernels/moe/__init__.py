"""Mixture of experts: choice of experts and their computation."""

from torch import Tensor

from kernels.cpu import experts as cpu
from kernels.cpu import gate as cpu_gate
from kernels.moe import reference
from kernels.mxfp4 import PackedMXFP4

__all__ = ["fused_experts", "gate_topk"]


def gate_topk(gate_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`kernels.moe.reference.gate_topk`, which defines it, by the kernel for this device."""
    if not cpu_gate.can_run(gate_logits):
        return reference.gate_topk(gate_logits, k)
    reference.check_gate(gate_logits, k)
    return cpu_gate.gate_topk(gate_logits, k)


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
) -> Tensor:
    """`kernels.moe.reference.fused_experts`, which defines it, by the kernel for these weights and this device."""
    if not (
        isinstance(gate_up, PackedMXFP4)
        and isinstance(down, PackedMXFP4)
        and gate_up_bias.dtype == down_bias.dtype
        and cpu.can_run(x, gate_up, down, gate_up_bias.dtype)
    ):
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
        )
    reference.check_experts(x, topk_ids, topk_weights, gate_up, gate_up_bias, down, down_bias, first_expert, num_experts)
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
