"""MXFP4 against the formats' definition in exact arithmetic and float64."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from kernels.formats import MX_BLOCK
from kernels.mxfp4 import (
    PackedMXFP4,
    choose_layout,
    from_natural,
    layout_names,
    pack,
    register_layout,
    to_natural,
    unpack,
    unpack_experts,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def e2m1(code: int) -> Fraction:
    """Return the value of a code from its fields: sign, two exponent bits of bias 1, one mantissa
    bit; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    magnitude = Fraction(mantissa, 2) if exponent == 0 else Fraction(2 + mantissa, 2) * 2 ** (exponent - 1)
    return -magnitude if sign else magnitude


def oracle(blocks: Tensor, scales: Tensor) -> np.ndarray:
    """Return [E, N, K] float64, one value at a time."""
    experts, rows, groups = scales.shape
    dense = np.empty((experts, rows, groups * MX_BLOCK))
    for index in np.ndindex(dense.shape):
        expert, row, column = index
        group, place = divmod(column, MX_BLOCK)
        byte = int(blocks[expert, row, group, place // 2])
        code = byte >> 4 if place % 2 else byte & 15
        dense[index] = (
            math.copysign(1.0, -1 if code & 8 else 1)
            * abs(float(e2m1(code)))
            * 2.0 ** (int(scales[expert, row, group]) - 127)
        )
    return dense


def random_packed(
    experts: int, rows: int, groups: int, seed: int, *, low: int = 0, high: int = 255
) -> PackedMXFP4:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(low, high, (experts, rows, groups), dtype=torch.uint8, generator=generator)
    return from_natural(blocks, scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0, 1, 2, 103, 126, 127, 128, 142, 253, 254])
def test_every_code_decodes_exactly(scale: int, dtype: torch.dtype) -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    blocks = torch.cat((codes | (codes.flip(0) << 4), codes | (codes << 4)))[None, None].view(1, 1, 2, 16)
    scales = torch.full((1, 1, 2), scale, dtype=torch.uint8)
    decoded = unpack(from_natural(blocks, scales), dtype)
    expected = torch.from_numpy(oracle(blocks, scales)).to(dtype)
    assert decoded.dtype == dtype
    torch.testing.assert_close(decoded, expected, atol=0, rtol=0)
    assert torch.equal(decoded.signbit(), expected.signbit())


def test_codes_have_the_documented_values() -> None:
    assert [float(e2m1(code)) for code in range(8)] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_weights_decode_exactly(dtype: torch.dtype) -> None:
    packed = random_packed(3, 7, 5, seed=1)
    torch.testing.assert_close(
        unpack(packed, dtype),
        torch.from_numpy(oracle(packed.blocks, packed.scales)).to(dtype),
        atol=0,
        rtol=0,
    )


def test_decodes_as_transformers_does() -> None:
    packed = random_packed(3, 10, 4, seed=2, low=90, high=140)
    theirs = convert_moe_packed_tensors(packed.blocks, packed.scales, dtype=torch.bfloat16)
    torch.testing.assert_close(unpack(packed, torch.bfloat16), theirs.transpose(1, 2), atol=0, rtol=0)


def test_experts_are_picked_in_the_order_asked_for() -> None:
    packed = random_packed(5, 6, 3, seed=3)
    ids = torch.tensor([4, 0, 4, 2], dtype=torch.int32)
    everything = unpack(packed, torch.float32)
    torch.testing.assert_close(
        unpack_experts(packed, ids, torch.float32), everything[ids.long()], atol=0, rtol=0
    )
    torch.testing.assert_close(unpack(packed.expert(3), torch.float32), everything[3:4], atol=0, rtol=0)
    assert packed.expert(3).blocks.data_ptr() == packed.blocks[3].data_ptr()
    assert unpack_experts(packed, torch.empty(0, dtype=torch.int64), torch.float32).shape == (0, 6, 96)


def nearest_code_values(scaled: float) -> set[float]:
    """Return the e2m1 values nearest to `scaled`, or of two equally near ones that with an even
    mantissa bit."""
    values = [(abs(e2m1(code) - Fraction(scaled)), code) for code in range(16)]
    distance = min(values)[0]
    nearest = [code for found, code in values if found == distance]
    magnitudes = {abs(e2m1(code)) for code in nearest}
    if len(magnitudes) > 1:
        nearest = [code for code in nearest if code & 1 == 0]
    return {float(e2m1(code)) for code in nearest}


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(floats, st.sampled_from([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.25, -5.0])),
        min_size=32,
        max_size=32,
    )
)
def test_packing_rounds_to_nearest_even_at_the_groups_scale(group: list[float]) -> None:
    dense = torch.tensor(group, dtype=torch.float32).view(1, 1, 32)
    packed = pack(dense)
    largest = max(abs(value) for value in group)
    scale = int(packed.scales)
    wanted = 0 if largest == 0 else min(max(math.frexp(largest)[1] - 1 - 2 + 127, 0), 254)
    assert scale == wanted
    decoded = unpack(packed, torch.float32).flatten().double() * 2.0 ** (127 - scale)
    for value, found in zip(group, decoded.tolist(), strict=True):
        assert found in nearest_code_values(value * 2.0 ** (127 - scale)), (value, found, scale)
        assert math.copysign(1, found) == math.copysign(1, value)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 252), st.sampled_from(DTYPES))
