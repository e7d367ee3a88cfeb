"""The mixture of experts on MXFP4 weights in the layout `rows16`: fp32 activations and sums,
weights decoded in registers."""

import ctypes

import torch
from torch import Tensor

from kernels.cpu import native, structures
from kernels.mxfp4 import ROWS16, PackedMXFP4


def can_run(x: Tensor, gate_up: PackedMXFP4, down: PackedMXFP4, bias_dtype: torch.dtype) -> bool:
    """Whether `fused_experts` takes these: CPU tensors in fp32 or bf16, weights in its layout,
    biases fp32 or bf16."""
    in_layout = gate_up.layout == down.layout == ROWS16
    known = x.dtype in native.DATA_TYPES and bias_dtype in native.DATA_TYPES
    return in_layout and known and x.is_cpu and native.shared_library() is not None


def fused_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: PackedMXFP4,
    gate_up_bias: Tensor,
    down: PackedMXFP4,
    down_bias: Tensor,
    *,
    swiglu_limit: float,
    swiglu_alpha: float,
    first_expert: int,
) -> Tensor:
    """As `kernels.moe.reference.fused_experts`, which see; arguments have been checked there.

    A token's result is the same, bit for bit, whatever the other tokens and the number of threads.
    """
    num_tokens, hidden = x.shape
    num_experts, double_width, _ = gate_up.shape
    x = x.contiguous()
    ids, weights = topk_ids.to(torch.int32).contiguous(), topk_weights.contiguous()
    gate_up_bias, down_bias = gate_up_bias.contiguous(), down_bias.contiguous()
    out = torch.empty_like(x)
    arguments = structures.ExpertsArgs(
        x=native.pointer(x),
        topk_ids=native.pointer(ids),
        topk_weights=native.pointer(weights),
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
        first_expert=first_expert,
        num_experts=num_experts,
        limit=swiglu_limit,
        alpha=swiglu_alpha,
        type=native.DATA_TYPES[x.dtype],
        bias_type=native.DATA_TYPES[gate_up_bias.dtype],
    )
    native.ready().cantata_experts(ctypes.byref(arguments))
    return out
