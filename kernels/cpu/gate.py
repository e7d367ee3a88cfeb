"""The gate's selection of experts."""

import ctypes

import torch
from torch import Tensor

from kernels.cpu import native, structures


def can_run(device: torch.device) -> bool:
    """Return whether `gate_topk` takes logits on this device: a CPU."""
    return device.type == "cpu" and native.shared_library() is not None


def gate_topk(gate_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compute `kernels.moe.reference.gate_topk`; arguments have been checked there."""
    num_tokens, num_experts = gate_logits.shape
    logits = gate_logits.float().contiguous()
    ids, weights = torch.empty(num_tokens, k, dtype=torch.int32), torch.empty(num_tokens, k)
    arguments = structures.GateTopkArgs(
        native.pointer(logits), native.pointer(ids), native.pointer(weights), num_tokens, num_experts, k
    )
    native.ready().cantata_gate_topk(ctypes.byref(arguments))
    return ids, weights
