"""The layout of MXFP4 weights for sm_90, and which layout and tile a GPU gets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.moe import tile_choice
from kernels.moe.tile_choice import DENSE, MXFP4, MXFP4_MXFP8, MXFP4_WGMMA, choose_tile, tiles
from kernels.mxfp4 import (
    NATURAL,
    WGMMA,
    PackedMXFP4,
    choose_layout,
    from_natural,
    layouts,
    pack,
    to_natural,
    unpack,
)
from kernels.mxfp4.wgmma import FOLDED_EXPONENT, ROTATIONS

GPU = torch.device("cuda", 0)
LARGEST_SCALE = 128


def random_natural(
    experts: int, rows: int, groups: int, seed: int, highest: int = LARGEST_SCALE
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(
        0, highest + 1, (experts, rows, groups), dtype=torch.uint8, generator=generator
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 50), st.integers(1, 9), st.integers(0, 1000))
def test_what_is_packed_for_wgmma_comes_back(experts: int, rows: int, groups: int, seed: int) -> None:
    natural = random_natural(experts, rows, groups, seed)
    packed = from_natural(*natural, WGMMA)
    strips, chunks = -(-rows // 16), -(-groups // 2)
    assert packed.blocks.shape == (experts, strips, chunks, 32, 4, 4)
    assert packed.scales.shape == (experts, strips, chunks, 8, 2, 2)
    assert packed.blocks.is_contiguous()
    assert packed.scales.is_contiguous()
    for found, wanted in zip(to_natural(packed), natural, strict=True):
        assert torch.equal(found, wanted)
    one = to_natural(packed.expert(experts - 1))
    assert torch.equal(one[0][0], natural[0][experts - 1])


def test_a_value_is_where_the_layout_says() -> None:
    """One value that is not 0: row 2g + parity, column 64 chunk + 16 fragment + 8 half + 2t +
    second."""
    masks = [sum(mask for mask, _ in parts) for parts in ROTATIONS]
    assert masks == [0x81C081C0] * 4
    for strip, chunk, g, t, fragment, half, parity, second in [
        (1, 2, 5, 3, 2, 1, 1, 1),
        (0, 1, 7, 0, 3, 0, 1, 0),
        (2, 0, 1, 2, 0, 1, 0, 1),
    ]:
        row, column = 16 * strip + 2 * g + parity, 64 * chunk + 16 * fragment + 8 * half + 2 * t + second
        dense = torch.zeros(1, 48, 192)
        dense[0, row, column] = -6
        packed = pack(dense, WGMMA)
        assert packed.blocks.any(dim=-1).nonzero().tolist() == [[0, strip, chunk, 4 * g + t, fragment]]
        word = int(packed.blocks[0, strip, chunk, 4 * g + t, fragment].view(torch.int32)) & 0xFFFFFFFF
        register = 0
        for mask, distance in ROTATIONS[2 * half + parity]:
            register |= ((word << distance | word >> (32 - distance)) & 0xFFFFFFFF) & mask
        assert register == 0x81C0 << (16 * second), "sign, exponent 11 and mantissa 1 as in bf16"
        scale = packed.scales[0, strip, chunk, g, parity, fragment // 2]
        assert int(scale) == 127 + FOLDED_EXPONENT, "the group's scale is 1"
        assert int((packed.scales != FOLDED_EXPONENT).sum()) == 1


def test_scales_that_the_layout_cannot_hold_are_refused() -> None:
    blocks, scales = random_natural(2, 20, 3, seed=0)
    scales[1, 17, 2] = LARGEST_SCALE
    exact = unpack(from_natural(blocks, scales, WGMMA), torch.float32)
    torch.testing.assert_close(exact, unpack(from_natural(blocks, scales), torch.float32), atol=0, rtol=0)
    scales[1, 17, 2] = LARGEST_SCALE + 1
    with pytest.raises(
        ValueError, match=r"^scales must be at most 128 .*wgmma.v1, found 129 at \[1, 17, 2\]"
    ):
        from_natural(blocks, scales, WGMMA)


@pytest.mark.parametrize(
    ("architecture", "layout"),
    [
        ("sm_90", WGMMA),
        ("sm_80", NATURAL),
        ("sm_100", NATURAL),
        ("sm_120", NATURAL),
        ("sm_137", NATURAL),
        ("gfx942", NATURAL),
        ("gfx1100", NATURAL),
    ],
)
def test_a_gpu_gets_the_layout_of_its_kernels(
    architecture: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "architecture", lambda device: architecture)
    monkeypatch.setattr(layouts, "triton_runs_on", lambda device: True)
    assert choose_layout(GPU) == layout
    assert isinstance(pack(torch.ones(1, 32, 64), choose_layout(GPU)), PackedMXFP4)


def test_without_triton_a_gpu_gets_the_layout_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "triton_runs_on", lambda device: False)
    assert choose_layout(GPU) == NATURAL


@pytest.mark.parametrize("weights", [MXFP4, MXFP4_WGMMA, MXFP4_MXFP8, DENSE])
@pytest.mark.parametrize(
    "architecture",
    [
        "sm_80",
        "sm_86",
        "sm_89",
        "sm_90",
        "sm_100",
        "sm_103",
        "sm_120",
        "sm_137",
        "gfx942",
        "gfx90a",
        "gfx950",
        "cpu",
    ],
)
def test_every_architecture_has_tiles(architecture: str, weights: str) -> None:
    """Unknown architectures have tiles too; they are larger for more rows, and the smallest for a
    single token."""
    choice = tiles(weights, architecture)
    limits = [tile.max_rows or tile.block_m for tile in choice]
    assert limits == sorted(set(limits))
    assert all(limit <= tile.block_m for limit, tile in zip(limits, choice, strict=True))
    chosen = [
        choose_tile(weights, architecture, num_pairs, 128, fp32=False).block_m
        for num_pairs in (4, 32, 1 << 10, 1 << 12, 1 << 18)
    ]
    assert chosen[0] == choice[0].block_m
    assert chosen[-1] == choice[-1].block_m
    assert chosen == sorted(chosen)
    for tile in choice:
        assert tile.block_n % 64 == 0, "a strip of MXFP8 groups of both gates and ups"
        assert tile.block_k % 64 == 0


def test_a_few_tokens_take_the_narrow_tile_of_wgmma() -> None:
    """The tile has 64 rows of the weights while an expert has at most 8 tokens by twice the mean,
    and at least 16 tokens, which every version of Triton supports."""
    shapes = [
        (tile.block_m, tile.block_n)
        for tile in (choose_tile(MXFP4_WGMMA, "sm_90", n, 128, fp32=False) for n in (4, 512, 513, 1024))
    ]
    assert shapes == [(16, 64), (16, 64), (16, 128), (16, 128)]


def test_unknown_architectures_have_the_tiles_of_their_family() -> None:
    assert tiles(MXFP4, "sm_103") == tiles(MXFP4, "sm_100")
    assert tiles(MXFP4, "sm_121") == tiles(MXFP4, "sm_120")
    assert tiles(MXFP4, "sm_86") == tiles(MXFP4, "sm_80")
    assert tiles(MXFP4, "gfx90a") == tiles(MXFP4, "gfx942")
    assert set(tile_choice.ARCHITECTURES) == {
        "sm_80",
        "sm_89",
        "sm_90",
        "sm_100",
        "sm_120",
        "gfx942",
        "gfx950",
    }
