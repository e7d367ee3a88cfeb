# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Selection of a token for each row on the device: steps 2 to 4 of `kernels/sampling/reference.py`,
which defines them.

A row is cut into chunks, so that even a single row keeps much of the GPU busy; the results of the
chunks are combined in a fixed order.

- Greedy: the best candidate of each chunk, then of the row. Two launches.
- Random: the weights' sum in each chunk, then the chunk in which the running sum passes the target,
  and the token in it. Three launches.
- top_k and top_p keep a front part of the order by logit. Its end is a logit and a number of tokens
  that have exactly this logit; it is found by radix search over the logits' bits, most significant
  first: how much (tokens, or weight) lies in each of 16 bins, in which bin the end is, and again
  inside this bin. No sorting, no atomics, BITS of 32 a launch, and chunks that hold none of the bin
  just pass by.

Weights are fp32, their sums float64, as in the reference; everything that does not depend on
rounding is the same, bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling.batch import SamplingBatch
from kernels.sampling.keys import (
    LEAST,
    candidate_id,
    candidate_value,
    candidates,
    key_of,
    load_logits,
    value_of,
)

CHUNK = 8192
"""Number of tokens per program: 25 programs for a row of gpt-oss, each with 32 KiB in flight."""
TILE = 256
"""Number of tokens in one pass of a search program: 16 bins of float64 for each take 32 registers
of a thread."""
SKIP = 2048
"""Number of tokens that are skipped at once if none is in the bin."""
BITS = 4
NUM_BINS = 1 << BITS
NUM_LEVELS = 32 // BITS


