"""C++ attention on each instruction set: its error in bf16, the bits of a query, and values that
are not finite."""

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.cpu import native
from kernels.cpu.attention import paged_attention
from tests.support.attention_cases import BLOCK_SIZE, SCALE, AttentionCase, attention_case

KEY_TILE = 256
"""Keys whose softmax is computed together."""


def bits(tensor: Tensor) -> Tensor:
    """Return the bits as integers, for comparisons in which a NaN equals itself."""
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


class Sequence:
    """One sequence in a cache whose blocks are in no order.

    Args:
        length: the sequence's; all its keys and values are there.
        heads: query heads, KV heads.
    """

    def __init__(
        self,
        length: int,
        heads: tuple[int, int],
        head_dim: int,
        window: int | None,
        dtype: torch.dtype = torch.bfloat16,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        generator = torch.Generator().manual_seed(length + head_dim)
        num_blocks = -(-length // block_size)
        self.block_size = block_size
        self.q = torch.randn(length, heads[0], head_dim, generator=generator).to(dtype)
        self.kv_cache = torch.randn(
            2, num_blocks + 3, block_size, heads[1], head_dim, generator=generator
        ).to(dtype)
        self.table = torch.randperm(num_blocks + 3, generator=generator)[:num_blocks].to(torch.int32)[None]
        self.sinks = torch.randn(heads[0], generator=generator)
        self.window = window

    def at(self, half: int, position: int) -> Tensor:
        """Return [num_kv_heads, head_dim], a key (half 0) or value (half 1) in the cache."""
        return self.kv_cache[half, self.table[0, position // self.block_size], position % self.block_size]

    def run(self, spans: list[tuple[int, int]]) -> list[Tensor]:
        """Run queries [first, end) of the sequence for each span, all in one batch."""
        sizes = [end - first for first, end in spans]
        out = paged_attention(
            torch.cat([self.q[first:end] for first, end in spans]),
            self.kv_cache,
            self.table.repeat(len(spans), 1),
            torch.tensor([end for _, end in spans], dtype=torch.int32),
            torch.tensor([0, *sizes]).cumsum(0).to(torch.int32),
            self.sinks,
            scale=SCALE,
            window=self.window,
        )
        return list(out.split(sizes))


@cache
def bf16_case(heads: tuple[int, int], head_dim: int, window: int | None) -> tuple[AttentionCase, Tensor]:
    """Return a batch, and its result in float64."""
    lengths = [(1, 1), (31, 31), (33, 33), (1, 255), (1, 256), (1, 257), (1, 700), (45, 301), (0, 9)]
    case = attention_case(lengths, heads=heads, head_dim=head_dim, window=window, dtype=torch.bfloat16)
    return case, case.expected()


# Group sizes on both sides of the 8 and 16 rows of a tile, chunks of more than a block of 32 rows,
# contexts on both sides of a key tile.
@pytest.mark.parametrize("window", [None, 1, 20, 128, 300])
@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [((16, 2), 64), ((3, 3), 32), ((10, 2), 96), ((17, 1), 128), ((36, 1), 64), ((6, 3), 80)],
)
def test_bf16_is_as_exact_as_bf16(
    isa: str, heads: tuple[int, int], head_dim: int, window: int | None
) -> None:
    case, expected = bf16_case(heads, head_dim, window)
    found = paged_attention(*case.arguments, scale=SCALE, window=window)
    error = found.double() - expected
    # The result is rounded to 8 bits, and so are the weights that amx and avx512_bf16 multiply with
    # values of order 1: 2^-8 at worst of the result, and of the weighted mean of |value|; errors of
    # many weights cancel.
    assert error.norm() < 0.003 * expected.norm()
    torch.testing.assert_close(found.double(), expected, atol=2**-8, rtol=2**-8)


def test_weights_are_rounded_and_nothing_else(bf16_isa: str) -> None:
    """If the weights are powers of two in a key tile, the result is rounded once."""
    sequence = Sequence(600, (8, 1), 64, None)
    sequence.q[:], sequence.kv_cache[0], sequence.kv_cache[1] = 0, 0, 0
    sequence.sinks[:] = 0
    sequence.at(1, 300)[0, 0] = 1.0
    [out] = sequence.run([(599, 600)])
    # All keys and the sink have weight 1.
    assert torch.equal(out[0, :, 0], torch.full((8,), 1 / 601).bfloat16())
    assert not out[0, :, 1:].any()
    # A larger score in another key tile, whose other weights are all the same: 1e-4 is for the
    # exponential.
    sequence.q[599, :, 0], sequence.at(0, 10)[0, 0] = 1.0, 3.0 / SCALE
    sequence.at(1, 10)[0, 1] = 1.0
    [out] = sequence.run([(599, 600)])
    weight = torch.tensor(float(sequence.at(0, 10)[0, 0]) * SCALE, dtype=torch.float64).exp()
    torch.testing.assert_close(
        out[0, :, 1].double(), (weight / (600 + weight)).expand(8), atol=0, rtol=2**-8 + 1e-4
    )
    torch.testing.assert_close(
        out[0, :, 0].double(), (1 / (600 + weight)).expand(8), atol=0, rtol=2**-8 + 1e-4
    )


def test_extreme_logits_and_sinks_in_bf16(bf16_isa: str) -> None:
    case = attention_case([(5, 300), (1, 30)], heads=(8, 1), head_dim=64, dtype=torch.bfloat16)
    case.q.mul_(1000)
    case.sinks[:] = torch.tensor([-1e4, 1e4, 0, 100.0, -100.0, 3e38, -3e38, 1.0])
    found = paged_attention(*case.arguments, scale=SCALE)
    assert found.isfinite().all()
    # Logits of several thousand have an error of a thousandth in fp32 themselves.
    torch.testing.assert_close(found.double(), case.expected(), atol=2e-2, rtol=2e-2)


def test_what_bf16_does_not_take_is_as_in_avx512(bf16_isa: str) -> None:
    """The shape and the dtype alone decide: float32, and heads that are no multiple of 32."""
    for head_dim, dtype in (
        (64, torch.float32),
        (48, torch.bfloat16),
        (80, torch.bfloat16),
        (10, torch.bfloat16),
    ):
        sequence = Sequence(300, (4, 2), head_dim, 100, dtype)
        found = sequence.run([(0, 300)])[0]
        with native.using_isa("avx512"):
            assert torch.equal(found, sequence.run([(0, 300)])[0])


LENGTH = 2 * KEY_TILE + 60
SPANS = st.tuples(
    st.integers(0, LENGTH - 1), st.sampled_from([1, 1, 1, 2, 3, 4, 15, 16, 17, 40, 129, 300])
).map(lambda span: (max(0, span[0] - span[1] + 1), span[0] + 1))


@pytest.mark.usefixtures("_restore_threads")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spans=st.lists(SPANS, min_size=1, max_size=7),
    threads=st.sampled_from([1, 2, 3]),
    heads=st.sampled_from([(16, 2), (3, 3), (5, 1), (36, 2)]),
    head_dim=st.sampled_from([32, 64]),
    window=st.sampled_from([None, 1, 20, 128, 300]),
    odd=st.lists(
        st.tuples(st.integers(0, LENGTH - 1), st.sampled_from([torch.inf, -torch.inf, torch.nan])), max_size=3
    ),
)
def test_a_query_has_the_same_bits_however_it_comes(
    isa: str,
    spans: list[tuple[int, int]],
    threads: int,
    heads: tuple[int, int],
    head_dim: int,
    window: int | None,
    odd: list[tuple[int, float]],
) -> None:
    """The query comes as a decode, in a chunk, in any batch, on any number of threads; also with
    values that are not finite."""
    sequence = Sequence(LENGTH, heads, head_dim, window)
    for position, value in odd:
        sequence.at(1, position)[position % heads[1], position % head_dim] = value
    torch.set_num_threads(1)
    whole = bits(sequence.run([(0, LENGTH)])[0])
    torch.set_num_threads(threads)
    for (first, end), found in zip(spans, sequence.run(spans), strict=True):
        assert torch.equal(bits(found), whole[first:end]), (first, end)


@pytest.mark.parametrize("window", [None, 100])
def test_decodes_have_the_bits_of_a_prompt(bf16_isa: str, window: int | None) -> None:
    """There are enough decodes to show a sum in another order, which is another bf16 once in some
    100,000 times."""
    sequence = Sequence(LENGTH, (64, 8), 64, window)
    [prompt] = sequence.run([(0, LENGTH)])
    decodes = torch.cat(sequence.run([(position, position + 1) for position in range(LENGTH)]))
    assert torch.equal(bits(decodes), bits(prompt))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("block_size", [1, 8, 24, 32])
def test_the_size_of_a_block_does_not_show(isa: str, block_size: int, window: int | None) -> None:
    """The keys that are multiplied together may lie in one block or in several."""
    spans = [(position, position + 1) for position in range(0, LENGTH, 7)] + [(200, 290)]
    usual, other = (
        Sequence(LENGTH, (16, 2), 64, window),
        Sequence(LENGTH, (16, 2), 64, window, block_size=block_size),
    )
    for half in range(2):
        for position in range(LENGTH):
            other.at(half, position).copy_(usual.at(half, position))
    other.q, other.sinks = usual.q, usual.sinks
    for found, expected in zip(other.run(spans), usual.run(spans), strict=True):
        assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("window", [None, 40])
def test_what_is_not_finite_reaches_only_queries_that_see_it(
    isa: str, window: int | None, value: float, dtype: torch.dtype
) -> None:
    """A key or value at a position changes no query before it, none beyond the window, and no other
    column or head."""
    length, position = 400, 290
    for half in (0, 1):
        sequence = Sequence(length, (6, 2), 64, window, dtype)
        before = sequence.run([(0, length)])[0]
        sequence.at(half, position)[1, 5] = value
        after = sequence.run([(0, length)])[0]
        seeing = torch.zeros(length, dtype=torch.bool)
        seeing[position : position + (window or length)] = True
        heads = slice(3, 6)
        assert torch.equal(after[~seeing], before[~seeing]), half
        assert torch.equal(after[:, :3], before[:, :3]), half
        columns = torch.arange(64) == 5
        if half == 1:
            assert torch.equal(after[seeing, heads][:, :, ~columns], before[seeing, heads][:, :, ~columns])
            assert (
                after[seeing, heads][:, :, columns].isnan()
                if value != value
                else after[seeing, heads][:, :, columns] == value
            ).all()
        elif value != value:
            assert after[seeing, heads].isnan().all()


def test_slots_that_nothing_sees_are_not_read(isa: str) -> None:
    """Blocks of freed sequences hold anything: slots after the last token and before the
    window are infinite or NaN here."""
    for window in (None, 33):
        sequence = Sequence(300, (8, 2), 64, window)
        expected = sequence.run([(280, 293)])[0]
        seen = range(0 if window is None else 280 - window + 1, 293)
        for position in set(range(300)) - set(seen):
            for half in (0, 1):
                sequence.at(half, position)[:] = (
                    torch.tensor([torch.inf, -torch.inf, torch.nan, torch.nan]).repeat(16).bfloat16()
                )
        used = sequence.table[0].tolist()
        unused = [block for block in range(sequence.kv_cache.shape[1]) if block not in used]
        sequence.kv_cache[:, unused] = torch.nan
        assert torch.equal(sequence.run([(280, 293)])[0], expected)
