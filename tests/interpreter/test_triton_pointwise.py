"""RMSNorm, YaRN tables and embedding lookup as Triton kernels, against their references and
float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.embedding import embed
from kernels.embedding import reference as embedding_reference
from kernels.pointwise import add_rms_norm, rms_norm, yarn_cos_sin
from kernels.pointwise import reference as pointwise_reference
from kernels.pointwise.norm import MAX_WIDTH
from tests.interpreter.guards import guarded
from tests.interpreter.interpreter import recorded_launches

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 2, 7, 64, 127, 128, 129, 1023, 1025, 2880)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of the sum's order in fp32; elsewhere one rounding may go the other way: the last bit."""
GPT_OSS = {
    "theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(width: int, dtype: torch.dtype) -> None:
    weight = guarded(random(width, dtype=dtype, seed=1))
    for num_rows in (0, 1, 3):
        x, delta = random(num_rows, width, dtype=dtype), guarded(random(num_rows, width, dtype=dtype, seed=2))
        expected = pointwise_reference.rms_norm(x, weight, 1e-5)
        torch.testing.assert_close(
            rms_norm(guarded(x), weight, 1e-5), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )
        total, normed = add_rms_norm(guarded(x), delta, weight, 1e-5)
        wanted = pointwise_reference.add_rms_norm(x, delta, weight, 1e-5)
        assert torch.equal(total, wanted[0])
        torch.testing.assert_close(normed, wanted[1], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_norms_of_rows_in_a_wider_tensor_and_of_more_axes() -> None:
    wide, weight = random(5, 40, dtype=torch.bfloat16), random(24, seed=1)
    part, delta = wide[:, 3:27], random(5, 30, dtype=torch.bfloat16, seed=2)[:, 6:]
    expected_sum, expected = pointwise_reference.add_rms_norm(part, delta, weight, 1e-6)
    untouched = wide.clone()
    torch.testing.assert_close(
        rms_norm(part, weight, 1e-6), pointwise_reference.rms_norm(part, weight, 1e-6), atol=2**-7, rtol=2**-7
    )
    assert torch.equal(wide, untouched)
    total, normed = add_rms_norm(part, delta, weight, 1e-6)
    assert torch.equal(total, expected_sum)
    torch.testing.assert_close(normed, expected, atol=2**-7, rtol=2**-7)
    assert torch.equal(wide[:, :3], untouched[:, :3])
    assert torch.equal(wide[:, 27:], untouched[:, 27:])
    cube = random(2, 3, 24)
    torch.testing.assert_close(rms_norm(cube, weight, 1e-6), pointwise_reference.rms_norm(cube, weight, 1e-6))


def test_the_norm_sees_the_sum_as_it_was_rounded() -> None:
    """With the unrounded sum, about a fifth of the results would differ in their last bit."""
    x, delta = (random(4, 1000, dtype=torch.bfloat16, seed=seed) for seed in range(2))
    weight = random(1000, seed=2)
    expected = pointwise_reference.add_rms_norm(x, delta, weight, 1e-5)[1]
    assert float((add_rms_norm(x, delta, weight, 1e-5)[1] == expected).float().mean()) > 0.99


def test_a_norm_of_large_and_of_tiny_values() -> None:
    for scale in (1e-12, 1e12):
        x, weight = random(2, 33) * scale, random(33, seed=1)
        exact = (
            x.double() * (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
        ).float()
        torch.testing.assert_close(rms_norm(x, weight, 1e-5), exact, atol=0, rtol=1e-6)


def test_each_norm_is_one_launch() -> None:
    x, weight = random(3, 8), random(8)
    with recorded_launches() as names:
        rms_norm(x, weight, 1e-5)
        add_rms_norm(x, x.clone(), weight, 1e-5)
        yarn_cos_sin(torch.arange(3), 64, truncate=False, **GPT_OSS)
        embed(torch.tensor([1]), x)
    assert names == ["rms_norm_kernel", "add_rms_norm_kernel", "yarn_kernel", "embed_kernel"]


def test_norms_name_the_argument_they_refuse() -> None:
    x = random(3, 8)
    bad = [
        (lambda: rms_norm(x, random(7), 1e-5), "weight"),
        (lambda: rms_norm(x.T[:, :3].T.T, random(3), 1e-5), "x"),
        (lambda: rms_norm(x, random(16)[::2], 1e-5), "weight"),
        (lambda: rms_norm(torch.zeros(1, MAX_WIDTH + 1), torch.zeros(MAX_WIDTH + 1), 1e-5), "x"),
        (lambda: add_rms_norm(x, x[:2], random(8), 1e-5), "delta"),
        (lambda: add_rms_norm(x, x.bfloat16(), random(8), 1e-5), "delta"),
        (lambda: add_rms_norm(x, random(8, 3).T, random(8), 1e-5), "delta"),
        (lambda: add_rms_norm(x[0], x[0], random(8), 1e-5), "residual"),
        (lambda: add_rms_norm(x, x, random(9), 1e-5), "weight"),
    ]
    for call, name in bad:
        with pytest.raises(ValueError, match=rf"^{name} "):
            call()


@pytest.mark.parametrize("head_dim", [2, 6, 10, 64, 128])
@pytest.mark.parametrize("truncate", [False, True])
def test_yarn_tables_up_to_the_last_position(head_dim: int, truncate: bool) -> None:
    """The reference's cosine is exact to its last bit; ours is, too: both may round the other way,
    hence two of them."""
    positions = torch.tensor(
        [0, 1, 2, 15, 16, 17, 127, 128, 129, 1000, 4095, 4096, 4097, 65535, 99999, 131070, 131071]
    )
    frequencies = pointwise_reference.yarn_frequencies(head_dim, *GPT_OSS.values(), truncate)
    angles = (positions.float()[:, None] * frequencies).double()
    concentration = 0.1 * math.log(32) + 1
    for count in (0, 1, 16, len(positions)):
        tables = yarn_cos_sin(guarded(positions[:count]), head_dim, truncate=truncate, **GPT_OSS)
        references = pointwise_reference.yarn_cos_sin(
            positions[:count], head_dim, truncate=truncate, **GPT_OSS
        )
        for table, expected, exact in zip(tables, references, (angles.cos(), angles.sin()), strict=True):
            assert table.shape == (count, head_dim // 2)
            torch.testing.assert_close(table, expected, atol=2.4e-7, rtol=0)
            torch.testing.assert_close(table.double(), exact[:count] * concentration, atol=1.3e-7, rtol=0)


def test_yarn_tables_of_any_position_and_int32() -> None:
    positions = torch.randint(0, 131072, (333,), generator=torch.Generator().manual_seed(3))
    expected = pointwise_reference.yarn_cos_sin(positions, 64, truncate=False, **GPT_OSS)
    for dtype in (torch.int64, torch.int32):
        tables = yarn_cos_sin(positions.to(dtype), 64, truncate=False, **GPT_OSS)
        for table, wanted in zip(tables, expected, strict=True):
            torch.testing.assert_close(table, wanted, atol=2.4e-7, rtol=0)
    plain = dict(GPT_OSS, factor=1.0)
    for table, wanted in zip(
        yarn_cos_sin(positions, 64, truncate=False, **plain),
        pointwise_reference.yarn_cos_sin(positions, 64, truncate=False, **plain),
        strict=True,
    ):
        torch.testing.assert_close(table, wanted, atol=2.4e-7, rtol=0)
    with pytest.raises(ValueError, match=r"^positions "):
        yarn_cos_sin(torch.zeros(3), 64, truncate=False, **GPT_OSS)


@given(
    num_tokens=st.integers(0, 9),
    num_rows=st.integers(0, 12),
    width=st.sampled_from([1, 3, 64, 1023, 1024, 1025]),
    first_id=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**30),
)
@settings(deadline=None, max_examples=60)
def test_embedding_rows(
    num_tokens: int, num_rows: int, width: int, first_id: int, dtype: torch.dtype, seed: int
) -> None:
    weight = guarded(random(num_rows, width, dtype=dtype, seed=seed))
    ids = torch.randint(0, 34, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    found = embed(guarded(ids), weight, first_id)
    assert torch.equal(found, embedding_reference.embed(ids, weight, first_id))
    for row, token in zip(found, ids.tolist(), strict=True):
        here = first_id <= token < first_id + num_rows
        assert torch.equal(row, weight[token - first_id] if here else torch.zeros(width, dtype=dtype))


def test_embedding_shards_add_up_to_the_whole() -> None:
    weight, ids = random(50, 6), torch.tensor([0, 16, 17, 33, 34, 49, 17])
    whole = embed(ids, weight)
    assert torch.equal(whole, weight[ids])
    bounds = (0, 17, 34, 34, 50)
    parts = [embed(ids, weight[start:stop], start) for start, stop in itertools.pairwise(bounds)]
    assert torch.equal(torch.stack(parts).sum(0), whole)
    assert torch.equal(embed(ids, weight.T.contiguous().T[:, :1]), weight[ids][:, :1])


def test_embedding_names_the_argument_it_refuses() -> None:
    weight = random(5, 4)
    for ids, table, first, name in (
        (torch.zeros(2, dtype=torch.int32), weight, 0, "token_ids"),
        (torch.zeros(2, 1, dtype=torch.int64), weight, 0, "token_ids"),
        (torch.zeros(2, dtype=torch.int64), weight.long(), 0, "weight"),
        (torch.zeros(2, dtype=torch.int64), weight.T, 0, "weight"),
        (torch.zeros(2, dtype=torch.int64), weight, -1, "first_id"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} "):
            embed(ids, table, first)
