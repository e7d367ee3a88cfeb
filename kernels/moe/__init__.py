"""Mixture of experts: choice of experts and their computation."""

from kernels.moe.reference import fused_experts, gate_topk

__all__ = ["fused_experts", "gate_topk"]
