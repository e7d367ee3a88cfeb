"""Experts written one by one into allocated weights, from slices as a checkpoint's rows have them:
as when padded and converted whole."""

import pytest
import torch
from torch import Tensor

from kernels.mxfp4 import (
    NATURAL,
    ROWS16,
    allocate,
    from_natural,
    layout_names,
    register_layout,
    to_natural,
    write_expert,
)

CPU = torch.device("cpu")
LAYOUTS = (NATURAL, ROWS16, "turned")


def turned(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights in a layout without the function for writing in place."""
    return blocks.transpose(1, 2).contiguous(), scales.transpose(1, 2).contiguous()


@pytest.fixture(autouse=True)
def _registered() -> None:
    if "turned" not in layout_names():
        register_layout(
            "turned", from_natural=turned, to_natural=lambda packed: turned(packed.blocks, packed.scales)
        )


def natural(num_experts: int, num_rows: int, num_groups: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_groups)
    blocks = torch.randint(
        0, 256, (num_experts, num_rows, num_groups, 16), dtype=torch.uint8, generator=generator
    )
    return blocks, torch.randint(
        0, 255, (num_experts, num_rows, num_groups), dtype=torch.uint8, generator=generator
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("num_rows", "num_groups", "rows", "groups"),
    [
        (48, 3, (0, 48), (0, 3)),
        (64, 5, (16, 48), (0, 5)),  # gate_up of a rank in the middle
        (32, 40, (0, 32), (7, 24)),  # down: a part of each row, more scales than a vector has
        (32, 33, (0, 32), (16, 33)),
        (64, 19, (32, 64), (1, 18)),
    ],
)
@pytest.mark.parametrize("padding", [0, 1])
def test_a_slice_of_each_expert(
    fp32_isa: str,
    layout: str,
    num_rows: int,
    num_groups: int,
    rows: tuple[int, int],
    groups: tuple[int, int],
    padding: int,
) -> None:
    blocks, scales = natural(3, num_rows, num_groups)
    part = (slice(None), slice(*rows), slice(*groups))
    wanted_blocks, wanted_scales = blocks[part], scales[part]
    size = wanted_scales.shape[1] + 16 * padding, wanted_scales.shape[2] + 2 * padding
    packed = allocate((3, size[0], size[1] * 32), layout, CPU)
    for expert in (2, 0, 1):
        write_expert(packed, expert, wanted_blocks[expert], wanted_scales[expert])
    padded_blocks, padded_scales = (
        torch.zeros(3, *size, 16, dtype=torch.uint8),
        torch.zeros(3, *size, dtype=torch.uint8),
    )
    inner = (slice(None), slice(wanted_scales.shape[1]), slice(wanted_scales.shape[2]))
    padded_blocks[inner], padded_scales[inner] = wanted_blocks, wanted_scales
    assert all(map(torch.equal, to_natural(packed), (padded_blocks, padded_scales)))
    whole = from_natural(padded_blocks, padded_scales, layout)
    assert torch.equal(packed.blocks, whole.blocks)
    assert torch.equal(packed.scales, whole.scales)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", [(0, 0), (15, 0), (31, 36), (16, 15), (7, 16), (30, 32)])
def test_a_nan_scale_is_found_wherever_it_is(fp32_isa: str, layout: str, where: tuple[int, int]) -> None:
    blocks, scales = natural(1, 32, 37)
    packed = allocate((1, 32, 37 * 32), layout, CPU)
    write_expert(packed, 0, blocks[0], scales[0])
    scales[0][where] = 255
    with pytest.raises(ValueError, match="255, which is NaN"):
        write_expert(packed, 0, blocks[0], scales[0])


def test_a_nan_scale_beside_the_slice_does_not_count(fp32_isa: str) -> None:
    blocks, scales = natural(1, 32, 37)
    scales[0, :, 20] = 255
    packed = allocate((1, 32, 20 * 32), ROWS16, CPU)
    write_expert(packed, 0, blocks[0, :, :20], scales[0, :, :20])
    assert all(map(torch.equal, to_natural(packed), (blocks[:, :, :20], scales[:, :, :20])))


def test_shapes_that_the_layout_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16 rows"):
        allocate((1, 24, 32), ROWS16, CPU)
    with pytest.raises(ValueError, match="'zigzag'"):
        allocate((1, 16, 32), "zigzag", CPU)
