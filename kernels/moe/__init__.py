"""Mixture of experts: selection of each token's experts, and their computation."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import pointwise
from kernels.backend import architecture, triton_runs_on
from kernels.cpu import experts as cpu
from kernels.cpu import gate as cpu_gate
from kernels.implementation import Implementation, cpp_name, slow_reference, triton_name, why_not_compiled
from kernels.moe import reference
from kernels.moe.operations import ExpertOperations, InSteps
from kernels.moe.weights import ExpertWeights
from kernels.mxfp4 import PackedMXFP4

__all__ = ["ExpertOperations", "ExpertWeights", "fused_experts", "gate_topk", "select"]


def select(
    weights: ExpertWeights, dtype: torch.dtype, device: torch.device
) -> Implementation[ExpertOperations]:
    """Select the implementation for these experts.

    Args:
        dtype: dtype of the activations.
        device: device of the activations and weights.
    Raises:
        ValueError: names a part of the weights that a kernel could not read in its present memory
            layout.
    """
    if triton_runs_on(device):
        from kernels.moe import grouped, on_triton, tile_choice

        kind = grouped.kind_of(weights, dtype)
        if kind is not None:
            operations = on_triton.OnTriton(weights, kind, device)
            why = tile_choice.why(kind, architecture(device))
            return Implementation(operations, triton_name(device), why, weights.layout)
        why = f"no Triton kernel takes these weights with {dtype} activations"
    elif cpu.can_run(weights, dtype, device):
        steps = _in_steps(weights, dtype, device, cpu.fused_experts)
        return Implementation(steps, cpp_name(), "decoded in registers", weights.layout)
    elif device.type == "cpu" and weights.mxfp8:
        why = "activations rounded to MXFP8, which only Triton's kernel takes"
    elif device.type == "cpu" and not isinstance(weights.gate_up, PackedMXFP4):
        why = "the C++ kernels take MXFP4 only"
    else:
        why = why_not_compiled(device, dtype)
    steps = _in_steps(weights, dtype, device, reference.fused_experts)
    return slow_reference(steps, why, weights.layout, is_capturable=False)


def _in_steps(
    weights: ExpertWeights,
    dtype: torch.dtype,
    device: torch.device,
    experts: Callable[[Tensor, Tensor, Tensor, ExpertWeights], Tensor],
) -> InSteps:
    return InSteps(weights, _gate(device), experts, pointwise.select(dtype, device).run.add_rms_norm)


def _gate(device: torch.device) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """Return the kernel of `kernels.moe.reference.gate_topk` for this device; arguments must have
    been checked."""
    if triton_runs_on(device):
        from kernels.moe import routing

        return routing.choose
    return cpu_gate.gate_topk if cpu_gate.can_run(device) else reference.gate_topk


def gate_topk(gate_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compute `kernels.moe.reference.gate_topk` with the kernel for this device."""
    reference.check_gate(gate_logits, k)
    return _gate(gate_logits.device)(gate_logits, k)


def fused_experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: ExpertWeights) -> Tensor:
    """Compute `kernels.moe.reference.fused_experts` with the implementation that `select` returns.
    Callers with many inputs for the same weights should keep that implementation."""
    return select(weights, x.dtype, x.device).run.fused_experts(x, topk_ids, topk_weights)
