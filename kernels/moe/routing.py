# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The way from gate logits or chosen experts to the tiles of the grouped products
(`kernels/moe/tiles.py`), without shapes that depend on data.

The (token, slot) pairs of this rank's experts are counted and sorted by expert, tokens ascending,
by prefix sums over a [tokens, experts] matrix that marks the chosen experts. Up to SINGLE_TOKENS
tokens one program does all of it, including top-k: one launch. More tokens are processed in blocks:
the first launch selects experts and counts, the second adds up the counts of the preceding blocks,
and places the pairs."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SINGLE_TOKENS = 64
"""Maximum number of tokens in a single program: with more, its matrix does not fit in registers (64
x 128 experts take 64 registers in each of 128 threads)."""
_BLOCK_TOKENS = 32
_BLOCK_TILES = 16


@dataclass(frozen=True, slots=True)
class Routing:
    """The assignment of tokens to experts and tiles, on the device.

    Attributes:
        topk_ids: [T, k] int32, global ids, distinct within a row.
        topk_weights: [T, k] fp32.
        tiles: [max_tiles, 4] int32: (local expert, position of the first row, number of rows, 0);
            no rows in a tile that is not needed.
        pairs: [T * k] int32: token * k + slot, sorted by local expert; undefined past the last pair
            of a local expert.
        block_m: number of rows of a tile.
        first_expert, num_local: range of the experts in `tiles` and `pairs`.
    """

    topk_ids: Tensor
    topk_weights: Tensor
    tiles: Tensor
    pairs: Tensor
    block_m: int
    first_expert: int
    num_local: int


