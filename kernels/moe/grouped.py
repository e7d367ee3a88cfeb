"""The mixture of experts by Triton kernels: routing and two grouped products. `combine.py` adds up
the results."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.backend import architecture
from kernels.formats import MX_BLOCK
from kernels.moe.matmul_mxfp8 import expert_matmul_mxfp8, quantize_rows
from kernels.moe.matmul_natural import expert_matmul_natural
from kernels.moe.matmul_wgmma import expert_matmul_wgmma
from kernels.moe.routing import Routing, choose_and_route, route
from kernels.moe.tile_choice import DENSE, MXFP4, MXFP4_MXFP8, MXFP4_WGMMA, Tile, choose_tile
from kernels.moe.weights import ExpertWeights
from kernels.mxfp4 import NATURAL, WGMMA, PackedMXFP4

_DTYPES = (torch.bfloat16, torch.float32)
_QUANTIZED_COLUMNS = 1024


@dataclass(frozen=True, slots=True)
class _Layer:
    """Arguments shared by both products."""

    routing: Routing
    tile: Tile
    kind: str
    limit: float
    alpha: float


def kind_of(weights: ExpertWeights, dtype: torch.dtype) -> str | None:
    """Return the kind of product, as `tile_choice` names it, that takes these weights with
    activations of this dtype: MXFP4 in a layout for GPUs, or dense weights of the same dtype. None
    if there is none."""
    kinds = {_kind(part, dtype, weights.mxfp8) for part in (weights.gate_up, weights.down)}
    return kinds.pop() if dtype in _DTYPES and len(kinds) == 1 else None


def _kind(weights: PackedMXFP4 | Tensor, dtype: torch.dtype, mxfp8: bool) -> str | None:
    if not isinstance(weights, PackedMXFP4):
        return DENSE if weights.dtype == dtype and not mxfp8 else None
    if weights.layout == NATURAL:
        return MXFP4_MXFP8 if mxfp8 else MXFP4
    return MXFP4_WGMMA if weights.layout == WGMMA and not mxfp8 else None


def fused_experts(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: ExpertWeights, kind: str
) -> tuple[Tensor, Routing]:
    """Compute the summands of `kernels.moe.reference.fused_experts`; arguments must have been
    checked.

    Args:
        kind: `kind_of` for the weights and x's dtype.
    Returns:
        ([T * k, H] for each token and slot, undefined where the slot's expert is not here;
        routing): for `kernels.moe.combine`.
    """
    tile = _tile(x, topk_ids.shape[1], weights, kind)
    routing = route(
        topk_ids.to(torch.int32).contiguous(),
        topk_weights.contiguous(),
        first_expert=weights.first_expert,
        num_local=weights.num_local,
        block_m=tile.block_m,
    )
    return _compute(x, weights, _Layer(routing, tile, kind, weights.swiglu_limit, weights.swiglu_alpha))


def gated_experts(
    x: Tensor, gate_logits: Tensor, k: int, weights: ExpertWeights, kind: str
) -> tuple[Tensor, Routing]:
    """Compute `fused_experts` for the experts that `gate_topk` selects, with one launch less."""
    tile = _tile(x, k, weights, kind)
    routing = choose_and_route(
        gate_logits,
        k,
        first_expert=weights.first_expert,
        num_local=weights.num_local,
        block_m=tile.block_m,
    )
    return _compute(x, weights, _Layer(routing, tile, kind, weights.swiglu_limit, weights.swiglu_alpha))


def _tile(x: Tensor, k: int, weights: ExpertWeights, kind: str) -> Tile:
    fp32 = x.dtype == torch.float32 and kind != MXFP4_MXFP8
    return choose_tile(kind, architecture(x.device), x.shape[0] * k, weights.num_experts, fp32=fp32)


def _compute(x: Tensor, weights: ExpertWeights, layer: _Layer) -> tuple[Tensor, Routing]:
    if x.numel() and x.stride(1) != 1:
        raise ValueError(f"x must have contiguous rows, got strides {x.stride()}")
    routing, gate_up, down = layer.routing, weights.gate_up, weights.down
    num_pairs = routing.topk_ids.numel()
    hidden_size, width = down.shape[1:]
    results = x.new_empty((num_pairs, hidden_size))
    if num_pairs and layer.kind == MXFP4_MXFP8:
        assert isinstance(gate_up, PackedMXFP4)
        assert isinstance(down, PackedMXFP4)
        activations = _empty_mxfp8(num_pairs, width, x.device)
        _mxfp8_matmul(_quantized(x), gate_up, weights.gate_up_bias, activations, layer)
        _mxfp8_matmul(activations, down, weights.down_bias, (results, None), layer)
    elif num_pairs:
        unscaled = x.new_empty((num_pairs, width))
        _matmul(x, gate_up, weights.gate_up_bias, unscaled, layer, gate_up_product=True)
        _matmul(unscaled, down, weights.down_bias, results, layer, gate_up_product=False)
    return results, routing


def check_memory(weights: ExpertWeights, device: torch.device) -> None:
    """Refuse weights whose layout in memory the kernels would misread.

    Raises:
        ValueError: names the argument.
    """
    parts = {"gate_up_bias": weights.gate_up_bias, "down_bias": weights.down_bias}
    for name, part in (("gate_up", weights.gate_up), ("down", weights.down)):
        if isinstance(part, PackedMXFP4):
            parts |= {f"{name}.blocks": part.blocks, f"{name}.scales": part.scales}
        else:
            parts[name] = part
    for name, tensor in parts.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        if tensor.device.type != device.type or device.index not in (None, tensor.device.index):
            raise ValueError(f"{name} must be on {device} as activations are, got {tensor.device}")


def _grid(num_rows: int, layer: _Layer) -> tuple[int, int]:
    return triton.cdiv(num_rows, layer.tile.block_n), len(layer.routing.tiles)


def _matmul(
    x: Tensor,
    weights: PackedMXFP4 | Tensor,
    bias: Tensor,
    out: Tensor,
    layer: _Layer,
    *,
    gate_up_product: bool,
) -> None:
    _, num_rows, width = weights.shape
    routing, tile = layer.routing, layer.tile
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
        "alpha": layer.alpha,
        "limit": layer.limit,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GATE_UP": gate_up_product,
        "NUM_STAGES": tile.num_stages,
        "num_warps": tile.num_warps,
    }
    if layer.kind == MXFP4_WGMMA:
        expert_matmul_wgmma[_grid(num_rows, layer)](**arguments)
    else:
        even = width % tile.block_k == 0
        expert_matmul_natural[_grid(num_rows, layer)](**arguments, PACKED=layer.kind == MXFP4, EVEN_K=even)


def _empty_mxfp8(num_rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return uninitialised (values [num_rows, width] e4m3, scales [num_rows, width / 32] e8m0 as
    uint8)."""
    return (
        torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(num_rows, width // MX_BLOCK, dtype=torch.uint8, device=device),
    )


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `round_to_mxfp8` of x as values and scales."""
    num_tokens, width = x.shape
    values, scales = _empty_mxfp8(num_tokens, width, x.device)
    grid = (num_tokens, triton.cdiv(width, _QUANTIZED_COLUMNS))
    quantize_rows[grid](x, values, scales, width, x.stride(0), BLOCK=_QUANTIZED_COLUMNS, num_warps=4)
    return values, scales


def _mxfp8_matmul(
    x: tuple[Tensor, Tensor],
    weights: PackedMXFP4,
    bias: Tensor,
    out: tuple[Tensor, Tensor | None],
    layer: _Layer,
) -> None:
    """Compute the gate_up product if `out` has scales, else the down product."""
    _, num_rows, width = weights.shape
    routing, tile = layer.routing, layer.tile
    expert_matmul_mxfp8[_grid(num_rows, layer)](
        *x,
        weights.blocks,
        weights.scales,
        bias,
        *out,
        routing.tiles,
        routing.pairs,
        routing.topk_weights,
        num_rows,
        width,
        out[0].stride(0),
        routing.topk_ids.shape[1],
        layer.alpha,
        layer.limit,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GATE_UP=out[1] is not None,
        NUM_STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )
