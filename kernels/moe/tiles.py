# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Code shared by the grouped matrix products of the experts: the rows of their tiles, and the
processing of a finished tile.

A tile is BLOCK_M tokens of one expert by BLOCK_N of its output rows. `tiles` int32 [max_tiles, 4]
has for each (local expert, position of the first row, number of rows, 0), rows counted in the order
of `pairs` int32 [T * k], the (token, slot) pairs sorted by expert; a pair is token * k + slot.
Tiles that are not needed have no rows.

The gate_up product gathers: row `place` of its output is token `pairs[place] // k` of its input.
The down product scatters: row `place` of its input goes to row `pairs[place]` of its output, times
the pair's gate weight. So each pair's result has a row of its own, and adding a token's k results
up in a fixed order needs no atomics."""

import triton
import triton.language as tl


@triton.jit
def tile_rows(tiles_ptr, pairs_ptr, top_k, BLOCK_M: tl.constexpr, GATHER: tl.constexpr):
    """Return the tile of this program, by axis 1 of the grid: (local expert, rows to read, mask of
    those that exist)."""
    tile = tiles_ptr + tl.program_id(1) * 4
    expert = tl.load(tile)
    first = tl.load(tile + 1)
    row = tl.arange(0, BLOCK_M)
    exists = row < tl.load(tile + 2)
    places = first + row
    if GATHER:
        pairs = tl.load(pairs_ptr + places, mask=exists, other=0)  # [BLOCK_M]
        return expert.to(tl.int64), (pairs // top_k).to(tl.int64), exists
    return expert.to(tl.int64), places.to(tl.int64), exists


@triton.jit
def rows_to_write(tiles_ptr, pairs_ptr, BLOCK_M: tl.constexpr, GATHER: tl.constexpr):
    """Return, for use after the loop, (rows to write, their pairs, mask of those that exist).

    They are loaded again, and with a modifier (`.ca`, the default caching) by which the compiler
    does not take them for the loads of `tile_rows`: otherwise a thread would hold a register or
    more for every row of the tile throughout the loop."""
    tile = tiles_ptr + tl.program_id(1) * 4
    row = tl.arange(0, BLOCK_M)
    places = tl.load(tile + 1, cache_modifier=".ca") + row
    exists = row < tl.load(tile + 2, cache_modifier=".ca")
    pairs = tl.load(pairs_ptr + places, mask=exists, other=0, cache_modifier=".ca")  # [BLOCK_M]
    if GATHER:
        return places.to(tl.int64), pairs, exists
    return pairs.to(tl.int64), pairs, exists


@triton.jit
def swiglu(gate, up, alpha, limit):
    """Compute gpt-oss's SwiGLU, `(up + 1) * gate * sigmoid(alpha * gate)`, gate clamped from above,
    up on both sides; in fp32."""
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    return (up + 1.0) * (gate / (1.0 + tl.exp(-alpha * gate)))
