"""The mixture of experts by Triton kernels: route and two grouped products. Adding up is
`combine.py`'s."""

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
from kernels.mxfp4 import NATURAL, WGMMA, PackedMXFP4

_DTYPES = (torch.bfloat16, torch.float32)
_QUANTIZED_COLUMNS = 1024


@dataclass(frozen=True, slots=True)
class _Layer:
    """What both products need to know."""

    routing: Routing
    tile: Tile
    kind: str
    limit: float
    alpha: float


def can_run(
    x: Tensor, gate_up: PackedMXFP4 | Tensor, down: PackedMXFP4 | Tensor, mxfp8_activations: bool
) -> bool:
    """Whether there are kernels for these weights: MXFP4 in a layout for GPUs, or dense ones of x's
    dtype."""
    kinds = {_kind(x, weights, mxfp8_activations) for weights in (gate_up, down)}
    return x.dtype in _DTYPES and len(kinds) == 1 and None not in kinds


def _kind(x: Tensor, weights: PackedMXFP4 | Tensor, mxfp8_activations: bool) -> str | None:
    """As `tile_choice` names it."""
    if not isinstance(weights, PackedMXFP4):
        return DENSE if weights.dtype == x.dtype and not mxfp8_activations else None
    if weights.layout == NATURAL:
        return MXFP4_MXFP8 if mxfp8_activations else MXFP4
    return MXFP4_WGMMA if weights.layout == WGMMA and not mxfp8_activations else None


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
    mxfp8_activations: bool,
) -> tuple[Tensor, Routing]:
    """The summands of `kernels.moe.reference.fused_experts`, which see; arguments have been checked
    there, and `can_run` holds.

    Returns:
        ([T * k, H] for each token and slot, undefined where the slot's expert is not here;
        routing): for `kernels.moe.combine`.
    """
    kind, tile = _kind_and_tile(x, topk_ids.shape[1], gate_up, num_experts, mxfp8_activations)
    routing = route(
        topk_ids.to(torch.int32).contiguous(),
        topk_weights.contiguous(),
        first_expert=first_expert,
        num_local=gate_up.shape[0],
        block_m=tile.block_m,
    )
    return _compute(
        x, gate_up, gate_up_bias, down, down_bias, _Layer(routing, tile, kind, swiglu_limit, swiglu_alpha)
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
    first_expert: int,
    mxfp8_activations: bool,
) -> tuple[Tensor, Routing]:
    """`fused_experts` of the choice that `gate_topk` makes, in one launch less."""
    kind, tile = _kind_and_tile(x, k, gate_up, gate_logits.shape[1], mxfp8_activations)
    routing = choose_and_route(
        gate_logits, k, first_expert=first_expert, num_local=gate_up.shape[0], block_m=tile.block_m
    )
    return _compute(
        x, gate_up, gate_up_bias, down, down_bias, _Layer(routing, tile, kind, swiglu_limit, swiglu_alpha)
    )


def _kind_and_tile(
    x: Tensor, k: int, gate_up: PackedMXFP4 | Tensor, num_experts: int, mxfp8_activations: bool
) -> tuple[str, Tile]:
    kind = _kind(x, gate_up, mxfp8_activations)
    assert kind is not None
    fp32 = x.dtype == torch.float32 and not mxfp8_activations
    return kind, choose_tile(kind, architecture(x.device), x.shape[0] * k, num_experts, fp32=fp32)


def _compute(
    x: Tensor,
    gate_up: PackedMXFP4 | Tensor,
    gate_up_bias: Tensor,
    down: PackedMXFP4 | Tensor,
    down_bias: Tensor,
    layer: _Layer,
) -> tuple[Tensor, Routing]:
    _check_memory(x, gate_up, gate_up_bias, down, down_bias)
    routing = layer.routing
    num_pairs = routing.topk_ids.numel()
    hidden_size, width = down.shape[1:]
    results = x.new_empty((num_pairs, hidden_size))
    if num_pairs and layer.kind == MXFP4_MXFP8:
        assert isinstance(gate_up, PackedMXFP4)
        assert isinstance(down, PackedMXFP4)
        activations = _empty_mxfp8(num_pairs, width, x.device)
        _mxfp8_matmul(_quantized(x), gate_up, gate_up_bias, activations, layer)
        _mxfp8_matmul(activations, down, down_bias, (results, None), layer)
    elif num_pairs:
        unscaled = x.new_empty((num_pairs, width))
        _matmul(x, gate_up, gate_up_bias, unscaled, layer, gate_up_product=True)
        _matmul(unscaled, down, down_bias, results, layer, gate_up_product=False)
    return results, routing


def _check_memory(
    x: Tensor,
    gate_up: PackedMXFP4 | Tensor,
    gate_up_bias: Tensor,
    down: PackedMXFP4 | Tensor,
    down_bias: Tensor,
) -> None:
    """Refuse what the kernels would read wrongly.

    Raises:
        ValueError: names the argument.
    """
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
    """(values [num_rows, width] e4m3, scales [num_rows, width / 32] e8m0 as uint8)."""
    return (
        torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(num_rows, width // MX_BLOCK, dtype=torch.uint8, device=device),
    )


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """`round_to_mxfp8` as values and scales."""
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
    """The gate_up product where `out` has scales, else the down product."""
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
