"""The layout `rows16`: MXFP4 weights in groups of 16 rows, so that a column of a group is a vector.

blocks uint8 [E, N/16, K/8, 64]: 8 columns of a group as 16 little-endian words of 32 bits, one for
each row. Bits 4j to 4j + 3 of a word are column 2j and bits 16 + 4j to 19 + 4j column 2j + 1:
shifted by 4j, a vector of words has a pair of neighbouring columns in the positions from which a
lookup by 16-bit halves (vpermw) makes bf16 pairs. scales uint8 [E, N/16, K/32, 16], by row. N must
be a multiple of 16.
"""

import ctypes

import torch
from torch import Tensor

from kernels.cpu import native, structures
from kernels.cpu.memory import zeros
from kernels.formats import MX_BLOCK
from kernels.mxfp4.layouts import ROWS16, SCALE_NAN, InPlace, PackedMXFP4, register_layout

ROWS = 16


def shapes(num_rows: int, num_groups: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of an expert's blocks and scales.

    Raises:
        ValueError: N is not a multiple of 16.
    """
    if num_rows % ROWS:
        raise ValueError(
            f"blocks must have a multiple of {ROWS} rows for the layout {ROWS16}, got {num_rows}"
        )
    return (num_rows // ROWS, 4 * num_groups, 64), (num_rows // ROWS, num_groups, ROWS)


def write(packed_blocks: Tensor, packed_scales: Tensor, blocks: Tensor, scales: Tensor) -> None:
    """Write one expert, on the caller's thread, from natural [N, K/32, 16] and [N, K/32], with any
    distance between rows, to the layout. Further rows or groups of the layout stay unchanged.

    Raises:
        ValueError: N is not a multiple of 16; a scale is NaN.
    """
    num_rows, num_groups = scales.shape
    shapes(num_rows, num_groups)
    if blocks.stride()[1:] != (MX_BLOCK // 2, 1) or scales.stride(1) != 1:
        blocks, scales = blocks.contiguous(), scales.contiguous()
    arguments = structures.PackArgs(
        blocks=blocks.data_ptr(),
        scales=scales.data_ptr(),
        packed_blocks=native.pointer(packed_blocks),
        packed_scales=native.pointer(packed_scales),
        num_rows=num_rows,
        num_groups=num_groups,
        blocks_stride=blocks.stride(0),
        scales_stride=scales.stride(0),
        packed_groups=packed_scales.shape[1],
    )
    library = native.shared_library()
    assert library is not None, "called without the library"
    if library.cantata_pack_rows16(ctypes.byref(arguments)):
        raise ValueError(f"scales must not hold {SCALE_NAN}, which is NaN: the weights are damaged")


def from_natural(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Convert [E, N, K/32, 16] and [E, N, K/32] to blocks and scales of the layout.

    Raises:
        ValueError: as in `write`.
    """
    num_experts, num_rows, num_groups = scales.shape
    packed_blocks, packed_scales = (
        zeros((num_experts, *shape), torch.uint8) for shape in shapes(num_rows, num_groups)
    )
    for expert in range(num_experts):
        write(packed_blocks[expert], packed_scales[expert], blocks[expert], scales[expert])
    return packed_blocks, packed_scales


def to_natural(packed: PackedMXFP4) -> tuple[Tensor, Tensor]:
    """Return (blocks, scales) in the natural layout."""
    num_experts, num_rows, width = packed.shape
    # [expert, group, chunk, row, odd, byte] with the two nibbles last: column 4 * byte + 2 * nibble
    # + odd of the chunk.
    words = packed.blocks.view(num_experts, num_rows // ROWS, width // 8, ROWS, 2, 2)
    nibbles = torch.stack((words & 15, words >> 4), dim=-1)
    columns = nibbles.permute(0, 1, 3, 2, 5, 6, 4).reshape(num_experts, num_rows, width)
    blocks = (columns[..., 0::2] | (columns[..., 1::2] << 4)).view(
        num_experts, num_rows, width // MX_BLOCK, MX_BLOCK // 2
    )
    scales = packed.scales.transpose(2, 3).reshape(num_experts, num_rows, width // MX_BLOCK)
    return blocks, scales.contiguous()


register_layout(ROWS16, from_natural=from_natural, to_natural=to_natural, in_place=InPlace(shapes, write))
