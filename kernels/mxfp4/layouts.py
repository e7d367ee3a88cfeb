"""Storage layouts of MXFP4 expert weights.

`natural` is the checkpoints' own: blocks uint8 [E, N, K/32, 16], two values a byte with the lower index in the low nibble, and scales uint8
[E, N, K/32], the exponent of a power of two biased by 127. A kernel that wants another order registers it with `register_layout`; every
layout keeps the expert as first axis of blocks and scales, so that single experts can be picked without converting the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import architecture, has_triton, triton_runs_on
from kernels.cpu import native

MX_BLOCK = 32
"""Values that share a scale, along the contraction axis K."""

NATURAL = "natural"
ROWS16 = "rows16"
"""The CPU kernels' (`kernels/cpu/layout.py`)."""
WGMMA = "wgmma.v1"
"""The Triton kernels' on sm_90 (`kernels/mxfp4/wgmma.py`)."""
SCALE_NAN = 255
"""The e8m0 code that stands for NaN (OCP Microscaling Formats 1.0, section 5.4.1); never a weight's scale."""


@dataclass(frozen=True, slots=True)
class PackedMXFP4:
    """Expert weights [E, N, K] in MXFP4, in one of the registered layouts.

    Attributes:
        layout: name of the layout.
        blocks, scales: uint8, shapes as the layout says; first axis E.
        shape: logical (E, N, K), without any padding of the layout.
    """

    layout: str
    blocks: Tensor
    scales: Tensor
    shape: tuple[int, int, int]

    @property
    def num_bytes(self) -> int:
        """Memory of blocks and scales."""
        return self.blocks.nbytes + self.scales.nbytes

    def select(self, expert_ids: Tensor) -> "PackedMXFP4":
        """The experts at `expert_ids` ([n] integer), in that order."""
        return PackedMXFP4(self.layout, self.blocks[expert_ids], self.scales[expert_ids], (expert_ids.numel(), *self.shape[1:]))

    def expert(self, index: int) -> "PackedMXFP4":
        """One expert, as [1, N, K], sharing memory."""
        part = slice(index, index + 1)
        return PackedMXFP4(self.layout, self.blocks[part], self.scales[part], (1, *self.shape[1:]))


@dataclass(frozen=True, slots=True)
class _Layout:
    from_natural: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    to_natural: Callable[[PackedMXFP4], tuple[Tensor, Tensor]]


_LAYOUTS: dict[str, _Layout] = {}


def register_layout(
    name: str,
    *,
    from_natural: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    to_natural: Callable[[PackedMXFP4], tuple[Tensor, Tensor]],
) -> None:
    """Make a layout known, once, at import of the module that defines it.

    Args:
        from_natural: (blocks, scales) natural → (blocks, scales) of the layout.
        to_natural: the exact inverse, from a PackedMXFP4 of the layout.
    Raises:
        ValueError: the name is taken.
    """
    if name in _LAYOUTS:
        raise ValueError(f"name: layout {name!r} is already registered")
    _LAYOUTS[name] = _Layout(from_natural, to_natural)


def layout_names() -> tuple[str, ...]:
    """All registered layouts."""
    return tuple(_LAYOUTS)


def choose_layout(device: torch.device) -> str:
    """The layout that this device's kernels read. The reference kernels, which run everywhere, read `natural` fastest, and so do Triton's
    everywhere but on sm_90, also on architectures that nobody knew when this was written."""
    if triton_runs_on(device):
        return WGMMA if architecture(device) == "sm_90" and has_triton() else NATURAL
    return ROWS16 if device.type == "cpu" and native.library() is not None else NATURAL


def from_natural(blocks: Tensor, scales: Tensor, layout: str = NATURAL) -> PackedMXFP4:
    """Checked weights in `layout` from checkpoint tensors; shares memory with them where the layout is `natural`.

    Args:
        blocks: [E, N, K/32, 16] uint8.
        scales: [E, N, K/32] uint8.
    Raises:
        ValueError: names the argument: a wrong shape or dtype, a scale that is NaN (code 255), or an unknown layout.
    """
    _lookup(layout)
    for name, tensor in (("blocks", blocks), ("scales", scales)):
        if tensor.dtype != torch.uint8:
            raise ValueError(f"{name} must be torch.uint8, got {tensor.dtype}")
    if blocks.ndim != 4 or blocks.shape[3] != MX_BLOCK // 2:
        raise ValueError(f"blocks must be [E, N, K/32, 16], got shape {list(blocks.shape)}")
    if scales.shape != blocks.shape[:3]:
        raise ValueError(f"scales must be {list(blocks.shape[:3])} to match blocks, got shape {list(scales.shape)}")
    if scales.numel() and int(scales.max()) == SCALE_NAN:
        raise ValueError("scales must not hold 255, which is NaN: the weights are damaged")
    num_experts, num_rows, num_groups = scales.shape
    converted = _lookup(layout).from_natural(blocks, scales)
    return PackedMXFP4(layout, *converted, (num_experts, num_rows, num_groups * MX_BLOCK))


def to_natural(packed: PackedMXFP4) -> tuple[Tensor, Tensor]:
    """(blocks, scales) in the natural layout.

    Raises:
        ValueError: packed.layout is unknown.
    """
    return _lookup(packed.layout).to_natural(packed)


def _lookup(layout: str) -> _Layout:
    if layout not in _LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; registered are {', '.join(_LAYOUTS)}")
    return _LAYOUTS[layout]


register_layout(
    NATURAL,
    from_natural=lambda blocks, scales: (blocks, scales),
    to_natural=lambda packed: (packed.blocks, packed.scales),
)