def test_what_was_decoded_packs_to_the_same_values(seed: int, low: int, dtype: torch.dtype) -> None:
    packed = random_packed(2, 3, 2, seed, low=low, high=min(low + 5, 253))
    decoded = unpack(packed, dtype)
    if not decoded.isfinite().all():
        decoded = decoded.nan_to_num(posinf=0, neginf=0)
    if dtype == torch.float16:
        decoded = unpack(pack(decoded), dtype)  # halves of tiny fp16 values were rounded already
    torch.testing.assert_close(unpack(pack(decoded), dtype), decoded, atol=0, rtol=0)


def test_packing_error_is_small_on_normal_weights() -> None:
    dense = torch.randn(4, 33, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    error = (unpack(pack(dense), torch.float32) - dense).norm() / dense.norm()
    assert error < 0.15


def test_natural_layout_round_trips() -> None:
    packed = random_packed(2, 3, 4, seed=4)
    blocks, scales = to_natural(packed)
    again = from_natural(blocks, scales, "natural")
    assert again.shape == (2, 3, 128)
    assert again.layout == "natural"
    assert torch.equal(again.blocks, packed.blocks)
    assert torch.equal(again.scales, packed.scales)
    assert packed.num_bytes == 2 * 3 * 4 * 17


def test_a_registered_layout_serves_every_operation() -> None:
    def swap(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        return blocks.transpose(1, 2).contiguous(), scales.transpose(1, 2).contiguous()

    if "rows-inside" not in layout_names():
        register_layout(
            "rows-inside", from_natural=swap, to_natural=lambda packed: swap(packed.blocks, packed.scales)
        )
    dense = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(5))
    natural, swapped = pack(dense), pack(dense, "rows-inside")
    assert swapped.blocks.shape == (3, 2, 5, 16)
    assert swapped.shape == natural.shape
    torch.testing.assert_close(unpack(swapped, torch.float32), unpack(natural, torch.float32), atol=0, rtol=0)
    ids = torch.tensor([2, 1])
    torch.testing.assert_close(
        unpack_experts(swapped, ids, torch.bfloat16),
        unpack_experts(natural, ids, torch.bfloat16),
        atol=0,
        rtol=0,
    )
    with pytest.raises(ValueError, match="rows-inside"):
        register_layout(
            "rows-inside", from_natural=swap, to_natural=lambda packed: swap(packed.blocks, packed.scales)
        )


def test_the_cpu_reads_a_registered_layout() -> None:
    assert choose_layout(torch.device("cpu")) in layout_names()


@pytest.mark.parametrize(
    ("blocks", "scales", "named"),
    [
        (torch.zeros(2, 3, 4, 16), torch.zeros(2, 3, 4, dtype=torch.uint8), "blocks"),
        (torch.zeros(2, 3, 4, 16, dtype=torch.uint8), torch.zeros(2, 3, 4, dtype=torch.int8), "scales"),
        (torch.zeros(2, 3, 4, 15, dtype=torch.uint8), torch.zeros(2, 3, 4, dtype=torch.uint8), "blocks"),
        (torch.zeros(2, 3, 4, 16, dtype=torch.uint8), torch.zeros(2, 4, 3, dtype=torch.uint8), "scales"),
        (
            torch.zeros(2, 3, 4, 16, dtype=torch.uint8),
            torch.full((2, 3, 4), 255, dtype=torch.uint8),
            "scales must not hold 255",
        ),
    ],
)
def test_damaged_weights_are_refused(blocks: Tensor, scales: Tensor, named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named}"):
        from_natural(blocks, scales)


def test_a_single_nan_scale_is_found() -> None:
    packed = random_packed(2, 3, 4, seed=6)
    packed.scales[1, 2, 3] = 255
    with pytest.raises(ValueError, match="NaN"):
        from_natural(packed.blocks, packed.scales)


@pytest.mark.parametrize(
    "dense",
    [
        torch.zeros(2, 64),
        torch.zeros(2, 3, 40),
        torch.zeros(1, 1, 32, dtype=torch.int32),
        torch.full((1, 1, 32), torch.inf),
    ],
)
def test_what_cannot_be_packed_is_named(dense: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^dense"):
        pack(dense)


def test_unknown_layouts_and_dtypes_are_named() -> None:
    packed = random_packed(1, 2, 1, seed=7)
    with pytest.raises(ValueError, match="'zigzag'"):
        from_natural(packed.blocks, packed.scales, "zigzag")
    with pytest.raises(ValueError, match="'zigzag'"):
        unpack(PackedMXFP4("zigzag", packed.blocks, packed.scales, packed.shape), torch.float32)
    with pytest.raises(ValueError, match=r"^dtype"):
        unpack(packed, torch.int32)
    with pytest.raises(ValueError, match=r"^expert_ids"):
        unpack_experts(packed, torch.tensor([0.0]), torch.float32)