@triton.jit
def chunk_best_kernel(logits_ptr, best_ptr, stride, vocab_size, CHUNK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_logits(logits_ptr + row * stride, at, vocab_size)  # [CHUNK]
    tl.store(best_ptr + row * tl.num_programs(1) + chunk, tl.max(candidates(x, at, vocab_size), axis=0))


@triton.jit
def _best_of_row(best_ptr, row, num_chunks, BLOCK_CHUNKS: tl.constexpr):
    chunks = tl.arange(0, BLOCK_CHUNKS)
    return tl.max(
        tl.load(best_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=LEAST), axis=0
    )


@triton.jit
def greedy_kernel(best_ptr, token_ids_ptr, num_chunks, BLOCK_CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tl.store(token_ids_ptr + row, candidate_id(_best_of_row(best_ptr, row, num_chunks, BLOCK_CHUNKS)))


@triton.jit
def _weights(x, top, temperature, min_p_ptr, has_min_p, row):
    """Return fp32 weights, 1 for the largest logit; those below min_p, where the vector holds one,
    are 0."""
    # The case x >= top is not left to exp: 0 / temperature is NaN if the reciprocal of a tiny
    # temperature is infinite, and so is inf - inf.
    weight = tl.where(x >= top, 1.0, tl.exp((x - top) / temperature))
    return tl.where((has_min_p != 0) & (weight < tl.load(min_p_ptr + row)), 0.0, weight)


@triton.jit
def _narrowed(bins, prefix, above, wanted, NUM_BINS: tl.constexpr):
    """Return the bin of the end: the highest for which its measure and that of all above it are
    enough.

    Args:
        bins: [NUM_BINS] float64, measure of each bin of the present level.
        prefix: the leading bits of the keys in the present bin, uint32.
        above: measure of all keys above it.
    Returns:
        (prefix with the bin's bits appended, measure above it, measure in it)
    """
    index = tl.arange(0, NUM_BINS)
    enough = above + tl.cumsum(bins, axis=0, reverse=True) >= wanted
    chosen = tl.max(tl.where(enough, index, 0), axis=0)
    above += tl.sum(tl.where(index > chosen, bins, 0.0), axis=0)
    inside = tl.sum(tl.where(index == chosen, bins, 0.0), axis=0)
    return prefix * NUM_BINS + chosen.to(tl.uint32), above, inside


@triton.jit
def _load_bins(bins_ptr, row, num_chunks, BLOCK_CHUNKS: tl.constexpr, NUM_BINS: tl.constexpr):
    """Return [NUM_BINS], summed over the row's chunks."""
    chunk, index = tl.arange(0, BLOCK_CHUNKS)[:, None], tl.arange(0, NUM_BINS)[None, :]
    at = (row * num_chunks + chunk) * NUM_BINS + index
    return tl.sum(tl.load(bins_ptr + at, mask=chunk < num_chunks, other=0.0), axis=0)


@triton.jit
def _leading_bits(key, levels, BITS: tl.constexpr):
    """Return the leading bits of a key after `levels` levels, uint32."""
    return (key.to(tl.uint64) >> (32 - BITS * levels).to(tl.uint64)).to(tl.uint32)


@triton.jit
def _searches(row, temperature_ptr, top_k_ptr, top_p_ptr, vocab_size, MASS: tl.constexpr):
    """Return whether the search has to find the end of this row's order."""
    if MASS:
        wanted = tl.load(top_p_ptr + row) < 1
    else:
        top_k = tl.load(top_k_ptr + row)
        wanted = (top_k > 0) & (top_k < vocab_size)
    return wanted & (tl.load(temperature_ptr + row) > 0)


@triton.jit
def _state(
    level_bins, level, row, prefix_ptr, amounts_ptr, top_k_ptr, top_p_ptr, excess_ptr, MASS: tl.constexpr
):
    """Return (prefix, above, wanted) of the search at this level: the state before its bins, which
    are `level_bins`. At the first level it is the initial state, and wanted is computed from the
    parameters and the bins."""
    if MASS:
        total = tl.sum(level_bins, axis=0)
        if excess_ptr is not None:
            total -= tl.load(excess_ptr + row)
        wanted = tl.load(top_p_ptr + row).to(tl.float64) * total
    else:
        wanted = tl.load(top_k_ptr + row).to(tl.float64)
    first = level == 1
    prefix = tl.where(first, 0, tl.load(prefix_ptr + row)).to(tl.uint32)
    above = tl.where(first, 0.0, tl.load(amounts_ptr + 2 * row))
    return prefix, above, tl.where(first, wanted, tl.load(amounts_ptr + 2 * row + 1))


_SCRATCH = ["old_bins_ptr", "old_prefix_ptr", "old_amounts_ptr", "bins_ptr", "prefix_ptr", "amounts_ptr"]


@triton.jit(do_not_specialize=["level", "has_min_p"], do_not_specialize_on_alignment=_SCRATCH)
def search_kernel(
    logits_ptr,
    best_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    has_min_p,
    floor_ptr,
    excess_ptr,
    old_bins_ptr,
    old_prefix_ptr,
    old_amounts_ptr,
    bins_ptr,
    prefix_ptr,
    amounts_ptr,
    stride,
    vocab_size,
    num_chunks,
    level,
    MASS: tl.constexpr,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
    SKIP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    NUM_BINS: tl.constexpr = 1 << BITS
    if not _searches(row, temperature_ptr, top_k_ptr, top_p_ptr, vocab_size, MASS):
        return
    prefix = tl.full((), 0, tl.uint32)
    if level > 0:
        old = _load_bins(old_bins_ptr, row, num_chunks, BLOCK_CHUNKS, NUM_BINS)
        prefix, above, wanted = _state(
            old, level, row, old_prefix_ptr, old_amounts_ptr, top_k_ptr, top_p_ptr, excess_ptr, MASS
        )
        prefix, above, _ = _narrowed(old, prefix, above, wanted, NUM_BINS)
        if chunk == 0:
            tl.store(prefix_ptr + row, prefix.to(tl.int64))
            tl.store(amounts_ptr + 2 * row, above)
            tl.store(amounts_ptr + 2 * row + 1, wanted)
    top = candidate_value(_best_of_row(best_ptr, row, num_chunks, BLOCK_CHUNKS))
    temperature = tl.load(temperature_ptr + row)
    floor = tl.full((), 0, tl.uint32)
    if floor_ptr is not None:
        floor = tl.load(floor_ptr + row).to(tl.uint32)
    index = tl.arange(0, NUM_BINS)[:, None]
    totals = tl.zeros((NUM_BINS, TILE), tl.float64)
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, vocab_size), SKIP):
        wide = first + tl.arange(0, SKIP)
        keys = key_of(load_logits(logits_ptr + row * stride, wide, vocab_size))
        if tl.max((_leading_bits(keys, level, BITS) == prefix).to(tl.int32), axis=0) > 0:
            for start in range(first, tl.minimum(first + SKIP, vocab_size), TILE):
                at = start + tl.arange(0, TILE)
                x = load_logits(logits_ptr + row * stride, at, vocab_size)  # [TILE]
                key = key_of(x)
                counted = (at < vocab_size) & (key >= floor) & (_leading_bits(key, level, BITS) == prefix)
                if MASS:
                    measure = tl.where(
                        counted, _weights(x, top, temperature, min_p_ptr, has_min_p, row), 0.0
                    ).to(tl.float64)
                else:
                    measure = counted.to(tl.float64)
                in_bin = (_leading_bits(key, level + 1, BITS) & (NUM_BINS - 1)).to(tl.int32)
                totals += tl.where(in_bin[None, :] == index, measure[None, :], 0.0)
    at_bins = (row * num_chunks + chunk) * NUM_BINS + tl.arange(0, NUM_BINS)
    tl.store(bins_ptr + at_bins, tl.sum(totals, axis=1))


@triton.jit(do_not_specialize=["has_min_p"], do_not_specialize_on_alignment=_SCRATCH[3:])
def finish_search_kernel(
    best_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    has_min_p,
    floor_ptr,
    excess_ptr,
    bins_ptr,
    prefix_ptr,
    amounts_ptr,
    floor_ties_ptr,
    end_ptr,
    end_ties_ptr,
    end_excess_ptr,
    vocab_size,
    num_chunks,
    NUM_LEVELS: tl.constexpr,
    MASS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Compute the end from the last level's bins: the lowest key kept, the number of kept tokens
    with exactly this key, and the weight of those with it that are not kept.

    A row without a search keeps the end of the search before (`floor`), or all tokens.
    """
    row = tl.program_id(0).to(tl.int64)
    end = tl.full((), 0, tl.int64)
    ties = tl.full((), 0, tl.int64) + vocab_size
    excess = tl.full((), 0.0, tl.float64)
    if floor_ptr is not None:
        end = tl.load(floor_ptr + row)
        ties = tl.load(floor_ties_ptr + row)
    if _searches(row, temperature_ptr, top_k_ptr, top_p_ptr, vocab_size, MASS):
        bins = _load_bins(bins_ptr, row, num_chunks, BLOCK_CHUNKS, NUM_BINS)
        prefix, above, wanted = _state(
            bins, NUM_LEVELS, row, prefix_ptr, amounts_ptr, top_k_ptr, top_p_ptr, excess_ptr, MASS
        )
        key, above, inside = _narrowed(bins, prefix, above, wanted, NUM_BINS)
        top = candidate_value(_best_of_row(best_ptr, row, num_chunks, BLOCK_CHUNKS))
        weight = _weights(value_of(key), top, tl.load(temperature_ptr + row), min_p_ptr, has_min_p, row).to(
            tl.float64
        )
        if MASS:
            missing = tl.maximum(tl.ceil((wanted - above) / weight), 1.0)
            missing = tl.where(weight > 0, tl.minimum(missing, 2147483647.0), 1.0).to(tl.int64)
            ties = tl.where(key.to(tl.int64) == end, tl.minimum(missing, ties), missing)
        else:
            ties = (wanted - above).to(tl.int64)
            excess = (inside - (wanted - above)) * weight
        end = key.to(tl.int64)
    tl.store(end_ptr + row, end)
    tl.store(end_ties_ptr + row, ties)
    if end_excess_ptr is not None:
        tl.store(end_excess_ptr + row, excess)


@triton.jit(do_not_specialize=["has_min_p"])
def chunk_sum_kernel(
    logits_ptr, best_ptr, temperature_ptr, min_p_ptr, has_min_p, end_ptr, sums_ptr, ties_ptr, stride,
    vocab_size, CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """Compute the weight of each chunk's tokens, of those above the end if there is one, and the
    number of tokens at the end."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_chunks = tl.num_programs(1)
    temperature = tl.load(temperature_ptr + row)
    if temperature <= 0:
        return
    top = candidate_value(_best_of_row(best_ptr, row, num_chunks, BLOCK_CHUNKS))
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_logits(logits_ptr + row * stride, at, vocab_size)  # [CHUNK]
    counted = at < vocab_size
    if end_ptr is not None:
        end, key = tl.load(end_ptr + row).to(tl.uint32), key_of(x)
        tl.store(ties_ptr + row * num_chunks + chunk, tl.sum((counted & (key == end)).to(tl.int32), axis=0))
        counted = counted & (key > end)
    weights = tl.where(counted, _weights(x, top, temperature, min_p_ptr, has_min_p, row), 0.0)
    tl.store(sums_ptr + row * num_chunks + chunk, tl.sum(weights.to(tl.float64), axis=0))


@triton.jit(do_not_specialize=["has_min_p"])
def pick_kernel(
    logits_ptr,
    best_ptr,
    temperature_ptr,
    min_p_ptr,
    has_min_p,
    seeds_ptr,
    positions_ptr,
    end_ptr,
    end_ties_ptr,
    sums_ptr,
    ties_ptr,
    token_ids_ptr,
    stride,
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    best = _best_of_row(best_ptr, row, num_chunks, BLOCK_CHUNKS)
    temperature = tl.load(temperature_ptr + row)
    if temperature <= 0:
        tl.store(token_ids_ptr + row, candidate_id(best))
        return
    top = candidate_value(best)
    chunks = tl.arange(0, BLOCK_CHUNKS)
    at_chunks, in_row = row * num_chunks + chunks, chunks < num_chunks
    sums = tl.load(sums_ptr + at_chunks, mask=in_row, other=0.0)  # [BLOCK_CHUNKS] float64
    ties_before = tl.zeros((BLOCK_CHUNKS,), tl.int64)
    end = tl.full((), 0, tl.uint32)
    kept_ties = tl.full((), 0, tl.int64)
    if end_ptr is not None:
        end, kept_ties = tl.load(end_ptr + row).to(tl.uint32), tl.load(end_ties_ptr + row)
        ties = tl.load(ties_ptr + at_chunks, mask=in_row, other=0).to(tl.int64)
        ties_before = tl.cumsum(ties, axis=0) - ties
        kept_here = tl.minimum(tl.maximum(kept_ties - ties_before, 0), ties)
        weight = _weights(value_of(end), top, temperature, min_p_ptr, has_min_p, row).to(tl.float64)
        sums += tl.where(kept_here > 0, kept_here.to(tl.float64) * weight, 0.0)
    running = tl.cumsum(sums, axis=0)
    # The first word of Philox4x32-10 for this seed and position, as (word + 0.5) / 2^32.
    position = tl.load(positions_ptr + row).to(tl.uint64)
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(tl.load(seeds_ptr + row).to(tl.uint64), low, high, low * 0, low * 0)
    target = (word.to(tl.float64) + 0.5) / 4294967296.0 * tl.max(running, axis=0)
    chunk = tl.minimum(tl.sum((in_row & (running <= target)).to(tl.int32), axis=0), num_chunks - 1)
    before = tl.sum(tl.where(chunks < chunk, sums, 0.0), axis=0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_logits(logits_ptr + row * stride, at, vocab_size)  # [CHUNK]
    kept = at < vocab_size
    if end_ptr is not None:
        key = key_of(x)
        tied = kept & (key == end)
        rank = tl.cumsum(tied.to(tl.int32), axis=0) + tl.sum(
            tl.where(chunks == chunk, ties_before, 0), axis=0
        )
        kept = kept & ((key > end) | (tied & (rank <= kept_ties)))
    weights = tl.where(kept, _weights(x, top, temperature, min_p_ptr, has_min_p, row), 0.0).to(tl.float64)
    passed = before + tl.cumsum(weights, axis=0) > target
    first = tl.min(tl.where(passed & (weights > 0), at, vocab_size), axis=0)
    # Because of rounding alone, the sum may not pass the target: then the last kept token is taken.
    last = tl.max(tl.where(weights > 0, at, 0), axis=0)
    tl.store(token_ids_ptr + row, tl.where(first < vocab_size, first, last).to(tl.int64))


def choose(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Return the sampled token of each row.

    Args:
        logits: [S, V] float, contiguous in the last axis, after step 1.
    Returns:
        [S] int64.
    """
    num_rows, vocab_size = logits.shape
    device = logits.device
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return token_ids
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    sizes = {"CHUNK": CHUNK, "num_warps": 8}
    block = {"BLOCK_CHUNKS": triton.next_power_of_2(num_chunks)}
    grid = (num_rows, num_chunks)
    best = torch.empty(grid, dtype=torch.int64, device=device)
    chunk_best_kernel[grid](logits, best, logits.stride(0), vocab_size, **sizes)
    if batch.temperature is None:
        greedy_kernel[(num_rows,)](best, token_ids, num_chunks, **block, num_warps=1)
        return token_ids
    end, end_ties = _end_of_order(logits, best, batch)
    sums = torch.empty(grid, dtype=torch.float64, device=device)
    ties = None if end is None else torch.empty(grid, dtype=torch.int32, device=device)
    parameters = (batch.temperature, *_min_p(batch))
    chunk_sum_kernel[grid](
        logits, best, *parameters, end, sums, ties, logits.stride(0), vocab_size, **block, **sizes
    )
    pick_kernel[(num_rows,)](
        logits,
        best,
        *parameters,
        batch.seeds,
        batch.output_positions,
        end,
        end_ties,
        sums,
        ties,
        token_ids,
        logits.stride(0),
        vocab_size,
        num_chunks,
        **block,
        **sizes,
    )
    return token_ids


def _end_of_order(logits: Tensor, best: Tensor, batch: SamplingBatch) -> tuple[Tensor | None, Tensor | None]:
    """Return the part of each row that top_k and top_p keep: ([S] lowest key kept, [S] number of
    tokens with this key), int64; None if no row has either."""
    end, ties, excess = None, None, None
    if batch.top_k is not None:
        excess = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
        end, ties = _search(logits, best, batch, None, None, None, excess)
    if batch.top_p is not None:
        end, ties = _search(logits, best, batch, end, ties, excess, None)
    return end, ties


def _search(
    logits: Tensor,
    best: Tensor,
    batch: SamplingBatch,
    floor: Tensor | None,
    floor_ties: Tensor | None,
    floor_excess: Tensor | None,
    excess: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run one search: for top_k, or for top_p below the end that top_k found.

    Args:
        floor, floor_ties, floor_excess: that end, and the weight of its ties that are not kept;
            None for top_k, or if there is no such end.
        excess: [S] float64, receives that weight; None for top_p.
    """
    mass = excess is None
    num_rows, vocab_size = logits.shape
    num_chunks = best.shape[1]
    block = {"BLOCK_CHUNKS": triton.next_power_of_2(num_chunks)}
    # Two buffers each, in turn: what one level leaves for the next.
    bins = torch.empty(2, num_rows, num_chunks, NUM_BINS, dtype=torch.float64, device=logits.device)
    prefixes = torch.empty(2, num_rows, dtype=torch.int64, device=logits.device)
    amounts = torch.empty(2, num_rows, 2, dtype=torch.float64, device=logits.device)
    parameters = (
        batch.temperature,
        None if mass else batch.top_k,
        batch.top_p if mass else None,
        *_min_p(batch),
        floor,
        floor_excess,
    )
    for level in range(NUM_LEVELS):
        old, new = (level + 1) % 2, level % 2
        search_kernel[(num_rows, num_chunks)](
            logits,
            best,
            *parameters,
            *(state[old] for state in (bins, prefixes, amounts)),
            *(state[new] for state in (bins, prefixes, amounts)),
            logits.stride(0),
            vocab_size,
            num_chunks,
            level,
            MASS=mass,
            BITS=BITS,
            CHUNK=CHUNK,
            SKIP=SKIP,
            TILE=TILE,
            num_warps=8,
            **block,
        )
    last = (NUM_LEVELS - 1) % 2
    end = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    ties = torch.empty_like(end)
    finish_search_kernel[(num_rows,)](
        best,
        *parameters,
        *(state[last] for state in (bins, prefixes, amounts)),
        floor_ties,
        end,
        ties,
        excess,
        vocab_size,
        num_chunks,
        NUM_LEVELS=NUM_LEVELS,
        MASS=mass,
        NUM_BINS=NUM_BINS,
        **block,
        num_warps=1,
    )
    return end, ties


def _min_p(batch: SamplingBatch) -> tuple[Tensor | None, int]:
    """Return (a vector, whether it is min_p), so that batches without min_p need no kernel of their
    own."""
    return (batch.temperature, 0) if batch.min_p is None else (batch.min_p, 1)
