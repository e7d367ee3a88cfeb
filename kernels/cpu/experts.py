"""The mixture of experts on MXFP4 weights in the layout `rows16`: fp32 activations and sums,
weights decoded in registers."""

import ctypes

import torch
from torch import Tensor

from kernels.cpu import native, structures
from kernels.moe.weights import ExpertWeights
from kernels.mxfp4 import ROWS16, PackedMXFP4


def can_run(weights: ExpertWeights, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether `fused_experts` takes these weights, in its layout, with activations of this
    dtype: CPU tensors in fp32 or bf16, including biases."""
    in_layout = all(
        isinstance(part, PackedMXFP4) and part.layout == ROWS16 for part in (weights.gate_up, weights.down)
    )
    known = dtype in native.DATA_TYPES and weights.gate_up_bias.dtype in native.DATA_TYPES
    same = weights.gate_up_bias.dtype == weights.down_bias.dtype
    usable = device.type == "cpu" and native.shared_library() is not None
    return in_layout and known and same and usable and not weights.mxfp8


def fused_experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: ExpertWeights) -> Tensor:
    """Compute `kernels.moe.reference.fused_experts`; arguments have been checked, and `can_run`
    holds.

    A token's result is the same, bit for bit, whatever the other tokens and the number of threads.
    """
    gate_up, down = weights.gate_up, weights.down
    assert isinstance(gate_up, PackedMXFP4)
    assert isinstance(down, PackedMXFP4)
    num_tokens, hidden = x.shape
    num_experts, double_width, _ = gate_up.shape
    x = x.contiguous()
    ids, factors = topk_ids.to(torch.int32).contiguous(), topk_weights.contiguous()
    gate_up_bias, down_bias = weights.gate_up_bias.contiguous(), weights.down_bias.contiguous()
    out = torch.empty_like(x)
    arguments = structures.ExpertsArgs(
        x=native.pointer(x),
        topk_ids=native.pointer(ids),
        topk_weights=native.pointer(factors),
        gate_up_blocks=native.pointer(gate_up.blocks),
        gate_up_scales=native.pointer(gate_up.scales),
        down_blocks=native.pointer(down.blocks),
        down_scales=native.pointer(down.scales),
        gate_up_bias=native.pointer(gate_up_bias),
        down_bias=native.pointer(down_bias),
        out=native.pointer(out),
        num_tokens=num_tokens,
        top_k=topk_ids.shape[1],
        hidden=hidden,
        intermediate=double_width // 2,
        first_expert=weights.first_expert,
        num_experts=num_experts,
        limit=weights.swiglu_limit,
        alpha=weights.swiglu_alpha,
        type=native.DATA_TYPES[x.dtype],
        bias_type=native.DATA_TYPES[gate_up_bias.dtype],
    )
    native.ready().cantata_experts(ctypes.byref(arguments))
    return out
