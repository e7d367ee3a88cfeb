"""Storage layouts of MXFP4 expert weights.

`natural` is the checkpoints' own: blocks uint8 [E, N, K/32, 16], two values per byte with the lower
index in the low nibble, and scales uint8 [E, N, K/32], the exponent of a power of two biased by
127. A kernel that needs another order registers it with `register_layout`. In every layout the
expert is the first axis of blocks and scales, so that single experts can be picked without
converting the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.backend import architecture, has_triton, triton_runs_on
from kernels.cpu import native
from kernels.cpu.memory import zeros
from kernels.formats import MX_BLOCK

NATURAL = "natural"
ROWS16 = "rows16"
"""Layout of the CPU kernels (`kernels/cpu/layout.py`)."""
WGMMA = "wgmma.v1"
"""Layout of the Triton kernels on sm_90 (`kernels/mxfp4/wgmma.py`)."""
SCALE_NAN = 255
"""Code of NaN in e8m0 (OCP Microscaling Formats 1.0, section 5.4.1); never the scale of a
weight."""


@dataclass(frozen=True, slots=True)
class PackedMXFP4:
    """Expert weights [E, N, K] in MXFP4, in one of the registered layouts.

    Attributes:
        layout: name of the layout.
        blocks, scales: uint8, in the shapes that the layout defines; first axis E.
        shape: logical (E, N, K), without any padding of the layout.
    """

    layout: str
    blocks: Tensor
    scales: Tensor
    shape: tuple[int, int, int]

    @property
    def num_bytes(self) -> int:
        """Bytes of blocks and scales."""
        return self.blocks.nbytes + self.scales.nbytes

    def select(self, expert_ids: Tensor) -> "PackedMXFP4":
        """Return the experts at `expert_ids` ([n] integer), in that order."""
        return PackedMXFP4(
            self.layout,
            self.blocks[expert_ids],
            self.scales[expert_ids],
            (expert_ids.numel(), *self.shape[1:]),
        )

    def expert(self, index: int) -> "PackedMXFP4":
        """Return one expert, as [1, N, K], sharing memory."""
        part = slice(index, index + 1)
        return PackedMXFP4(self.layout, self.blocks[part], self.scales[part], (1, *self.shape[1:]))


@dataclass(frozen=True, slots=True)
class InPlace:
    """Writes a layout expert by expert, without an intermediate tensor.

    Attributes:
        shapes: function from (N, K/32) to the shapes of one expert's blocks and scales.
        write: function of (blocks, scales) of one expert in the layout, in zeroed memory, and of
            natural [N, K/32, 16] and [N, K/32], with any stride between rows and at most as many
            rows and groups. It writes the former, and raises ValueError if a scale is NaN.
    """

    shapes: Callable[[int, int], tuple[tuple[int, ...], tuple[int, ...]]]
    write: Callable[[Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class _Layout:
    from_natural: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    to_natural: Callable[[PackedMXFP4], tuple[Tensor, Tensor]]
    in_place: InPlace | None


_LAYOUTS: dict[str, _Layout] = {}


def register_layout(
    name: str,
    *,
    from_natural: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    to_natural: Callable[[PackedMXFP4], tuple[Tensor, Tensor]],
    in_place: InPlace | None = None,
) -> None:
    """Register a layout, once, at import of the module that defines it.

    Args:
        from_natural: function from (blocks, scales) natural to (blocks, scales) of the layout.
        to_natural: its exact inverse, for a PackedMXFP4 of the layout.
        in_place: faster functions for single experts; by default they are converted and copied.
    Raises:
        ValueError: the name is already registered.
    """
    if name in _LAYOUTS:
        raise ValueError(f"name: layout {name!r} is already registered")
    _LAYOUTS[name] = _Layout(from_natural, to_natural, in_place)


def layout_names() -> tuple[str, ...]:
    """Return the names of all registered layouts."""
    return tuple(_LAYOUTS)


def choose_layout(device: torch.device) -> str:
    """Return the layout that this device's kernels read. The reference kernels, which run
    everywhere, are fastest with `natural`, and so are Triton's on every architecture but sm_90,
    including architectures that are not known here."""
    if triton_runs_on(device):
        return WGMMA if architecture(device) == "sm_90" and has_triton() else NATURAL
    return ROWS16 if device.type == "cpu" and native.shared_library() is not None else NATURAL


def from_natural(blocks: Tensor, scales: Tensor, layout: str = NATURAL) -> PackedMXFP4:
    """Return checked weights in `layout` from checkpoint tensors. They share memory with these if
    the layout is `natural`.

    Args:
        blocks: [E, N, K/32, 16] uint8.
        scales: [E, N, K/32] uint8.
    Raises:
        ValueError: names the argument: a wrong shape or dtype, a scale that is NaN (code 255), or
            an unknown layout.
    """
    _lookup(layout)
    for name, tensor in (("blocks", blocks), ("scales", scales)):
        if tensor.dtype != torch.uint8:
            raise ValueError(f"{name} must be torch.uint8, got {tensor.dtype}")
    if blocks.ndim != 4 or blocks.shape[3] != MX_BLOCK // 2:
        raise ValueError(f"blocks must be [E, N, K/32, 16], got shape {list(blocks.shape)}")
    if scales.shape != blocks.shape[:3]:
        raise ValueError(
            f"scales must be {list(blocks.shape[:3])} to match blocks, got shape {list(scales.shape)}"
        )
    if scales.numel() and int(scales.max()) == SCALE_NAN:
        raise ValueError("scales must not hold 255, which is NaN: the weights are damaged")
    num_experts, num_rows, num_groups = scales.shape
    converted = _lookup(layout).from_natural(blocks, scales)
    return PackedMXFP4(layout, *converted, (num_experts, num_rows, num_groups * MX_BLOCK))


def allocate(shape: tuple[int, int, int], layout: str, device: torch.device) -> PackedMXFP4:
    """Return weights [E, N, K], all zero, for `write_expert`.

    Raises:
        ValueError: layout is unknown, or cannot hold the shape.
    """
    num_experts, num_rows, width = shape
    parts = _expert_shapes(layout, num_rows, width // MX_BLOCK)
    blocks, scales = (_zeros((num_experts, *part), device) for part in parts)
    return PackedMXFP4(layout, blocks, scales, shape)


def write_expert(packed: PackedMXFP4, index: int, blocks: Tensor, scales: Tensor) -> None:
    """Write one expert of weights from `allocate`, once; other threads may write other experts.

    Args:
        blocks: [N, K/32, 16] uint8 natural, or fewer rows or groups: the rest stays zero.
        scales: [N, K/32] uint8.
    Raises:
        ValueError: a scale is NaN, or cannot be represented in the layout.
    """
    in_place = _lookup(packed.layout).in_place
    if in_place is not None:
        in_place.write(packed.blocks[index], packed.scales[index], blocks, scales)
        return
    num_rows, num_groups = packed.shape[1], packed.shape[2] // MX_BLOCK
    # Converted on the target device: with a GPU's layout the host's cores stay free for reading.
    device = packed.blocks.device
    whole_blocks, whole_scales = (_padded(part, num_rows, num_groups).to(device) for part in (blocks, scales))
    one = from_natural(whole_blocks, whole_scales, packed.layout)
    packed.blocks[index].copy_(one.blocks[0])
    packed.scales[index].copy_(one.scales[0])


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return (
        zeros(shape, torch.uint8)
        if device.type == "cpu"
        else torch.zeros(shape, dtype=torch.uint8, device=device)
    )


def _padded(part: Tensor, num_rows: int, num_groups: int) -> Tensor:
    """Return the part padded to [1, num_rows, num_groups, …]; code 0 is the value 0 for every
    scale."""
    if part.shape[:2] == (num_rows, num_groups):
        return part[None]
    whole = part.new_zeros(1, num_rows, num_groups, *part.shape[2:])
    whole[0, : part.shape[0], : part.shape[1]] = part
    return whole


@cache
def _expert_shapes(layout: str, num_rows: int, num_groups: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    in_place = _lookup(layout).in_place
    if in_place is not None:
        return in_place.shapes(num_rows, num_groups)
    scales = torch.zeros(1, num_rows, num_groups, dtype=torch.uint8)
    one = from_natural(scales[..., None].expand(*scales.shape, MX_BLOCK // 2), scales, layout)
    return one.blocks.shape[1:], one.scales.shape[1:]


def to_natural(packed: PackedMXFP4) -> tuple[Tensor, Tensor]:
    """Return (blocks, scales) in the natural layout.

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
