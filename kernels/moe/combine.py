# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The sum of a token's experts: `out[t] = results[t * k] + ... + results[t * k + k - 1]` over the
slots whose expert is here, in fp32, in the order of the slots, so that a token's sum is the same in
every batch and every run. It runs alone, before an all-reduce; or, without one, in one launch with
the addition to the residual stream and the next RMSNorm, with the same bits."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.moe.routing import Routing
from kernels.pointwise.norm import check_layout, norm_row, tile

_BLOCK_H = 1024


@triton.jit
def _sum_of_slots(results_ptr, ids_ptr, token, h, hidden_size, first_expert, num_local, TOP_K: tl.constexpr):
    """Return columns `h` [BLOCK] of a token's sum, rounded to the dtype of results; 0 past
    hidden_size."""
    total = tl.zeros(h.shape, tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        local = tl.load(ids_ptr + pair) - first_expert
        end = tl.where((local >= 0) & (local < num_local), hidden_size, 0)
        total += tl.load(results_ptr + pair * hidden_size + h, mask=h < end, other=0.0).to(tl.float32)
    return total.to(results_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["first_expert", "num_local"])
def add_slots(
    results_ptr,
    ids_ptr,
    out_ptr,
    hidden_size,
    first_expert,
    num_local,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = _sum_of_slots(results_ptr, ids_ptr, token, h, hidden_size, first_expert, num_local, TOP_K)
    tl.store(out_ptr + token * hidden_size + h, total, mask=h < hidden_size)


@triton.jit(do_not_specialize=["first_expert", "num_local"])
def add_slots_rms_norm(
    residual_ptr, results_ptr, ids_ptr, weight_ptr, out_ptr, residual_stride, hidden_size, first_expert,
    num_local, eps,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    in_row = h < hidden_size
    delta = _sum_of_slots(results_ptr, ids_ptr, token, h, hidden_size, first_expert, num_local, TOP_K)
    residual = tl.load(residual_ptr + token * residual_stride + h, mask=in_row, other=0.0)
    total = (residual.to(tl.float32) + delta.to(tl.float32)).to(residual.dtype)
    tl.store(residual_ptr + token * residual_stride + h, total, mask=in_row)
    normed = norm_row(total.to(tl.float32), weight_ptr, h, in_row, hidden_size, eps)
    tl.store(out_ptr + token * hidden_size + h, normed.to(out_ptr.dtype.element_ty), mask=in_row)


def combine(results: Tensor, routing: Routing) -> Tensor:
    """Sum over each token's slots.

    Args:
        results: [T * k, H], contiguous; rows of other ranks' experts are not read.
    Returns:
        [T, H], dtype of results.
    """
    num_tokens, k = routing.topk_ids.shape
    hidden_size = results.shape[1]
    out = results.new_empty((num_tokens, hidden_size))
    if out.numel():
        grid = (num_tokens, triton.cdiv(hidden_size, _BLOCK_H))
        add_slots[grid](
            results,
            routing.topk_ids,
            out,
            hidden_size,
            routing.first_expert,
            routing.num_local,
            TOP_K=k,
            BLOCK_H=_BLOCK_H,
            num_warps=4,
        )
    return out


def combine_add_rms_norm(
    results: Tensor, routing: Routing, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute `kernels.pointwise.add_rms_norm` of a residual stream and `combine`; arguments have
    been checked by the caller.

    Args:
        residual: [T, H], dtype of results; overwritten.
        weight: [H].
    Raises:
        ValueError: the last axis of residual or weight is not contiguous, or wider than
            `kernels.pointwise.norm.MAX_WIDTH`.
    """
    check_layout(residual=residual, weight=weight)
    num_tokens, k = routing.topk_ids.shape
    hidden_size = results.shape[1]
    normed = results.new_empty((num_tokens, hidden_size))
    if normed.numel():
        add_slots_rms_norm[(num_tokens,)](
            residual,
            results,
            routing.topk_ids,
            weight,
            normed,
            residual.stride(0),
            hidden_size,
            routing.first_expert,
            routing.num_local,
            eps,
            TOP_K=k,
            **tile(hidden_size),
        )
    return residual, normed
