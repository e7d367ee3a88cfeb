"""Which tile the grouped products take, by weights, architecture and how many rows an expert has."""

from dataclasses import dataclass

MXFP4 = "mxfp4"
MXFP4_WGMMA = "mxfp4 wgmma"
DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Tile:
    """Constants of one grouped product.

    Attributes:
        block_m: tokens; the same for both products of a layer, which share their tiles.
        block_n: rows of the weights.
        block_k: columns of these in one pass.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


_WGMMA = {
    8: Tile(8, 64, 256, 4, 4),
    16: Tile(16, 128, 128, 4, 4),
    32: Tile(32, 128, 128, 4, 4),
    64: Tile(64, 128, 128, 4, 3),
    128: Tile(128, 128, 128, 8, 3),
}
_NATURAL = {16: Tile(16, 64, 128, 4, 3), 64: Tile(64, 128, 64, 8, 3)}
_DENSE = {16: Tile(16, 64, 64, 4, 3), 64: Tile(64, 128, 64, 8, 3)}
# fp32 is for tests and comparisons: no tensor cores.
_FP32 = {16: Tile(16, 64, 64, 4, 2)}


def choose_tile(weights: str, architecture: str, num_pairs: int, num_experts: int, *, fp32: bool) -> Tile:
    """The tile for `num_pairs` (token, slot) pairs that fall on `num_experts` experts.

    Args:
        weights: MXFP4, MXFP4_WGMMA or DENSE.
        architecture: as `kernels.backend.architecture` names it.
    """
    if fp32:
        return _FP32[16]
    tiles = {MXFP4_WGMMA: _WGMMA, MXFP4: _NATURAL, DENSE: _DENSE}[weights]
    # Twice the mean: a popular expert should not need a second pass over its weights.
    wanted = 2 * num_pairs / num_experts
    return next((tile for tile in tiles.values() if tile.block_m >= wanted), list(tiles.values())[-1])