@triton.jit
def top_k(
    logits,
    num_experts,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Return ids int32 and softmax over the chosen, both [BLOCK_T, SLOTS], for logits [BLOCK_T,
    EXPERTS] fp32. Of equal logits, the lower id comes first. Slots past TOP_K are -1 and 0."""
    LEAST: tl.constexpr = -(2**31)
    expert, slots = tl.arange(0, EXPERTS), tl.arange(0, SLOTS)
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)  # -0 is 0
    # Integers in the order of the numbers, so that a NaN or an infinity is not chosen twice, nor
    # padding instead of it.
    keys = tl.where((expert < num_experts)[None, :], bits ^ ((bits >> 31) & 0x7FFFFFFF), LEAST)
    values = tl.full((BLOCK_T, SLOTS), float("-inf"), tl.float32)
    ids = tl.full((BLOCK_T, SLOTS), -1, tl.int32)
    for slot in tl.static_range(TOP_K):
        key, best = tl.max(keys, 1, return_indices=True, return_indices_tie_break_left=True)
        best = tl.minimum(best, num_experts - 1)
        value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        keys = tl.where(expert[None, :] == best[:, None], LEAST, keys)
        values = tl.where((slots == slot)[None, :], value[:, None], values)
        ids = tl.where((slots == slot)[None, :], best[:, None], ids)
    powers = tl.exp(values - tl.max(values, 1)[:, None])
    return ids, powers / tl.sum(powers, 1)[:, None]


@triton.jit
def slot_of(ids, slot, SLOTS: tl.constexpr):
    """Return column `slot` of [BLOCK_T, SLOTS]."""
    return tl.sum(tl.where((tl.arange(0, SLOTS) == slot)[None, :], ids, 0), 1)


@triton.jit
def members(
    ids, num_local, TOP_K: tl.constexpr, SLOTS: tl.constexpr, LOCAL: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Convert local ids [BLOCK_T, SLOTS] to [BLOCK_T, LOCAL] int32: 1 if the token chose the
    expert."""
    local = tl.arange(0, LOCAL)
    chosen = tl.zeros((BLOCK_T, LOCAL), tl.int32)
    for slot in tl.static_range(TOP_K):
        chosen |= (slot_of(ids, slot, SLOTS)[:, None] == local[None, :]).to(tl.int32)
    return tl.where((local < num_local)[None, :], chosen, 0)


@triton.jit
def place_pairs(
    pairs_ptr, ids, chosen, places, tokens, TOP_K: tl.constexpr, SLOTS: tl.constexpr, LOCAL: tl.constexpr
):
    """Store each pair of a local expert at its token's position, [BLOCK_T, LOCAL], among the
    expert's rows."""
    local = tl.arange(0, LOCAL)
    for slot in tl.static_range(TOP_K):
        mine = (slot_of(ids, slot, SLOTS)[:, None] == local[None, :]) & (chosen > 0)
        place = tl.sum(tl.where(mine, places, 0), 1)
        tl.store(pairs_ptr + place, tokens * TOP_K + slot, mask=tl.sum(mine.to(tl.int32), 1) > 0)


@triton.jit
def write_tiles(
    tiles_ptr, first, last, counts, LOCAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_TILES: tl.constexpr
):
    """Write the tiles `first` to `last` - 1 for experts with counts [LOCAL] of rows."""
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(tiles, 0)
    starts = ends - tiles
    offsets = tl.cumsum(counts, 0) - counts
    local = tl.arange(0, LOCAL)
    for start in range(first, last, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        mine = (tile[:, None] >= starts[None, :]) & (
            tile[:, None] < ends[None, :]
        )  # [BLOCK_TILES, LOCAL], one expert a tile
        row = (tile[:, None] - starts[None, :]) * BLOCK_M  # within the expert
        at = tiles_ptr + tile * 4
        tl.store(at, tl.sum(tl.where(mine, local[None, :], 0), 1), mask=tile < last)
        tl.store(at + 1, tl.sum(tl.where(mine, offsets[None, :] + row, 0), 1), mask=tile < last)
        tl.store(
            at + 2, tl.minimum(tl.sum(tl.where(mine, counts[None, :] - row, 0), 1), BLOCK_M), mask=tile < last
        )
        tl.store(at + 3, tl.zeros((BLOCK_TILES,), tl.int32), mask=tile < last)


# Arguments that change from step to step must not cause another compilation.
@triton.jit(do_not_specialize=["num_tokens", "first_expert", "max_tiles"])
def choose_experts(
    logits_ptr,
    ids_ptr,
    weights_ptr,
    counts_ptr,
    tiles_ptr,
    pairs_ptr,
    num_tokens,
    num_experts,
    first_expert,
    num_local,
    max_tiles,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
    ROUTES: tl.constexpr,
):
    """Compute top-k and softmax of BLOCK_T tokens (if FROM_LOGITS; otherwise the ids are given),
    and the part of the routing that ROUTES selects: "nothing"; "counts", the number of these tokens
    that chose each local expert; "all", positions and tiles of this program's tokens, which are all
    tokens."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = tokens < num_tokens
    slots = tl.arange(0, SLOTS)
    at = tokens[:, None] * TOP_K + slots[None, :]
    there = exists[:, None] & (slots < TOP_K)[None, :]
    if FROM_LOGITS:
        expert = tl.arange(0, EXPERTS)
        logits_ptrs = logits_ptr + tokens.to(tl.int64)[:, None] * num_experts + expert[None, :]
        logits = tl.load(logits_ptrs, mask=exists[:, None] & (expert < num_experts)[None, :], other=0.0).to(
            tl.float32
        )
        ids, weights = top_k(logits, num_experts, TOP_K, SLOTS, EXPERTS, BLOCK_T)
        tl.store(weights_ptr + at, weights, mask=there)
        tl.store(ids_ptr + at, ids, mask=there)
        ids = tl.where(there, ids, -1)
    else:
        ids = tl.load(ids_ptr + at, mask=there, other=-1)
    if ROUTES != "nothing":
        ids = tl.where(ids < 0, -1, ids - first_expert)
        chosen = members(ids, num_local, TOP_K, SLOTS, LOCAL, BLOCK_T)
        counts = tl.sum(chosen, 0)
        local = tl.arange(0, LOCAL)
        if ROUTES == "counts":
            tl.store(counts_ptr + tl.program_id(0) * num_local + local, counts, mask=local < num_local)
        else:
            places = (tl.cumsum(counts, 0) - counts)[None, :] + tl.cumsum(chosen, 0) - chosen
            place_pairs(pairs_ptr, ids, chosen, places, tokens, TOP_K, SLOTS, LOCAL)
            write_tiles(tiles_ptr, 0, max_tiles, counts, LOCAL, BLOCK_M, BLOCK_TILES)


@triton.jit(do_not_specialize=["num_tokens", "first_expert", "max_tiles"])
def place_tokens(
    ids_ptr,
    counts_ptr,
    tiles_ptr,
    pairs_ptr,
    num_tokens,
    first_expert,
    num_local,
    max_tiles,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Compute positions of the tokens of one block, and this program's share of the tiles, from the
    counts of all blocks [cdiv(T, BLOCK_T), num_local]."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    local = tl.arange(0, LOCAL)
    counts = tl.zeros((LOCAL,), tl.int32)
    before = tl.zeros((LOCAL,), tl.int32)
    for start in range(0, num_blocks, BLOCK_T):
        other = start + tl.arange(0, BLOCK_T)
        mask = (other < num_blocks)[:, None] & (local < num_local)[None, :]
        theirs = tl.load(counts_ptr + other[:, None] * num_local + local[None, :], mask=mask, other=0)
        counts += tl.sum(theirs, 0)
        before += tl.sum(tl.where((other < block)[:, None], theirs, 0), 0)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = tl.arange(0, SLOTS)
    there = (tokens < num_tokens)[:, None] & (slots < TOP_K)[None, :]
    ids = tl.load(ids_ptr + tokens[:, None] * TOP_K + slots[None, :], mask=there, other=-1)
    ids = tl.where(ids < 0, -1, ids - first_expert)
    chosen = members(ids, num_local, TOP_K, SLOTS, LOCAL, BLOCK_T)
    places = (tl.cumsum(counts, 0) - counts + before)[None, :] + tl.cumsum(chosen, 0) - chosen
    place_pairs(pairs_ptr, ids, chosen, places, tokens, TOP_K, SLOTS, LOCAL)
    share = tl.cdiv(max_tiles, num_blocks)
    write_tiles(
        tiles_ptr,
        block * share,
        tl.minimum((block + 1) * share, max_tiles),
        counts,
        LOCAL,
        BLOCK_M,
        BLOCK_TILES,
    )


def max_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Return the maximum number of tiles of block_m rows that the pairs fill, for any assignment to
    experts."""
    started = min(num_pairs, num_experts)
    return started + (num_pairs - started) // block_m


def choose(gate_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compute `kernels.moe.reference.gate_topk`."""
    ids, weights = _chosen(gate_logits.shape[0], k, gate_logits.device)
    _launch(gate_logits.contiguous(), ids, weights, None)
    return ids, weights


def choose_and_route(
    gate_logits: Tensor, k: int, *, first_expert: int, num_local: int, block_m: int
) -> Routing:
    """Select the k experts of highest logit, and compute the tiles of experts first_expert to
    first_expert + num_local - 1.

    Args:
        gate_logits: [T, num_experts] float, contiguous.
    """
    ids, weights = _chosen(gate_logits.shape[0], k, gate_logits.device)
    routing = _empty_routing(ids, weights, first_expert, num_local, block_m)
    _launch(gate_logits, ids, weights, routing)
    return routing


def route(
    topk_ids: Tensor, topk_weights: Tensor, *, first_expert: int, num_local: int, block_m: int
) -> Routing:
    """Run `choose_and_route` for experts that were already selected.

    Args:
        topk_ids: [T, k] int32, contiguous, distinct within a row.
        topk_weights: [T, k] fp32, contiguous.
    """
    routing = _empty_routing(topk_ids, topk_weights, first_expert, num_local, block_m)
    _launch(None, topk_ids, topk_weights, routing)
    return routing


def _chosen(num_tokens: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(num_tokens, k, dtype=torch.int32, device=device),
        torch.empty(num_tokens, k, dtype=torch.float32, device=device),
    )


def _empty_routing(
    topk_ids: Tensor, topk_weights: Tensor, first_expert: int, num_local: int, block_m: int
) -> Routing:
    num_pairs = topk_ids.numel()
    return Routing(
        topk_ids=topk_ids,
        topk_weights=topk_weights,
        tiles=torch.empty(
            max_tiles(num_pairs, num_local, block_m), 4, dtype=torch.int32, device=topk_ids.device
        ),
        pairs=torch.empty(num_pairs, dtype=torch.int32, device=topk_ids.device),
        block_m=block_m,
        first_expert=first_expert,
        num_local=num_local,
    )


def _launch(logits: Tensor | None, ids: Tensor, weights: Tensor, routing: Routing | None) -> None:
    num_tokens, k = ids.shape
    if num_tokens == 0:
        return
    single = num_tokens <= SINGLE_TOKENS
    block_tokens = max(triton.next_power_of_2(num_tokens), 2) if single else _BLOCK_TOKENS
    num_blocks = triton.cdiv(num_tokens, block_tokens)
    num_local = routing.num_local if routing else 1
    counts = ids.new_empty((num_blocks, num_local)) if routing and not single else None
    shared = {
        "num_tokens": num_tokens,
        "first_expert": routing.first_expert if routing else 0,
        "num_local": num_local,
        "max_tiles": len(routing.tiles) if routing else 0,
        "TOP_K": k,
        "SLOTS": triton.next_power_of_2(k),
        "LOCAL": max(triton.next_power_of_2(num_local), 2),
        "BLOCK_T": block_tokens,
        "BLOCK_M": routing.block_m if routing else 1,
        "BLOCK_TILES": _BLOCK_TILES,
        "num_warps": 8 if block_tokens > 16 else 4,
    }
    if logits is not None or single or routing:
        choose_experts[(num_blocks,)](
            logits_ptr=logits,
            ids_ptr=ids,
            weights_ptr=weights,
            counts_ptr=counts,
            tiles_ptr=routing.tiles if routing else None,
            pairs_ptr=routing.pairs if routing else None,
            num_experts=logits.shape[1] if logits is not None else 1,
            EXPERTS=max(triton.next_power_of_2(logits.shape[1]), 2) if logits is not None else 2,
            FROM_LOGITS=logits is not None,
            ROUTES="nothing" if routing is None else "all" if single else "counts",
            **shared,
        )
    if routing and not single:
        place_tokens[(num_blocks,)](
            ids_ptr=ids, counts_ptr=counts, tiles_ptr=routing.tiles, pairs_ptr=routing.pairs, **shared
        )
