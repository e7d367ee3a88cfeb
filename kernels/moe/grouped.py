"""The mixture of experts by Triton kernels: route, two grouped products, add up."""

import torch
import triton
from torch import Tensor

from kernels.backend import architecture
from kernels.moe.combine import combine
from kernels.moe.matmul_natural import expert_matmul_natural
from kernels.moe.matmul_wgmma import expert_matmul_wgmma
from kernels.moe.routing import Routing, choose_and_route, route
from kernels.moe.tile_choice import DENSE, MXFP4, MXFP4_WGMMA, Tile, choose_tile
from kernels.mxfp4 import NATURAL, WGMMA, PackedMXFP4

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_KINDS = {NATURAL: MXFP4, WGMMA: MXFP4_WGMMA}


def can_run(x: Tensor, gate_up: PackedMXFP4 | Tensor, down: PackedMXFP4 | Tensor) -> bool:
    """Whether there are kernels for these weights: MXFP4 in a layout for GPUs, or dense ones of x's dtype."""
    kinds = {_kind(weights) if isinstance(weights, PackedMXFP4) or weights.dtype == x.dtype else None for weights in (gate_up, down)}
    return x.dtype in _DTYPES and len(kinds) == 1 and None not in kinds and not (x.dtype == torch.float16 and MXFP4_WGMMA in kinds)


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
    first_expert: int,
    num_experts: int,
) -> Tensor:
    """As `kernels.moe.reference.fused_experts`, which see; arguments have been checked there, and `can_run` holds."""
    tile = _tile(x, topk_ids.shape[1], gate_up, num_experts)
    routing = route(
        topk_ids.to(torch.int32).contiguous(),
        topk_weights.contiguous(),
        first_expert=first_expert,
        num_local=gate_up.shape[0],
        block_m=tile.block_m,
    )
    return _routed(x, routing, tile, gate_up, gate_up_bias, down, down_bias, swiglu_limit, swiglu_alpha)


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
    first_expert: int,
) -> Tensor:
    """`fused_experts` of the choice that `gate_topk` makes, in one launch less."""
    tile = _tile(x, k, gate_up, gate_logits.shape[1])
    routing = choose_and_route(gate_logits, k, first_expert=first_expert, num_local=gate_up.shape[0], block_m=tile.block_m)
    return _routed(x, routing, tile, gate_up, gate_up_bias, down, down_bias, swiglu_limit, swiglu_alpha)


def _kind(weights: PackedMXFP4 | Tensor) -> str | None:
    return _KINDS.get(weights.layout) if isinstance(weights, PackedMXFP4) else DENSE


def _tile(x: Tensor, k: int, gate_up: PackedMXFP4 | Tensor, num_experts: int) -> Tile:
    kind = _kind(gate_up)
    assert kind is not None
    return choose_tile(kind, architecture(x.device), x.shape[0] * k, num_experts, fp32=x.dtype == torch.float32)


def _routed(
    x: Tensor,
    routing: Routing,
    tile: Tile,
    gate_up: PackedMXFP4 | Tensor,
    gate_up_bias: Tensor,
    down: PackedMXFP4 | Tensor,
    down_bias: Tensor,
    limit: float,
    alpha: float,
) -> Tensor:
    _check_strides(x, gate_up, gate_up_bias, down, down_bias)
    num_pairs = routing.topk_ids.numel()
    hidden_size, width = down.shape[1:]
    activations = x.new_empty((num_pairs, width))
    results = x.new_empty((num_pairs, hidden_size))
    if num_pairs:
        _matmul(x, gate_up, gate_up_bias, activations, routing, tile, gate_up_product=True, limit=limit, alpha=alpha)
        _matmul(activations, down, down_bias, results, routing, tile, gate_up_product=False, limit=limit, alpha=alpha)
    return combine(results, routing.topk_ids, first_expert=routing.first_expert, num_local=routing.num_local)


def _check_strides(x: Tensor, gate_up: PackedMXFP4 | Tensor, gate_up_bias: Tensor, down: PackedMXFP4 | Tensor, down_bias: Tensor) -> None:
    if x.numel() and x.stride(1) != 1:
        raise ValueError(f"x must have contiguous rows, got strides {x.stride()}")
    parts = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
    for name, weights in (("gate_up", gate_up), ("down", down)):
        if isinstance(weights, PackedMXFP4):
            parts |= {f"{name}.blocks": weights.blocks, f"{name}.scales": weights.scales}
        else:
            parts[name] = weights
    for name, part in parts.items():
        if not part.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {part.stride()}")
        if part.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, got {part.device}")


def _matmul(
    x: Tensor,
    weights: PackedMXFP4 | Tensor,
    bias: Tensor,
    out: Tensor,
    routing: Routing,
    tile: Tile,
    *,
    gate_up_product: bool,
    limit: float,
    alpha: float,
) -> None:
    _, num_rows, width = weights.shape
    packed = isinstance(weights, PackedMXFP4)
    arguments = {
        "x_ptr": x,
        "blocks_ptr": weights.blocks if isinstance(weights, PackedMXFP4) else weights,
        "scales_ptr": weights.scales if isinstance(weights, PackedMXFP4) else None,
        "bias_ptr": bias,
        "out_ptr": out,
        "tiles_ptr": routing.tiles,
        "pairs_ptr": routing.pairs,
        "row_weights_ptr": routing.topk_weights,
        "N": num_rows,
        "K": width,
        "x_stride": x.stride(0),
        "out_stride": out.stride(0),
        "top_k": routing.topk_ids.shape[1],
        "alpha": alpha,
        "limit": limit,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GATE_UP": gate_up_product,
        "NUM_STAGES": tile.num_stages,
        "num_warps": tile.num_warps,
    }
    grid = (triton.cdiv(num_rows, tile.block_n), len(routing.tiles))
    if isinstance(weights, PackedMXFP4) and weights.layout == WGMMA:
        expert_matmul_wgmma[grid](**arguments)
    else:
        expert_matmul_natural[grid](**arguments, PACKED=packed)
