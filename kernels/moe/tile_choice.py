"""Selection of the tile of the grouped products, by weights, architecture and number of rows per
expert.

The tiles are selected by their compiled code (`python3 -m benchmarks.kernel_report`, table in
docs/kernels.md), never by timing: no spills; few instructions per weight, so that memory and not
the processor limits small batches; and with one row per expert narrow tiles, because four experts
of 5760 rows are only 180 tiles of 128 rows for 132 processors."""

from collections.abc import Sequence
from dataclasses import dataclass

MXFP4 = "mxfp4"
"""Weights in the layout `natural`."""
MXFP4_WGMMA = "mxfp4 wgmma"
DENSE = "dense"
MXFP4_MXFP8 = "mxfp4 x mxfp8"
"""Weights in the layout `natural`, with activations in MXFP8."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Constants of one grouped product.

    Attributes:
        block_m: number of tokens; the same for both products of a layer, which share their tiles.
        block_n: number of rows of the weights.
        block_k: number of columns of these in one pass.
        max_rows: maximum of twice the mean rows of an expert for which the tile is taken; None for
            block_m.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_rows: int | None = None


# By ascending block_m. Never 8 rows: for those Triton 3.7, which comes with torch 2.13, generates
# no wgmma, and decodes through shared memory.
_WGMMA = (
    Tile(16, 64, 256, 4, 4, max_rows=8),
    Tile(16, 128, 128, 4, 4),
    Tile(32, 128, 128, 4, 4),
    Tile(64, 128, 128, 4, 3),
    Tile(128, 128, 128, 8, 3),
)
_MXFP8 = (
    Tile(16, 128, 256, 4, 3),
    Tile(32, 128, 256, 4, 3),
    Tile(64, 128, 256, 4, 3),
    Tile(128, 128, 128, 8, 3),
)
# gpt-oss's widths are multiples of 64, so that the kernel needs no masks along K.
_DENSE = (Tile(16, 64, 64, 4, 4), Tile(32, 128, 64, 4, 4), Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 8, 3))
_AMPERE = (
    Tile(16, 64, 128, 4, 3),
    Tile(32, 128, 128, 4, 2),
    Tile(64, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 3),
)
_NATURAL = {
    "sm_80": _AMPERE,
    "sm_89": _AMPERE,
    # For the checkpoint's layout on sm_90; `wgmma.v1` is better.
    "sm_90": (Tile(16, 128, 128, 4, 3), Tile(64, 64, 128, 4, 3)),
    # With fewer than 256 rows decoding takes longer than the product itself; with Triton 3.7 at 128
    # rows, twice as long.
    "sm_100": (
        Tile(16, 64, 256, 4, 3),
        Tile(32, 128, 128, 4, 3),
        Tile(64, 128, 128, 4, 3),
        Tile(128, 128, 128, 8, 2),
        Tile(256, 128, 128, 8, 2),
    ),
    "sm_120": (
        Tile(16, 128, 128, 4, 3),
        Tile(32, 128, 128, 4, 3),
        Tile(64, 128, 64, 4, 3),
        Tile(128, 128, 64, 8, 3),
    ),
    "gfx942": (Tile(16, 128, 128, 4, 2), Tile(32, 128, 128, 4, 2), Tile(64, 128, 128, 4, 2)),
    "gfx950": (
        Tile(16, 64, 256, 4, 2),
        Tile(32, 128, 128, 4, 2),
        Tile(64, 128, 128, 4, 2),
        Tile(128, 128, 128, 8, 2),
    ),
}
ARCHITECTURES = tuple(_NATURAL)
"""Architectures with tiles of their own."""
_FP32 = (Tile(16, 64, 64, 8, 2),)
"""Tiles for tests and comparisons."""


def tiles(weights: str, architecture: str) -> Sequence[Tile]:
    """Return the tiles from which `choose_tile` selects for bf16 activations, by ascending block_m.

    Args:
        weights: MXFP4, MXFP4_WGMMA, MXFP4_MXFP8 or DENSE.
        architecture: as `kernels.backend.architecture` names it. One without tiles of its own gets
            those of its family.
    """
    if weights != MXFP4:
        return {MXFP4_WGMMA: _WGMMA, MXFP4_MXFP8: _MXFP8, DENSE: _DENSE}[weights]
    if architecture.startswith("sm_"):
        family = {"10": "sm_100", "11": "sm_100", "12": "sm_120", "9": "sm_90"}.get(
            architecture[3:-1], "sm_80"
        )
    else:
        family = "gfx942"
    return _NATURAL.get(architecture, _NATURAL[family])


def why(weights: str, architecture: str) -> str:
    """Return how the weights are processed, as a clause for the user.

    Args:
        weights, architecture: as for `tiles`.
    """
    if weights == DENSE:
        return "the checkpoint's weights are not quantised"
    if weights == MXFP4_MXFP8:
        return "activations rounded to MXFP8, scaled blocks are multiplied as they are"
    if weights == MXFP4_WGMMA:
        return "decoded in registers in front of wgmma"
    if architecture in ARCHITECTURES or architecture == "cpu":
        return "decoded by tl.dot_scaled"
    return f"{architecture} is not known to this version: the checkpoint's layout and tiles of its family"


def choose_tile(weights: str, architecture: str, num_pairs: int, num_experts: int, *, fp32: bool) -> Tile:
    """Return the tile for `num_pairs` (token, slot) pairs spread over `num_experts` experts."""
    choice = _FP32 if fp32 else tiles(weights, architecture)
    # Twice the mean: a popular expert should not require a second pass over its weights.
    wanted = 2 * num_pairs / num_experts
    return next((tile for tile in choice if (tile.max_rows or tile.block_m) >= wanted), choice[-1])
