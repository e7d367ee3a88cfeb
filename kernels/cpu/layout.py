"""The layout `rows16`: MXFP4 weights in groups of 16 rows, so that a column of a group is a vector.

blocks uint8 [E, N/16, K/8, 64]: the 64 bytes are four units of 4 rows and 8 columns; in a unit, the low nibble of byte 8h + 2r + j is
column 2h + j of row r, the high nibble column 4 + 2h + j. scales uint8 [E, N/16, K/32, 16], by row. N must be a multiple of 16.
"""

import ctypes

import torch
from torch import Tensor

from kernels.cpu import native
from kernels.mxfp4.layouts import MX_BLOCK, ROWS16, PackedMXFP4, register_layout

ROWS = 16


def from_natural(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """[E, N, K/32, 16] and [E, N, K/32] → the layout's.

    Raises:
        ValueError: N is not a multiple of 16.
    """
    num_experts, num_rows, num_groups = scales.shape
    if num_rows % ROWS:
        raise ValueError(f"blocks must have a multiple of {ROWS} rows for the layout {ROWS16}, got {num_rows}")
    packed_blocks = torch.empty(num_experts, num_rows // ROWS, 4 * num_groups, 64, dtype=torch.uint8)
    packed_scales = torch.empty(num_experts, num_rows // ROWS, num_groups, ROWS, dtype=torch.uint8)
    blocks, scales = blocks.contiguous(), scales.contiguous()
    arguments = native.PackArgs(
        blocks=native.pointer(blocks),
        scales=native.pointer(scales),
        packed_blocks=native.pointer(packed_blocks),
        packed_scales=native.pointer(packed_scales),
        num_rows=num_experts * num_rows,
        num_groups=num_groups,
    )
    native.ready().cantata_pack_rows16(ctypes.byref(arguments))
    return packed_blocks, packed_scales


def to_natural(packed: PackedMXFP4) -> tuple[Tensor, Tensor]:
    """The inverse."""
    num_experts, num_rows, width = packed.shape
    num_chunks = width // 8
    # [expert, group, chunk, unit, h, r, j] with the two nibbles last: column 4 * nibble + 2h + j.
    units = packed.blocks.view(num_experts, num_rows // ROWS, num_chunks, 4, 2, 4, 2)
    nibbles = torch.stack((units & 15, units >> 4), dim=-1)
    columns = nibbles.permute(0, 1, 3, 5, 2, 7, 4, 6).reshape(num_experts, num_rows, width)
    blocks = (columns[..., 0::2] | (columns[..., 1::2] << 4)).view(num_experts, num_rows, width // MX_BLOCK, MX_BLOCK // 2)
    scales = packed.scales.transpose(2, 3).reshape(num_experts, num_rows, width // MX_BLOCK)
    return blocks, scales.contiguous()


register_layout(ROWS16, from_natural=from_natural, to_natural=to_natural)
