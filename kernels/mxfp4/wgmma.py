"""The layout `wgmma.v1`: MXFP4 weights in the register order of a warp group's matrix instructions
on sm_90.

wgmma takes its left operand from registers as m16k16 fragments: lane 4g + t of a warp holds rows g
and g + 8 at columns 2t, 2t + 1, 2t + 8 and 2t + 9. Rows go by strips of 16, of which row 2g is the
fragment's row g and row 2g + 1 its row g + 8, so that a gate and its up, which are neighbours in
gpt-oss, meet in one thread. Columns go by chunks of 64, four fragments.

blocks uint8 [E, N/16, K/64, 32 lanes, 4 fragments, 4 bytes]: a thread's bytes of a chunk are one
128-bit load. The 4 bytes are a little-endian word of the 8 values of a lane's fragment, two to a
register: (row g; 2t, 2t + 1), (g + 8; the same), (g; 2t + 8, 2t + 9), (g + 8; the same). A register
with its first value in the low half and its second in the high half, each as a bf16 that is too
small by 2^126 (sign in bit 15, exponent in 8 and 7, mantissa in 6), is rotated right before it
joins the word: register 0 by 0, 1 by 4, 2 by 10, and 3 by 6 but for its bits 8, by 14. That tiles
the word: four rotations alone cannot, three and a split one can, so the kernel decodes 8 values
with nine shifts and masks. (That interleaved bits decode by shifts and masks is the idea of Marlin
and of Triton's `triton_kernels`.)

scales uint8 [E, N/16, K/64, 8 (g), 2 (row 2g or 2g + 1), 2 (column group)], e8m0 plus 126, which is
the missing factor: one product scales a value, exactly.

N is padded to a multiple of 16 and K to one of 64, with zeros.
"""

import torch
from torch import Tensor
from torch.nn import functional

from kernels.formats import MX_BLOCK
from kernels.mxfp4.layouts import WGMMA, PackedMXFP4, register_layout

STRIP = 16
CHUNK = 64
FOLDED_EXPONENT = 126
_LARGEST_SCALE = 254 - FOLDED_EXPONENT
ROTATIONS = (((0x81C081C0, 0),), ((0x81C081C0, 4),), ((0x81C081C0, 10),), ((0x80C080C0, 6), (0x01000100, 14)))
"""Masks of each register's bits, and the distance in bits by which they are rotated right into the
word."""


def from_natural(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Convert [E, N, K/32, 16] and [E, N, K/32] to blocks and scales of the layout.

    Raises:
        ValueError: a scale is above 2, whose code plus 126 is no finite number's exponent.
    """
    if scales.numel() and int(scales.max()) > _LARGEST_SCALE:
        raise ValueError(
            f"scales must be at most {_LARGEST_SCALE} (a factor of 2) for the layout {WGMMA}, "
            f"found {int(scales.max())} at {(scales > _LARGEST_SCALE).nonzero()[0].tolist()}"
        )
    num_experts, num_rows, num_groups = scales.shape
    pad_rows, pad_groups = -num_rows % STRIP, -num_groups % (CHUNK // MX_BLOCK)
    blocks = functional.pad(blocks, (0, 0, 0, pad_groups, 0, pad_rows))
    scales = functional.pad(scales, (0, pad_groups, 0, pad_rows))
    strips, chunks = (num_rows + pad_rows) // STRIP, (num_groups + pad_groups) * MX_BLOCK // CHUNK
    # [E, strip, g, parity of the row, chunk, fragment, column half, t]: a byte holds columns 2t and
    # 2t + 1.
    pairs = blocks.view(num_experts, strips, 8, 2, chunks, 4, 2, 4).permute(0, 1, 4, 2, 7, 5, 6, 3)
    words = torch.zeros(pairs.shape[:6], dtype=torch.int32, device=blocks.device)
    for register, parts in enumerate(ROTATIONS):
        bits = _spread(pairs[..., register // 2, register % 2].int())
        for mask, rotation in parts:
            words |= _rotate_left(bits & _int32(mask), 32 - rotation)
    packed = words.view(torch.uint8).view(num_experts, strips, chunks, 32, 4, 4)
    exponents = scales.view(num_experts, strips, 8, 2, chunks, 2).permute(0, 1, 4, 2, 3, 5)
    return packed, (exponents + FOLDED_EXPONENT).contiguous()


def to_natural(packed: PackedMXFP4) -> tuple[Tensor, Tensor]:
    """Return (blocks, scales) in the natural layout, without the padding."""
    num_experts, num_rows, width = packed.shape
    _, strips, chunks = packed.scales.shape[:3]
    words = packed.blocks.view(torch.int32).view(num_experts, strips, chunks, 8, 4, 4)
    pairs = torch.empty((*words.shape, 2, 2), dtype=torch.uint8, device=words.device)
    for register, parts in enumerate(ROTATIONS):
        bits = torch.zeros_like(words)
        for mask, rotation in parts:
            bits |= _rotate_left(words, rotation) & _int32(mask)
        pairs[..., register // 2, register % 2] = _gather(bits)
    blocks = pairs.permute(0, 1, 3, 7, 2, 5, 6, 4).reshape(
        num_experts, strips * STRIP, chunks * CHUNK // MX_BLOCK, MX_BLOCK // 2
    )
    scales = (
        packed.scales.permute(0, 1, 3, 4, 2, 5).reshape(
            num_experts, strips * STRIP, chunks * CHUNK // MX_BLOCK
        )
        - FOLDED_EXPONENT
    )
    groups = width // MX_BLOCK
    return blocks[:, :num_rows, :groups].contiguous(), scales[:, :num_rows, :groups].contiguous()


def _spread(byte: Tensor) -> Tensor:
    """Return the register bits of two e2m1 values in the low byte, the first in its low half. Both
    int32."""
    return ((byte & 8) << 12) | ((byte & 7) << 6) | ((byte & 0x80) << 24) | ((byte & 0x70) << 18)


def _gather(register: Tensor) -> Tensor:
    """Return the byte from which `_spread` made the register bits."""
    return (
        ((register >> 12) & 8) | ((register >> 6) & 7) | ((register >> 24) & 0x80) | ((register >> 18) & 0x70)
    )


def _rotate_left(word: Tensor, distance: int) -> Tensor:
    """Rotate int32 words left by `distance`, 0 to 32 bits."""
    if distance % 32 == 0:
        return word
    # The right shift is arithmetic.
    return (word << distance) | ((word >> (32 - distance)) & ((1 << distance) - 1))


def _int32(mask: int) -> int:
    """Return a mask of 32 bits as the signed number that torch accepts."""
    return mask - (1 << 32) if mask >> 31 else mask


register_layout(WGMMA, from_natural=from_natural, to_natural=to_natural)
