# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""A token's experts added up: `out[t] = results[t * k] + ... + results[t * k + k - 1]` over the slots whose expert is here, in fp32, in the
order of the slots, so that a token's sum is the same in every batch and every run."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK_H = 1024


@triton.jit(do_not_specialize=["first_expert", "num_local"])
def add_slots(results_ptr, ids_ptr, out_ptr, hidden_size, first_expert, num_local, TOP_K: tl.constexpr, BLOCK_H: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        local = tl.load(ids_ptr + pair) - first_expert
        end = tl.where((local >= 0) & (local < num_local), hidden_size, 0)
        total += tl.load(results_ptr + pair * hidden_size + h, mask=h < end, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * hidden_size + h, total.to(out_ptr.dtype.element_ty), mask=h < hidden_size)


def combine(results: Tensor, topk_ids: Tensor, *, first_expert: int, num_local: int) -> Tensor:
    """Sum over each token's slots.

    Args:
        results: [T * k, H], contiguous; rows of other ranks' experts are not read.
        topk_ids: [T, k] int32, contiguous.
    Returns:
        [T, H], dtype of results.
    """
    num_tokens, k = topk_ids.shape
    hidden_size = results.shape[1]
    out = results.new_empty((num_tokens, hidden_size))
    if out.numel():
        grid = (num_tokens, triton.cdiv(hidden_size, _BLOCK_H))
        add_slots[grid](results, topk_ids, out, hidden_size, first_expert, num_local, TOP_K=k, BLOCK_H=_BLOCK_H, num_warps=4)
    return out
