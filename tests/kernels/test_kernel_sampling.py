"""Sampling, the reference's and the C++ one, against a float64 formulation of its definition, one
row at a time."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.sampling import (
    AllowedBits,
    LogitBias,
    Penalties,
    SamplingBatch,
    TokenIds,
    philox4x32,
    philox_words,
    sample,
    select,
    uniform,
)
from kernels.sampling import reference as sampling_reference
from tests.support.isas import FP32_ISAS
from tests.support.sampling_cases import drawn_by_case, exact_thresholds

pytestmark = pytest.mark.usefixtures("implementation")


def vector(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def random_logits(rows: int, vocab: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def distribution(
    logits: list[float], *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """Return the filtered distribution in float64."""
    scaled = np.array(logits, dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = [token for token in order if weights[token] >= min_p]
    if top_k > 0:
        order = order[:top_k]
    total, mass, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        kept.append(token)
        mass += weights[token]
        if mass >= top_p * total:
            break
    probabilities = np.zeros(len(logits))
    probabilities[kept] = weights[kept] / sum(weights[token] for token in kept)
    return probabilities


def python_philox(seed: int, position: int) -> list[int]:
    """Compute Philox4x32-10 in Python integers."""
    mask = 2**32 - 1
    counter, key = [position & mask, position >> 32, 0, 0], [seed & mask, seed >> 32]
    for _ in range(10):
        left, right = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (right >> 32) ^ counter[1] ^ key[0],
            right & mask,
            (left >> 32) ^ counter[3] ^ key[1],
            left & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_has_the_published_known_answers(counter: str, key: str, expected: str) -> None:
    """kat_vectors of the Random123 distribution."""

    def words(text: str) -> Tensor:
        return torch.tensor([int(word, 16) for word in text.split()])

    assert torch.equal(philox4x32(words(counter), words(key)), words(expected))


def as_signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**40)), min_size=1, max_size=8))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_words_of_seed_and_position(pairs: list[tuple[int, int]]) -> None:
    seeds, positions = (
        ints(*(as_signed(seed) for seed, _ in pairs)),
        ints(*(position for _, position in pairs)),
    )
    expected = [python_philox(seed, position) for seed, position in pairs]
    assert philox_words(seeds, positions).tolist() == expected
    assert uniform(seeds, positions).tolist() == [(words[0] + 0.5) / 2**32 for words in expected]


def test_uniform_numbers_are_uniform() -> None:
    numbers = uniform(torch.full((100_000,), 1234567), torch.arange(100_000))
    assert 0 < numbers.min() < numbers.max() < 1
    counts = torch.histc(numbers.float(), bins=100, min=0, max=1)
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert 60 < chi_square < 150  # 99 degrees of freedom


def test_greedy_takes_the_largest_and_of_equals_the_first() -> None:
    logits = torch.zeros(3, 1000)
    logits[0, [7, 900]] = 5.0
    logits[1, 999] = 0.1
    assert sample(logits, SamplingBatch()).token_ids.tolist() == [7, 999, 0]
    mixed = SamplingBatch(torch.zeros(3), ints(1, 2, 3), ints(0, 0, 0))
    assert sample(logits, mixed).token_ids.tolist() == [7, 999, 0]


FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_k": 1},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"temperature": 1.7, "top_k": 8, "top_p": 0.7, "min_p": 0.05},
]


def batch_of(
    count: int, seed: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> SamplingBatch:
    return SamplingBatch(
        torch.full((count,), temperature),
        torch.full((count,), seed, dtype=torch.int64),
        torch.arange(count),
        top_k=torch.full((count,), top_k, dtype=torch.int64) if top_k else None,
        top_p=torch.full((count,), top_p) if top_p < 1 else None,
        min_p=torch.full((count,), min_p) if min_p else None,
    )


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_frequencies_follow_the_filtered_distribution(filters: dict[str, float]) -> None:
    logits = random_logits(1, 12, seed=3)[0]
    draws = 20_000
    tokens = sample(logits.expand(draws, -1), batch_of(draws, 99, **filters)).token_ids
    probabilities = distribution(logits.tolist(), **filters)
    counts = torch.bincount(tokens, minlength=12).numpy()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * draws
    chi_square = float(((counts[possible] - expected) ** 2 / expected).sum())
    degrees = int(possible.sum()) - 1
    # The mean of chi-square is its degrees of freedom, its deviation sqrt(2 * degrees): five
    # deviations, and seeds are fixed.
    assert chi_square <= degrees + 5 * math.sqrt(2 * degrees)


def test_a_threshold_met_exactly_keeps_what_meets_it() -> None:
    logits, batch, kept = exact_thresholds()
    assert drawn_by_case(sample(logits, batch).token_ids) == kept


# The implementation is the same for all examples.
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**62),
    position=st.integers(0, 10**6),
    vocab=st.integers(1, 60),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(-1, 70),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    levels=st.integers(1, 40),
)
def test_each_token_is_the_one_the_definition_gives(
    seed: int,
    position: int,
    vocab: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    levels: int,
) -> None:
    # Few levels give many ties.
    logits = torch.randint(0, levels, (1, vocab), generator=torch.Generator().manual_seed(seed)).float() / 4
    batch = SamplingBatch(
        vector(temperature),
        ints(seed),
        ints(position),
        top_k=ints(top_k),
        top_p=vector(top_p),
        min_p=vector(min_p),
    )
    token = int(sample(logits, batch).token_ids)
    number = (python_philox(seed, position)[0] + 0.5) / 2**32

    def near(change: float) -> np.ndarray:
        return distribution(
            logits[0].tolist(),
            temperature=float(vector(temperature)),
            top_k=max(top_k, 0),
            top_p=float(vector(top_p)) * (1 + change),
            min_p=float(vector(min_p)) * (1 - change),
        )

    # Weights are fp32: where a threshold is met exactly up to their rounding, the outcome on either
    # side of it is right.
    allowed = set()
    for change in (-1e-5, 0.0, 1e-5):
        sums = near(change).cumsum()
        for wanted in (number - 1e-5, number, number + 1e-5):
            allowed.add(min(int((sums <= wanted * sums[-1]).sum()), vocab - 1))
    assert token in allowed


def everything_on(rows: int, vocab: int, seed: int = 0) -> SamplingBatch:
    """Return a batch in which rows differ in every parameter."""
    generator = torch.Generator().manual_seed(seed)

    def uniform_in(low: float, high: float) -> Tensor:
        return torch.rand(rows, generator=generator) * (high - low) + low

    def pairs(count: int) -> tuple[Tensor, Tensor]:
        flat = torch.randperm(rows * vocab, generator=generator)[:count]
        return flat // vocab, flat % vocab

    counts = torch.randint(0, 4, (5 * rows,), generator=generator, dtype=torch.int32)
    temperature = uniform_in(0.3, 2)
    temperature[::4] = 0
    return SamplingBatch(
        temperature,
        torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        torch.randint(0, 10_000, (rows,), generator=generator),
        top_k=torch.randint(-1, vocab, (rows,), generator=generator),
        top_p=uniform_in(0.3, 1.1).clamp(max=1),
        min_p=uniform_in(-0.1, 0.2).clamp(min=0),
        logit_bias=LogitBias(*pairs(3 * rows), torch.randn(3 * rows, generator=generator) * 5),
        penalties=Penalties(
            *pairs(5 * rows), counts, uniform_in(-2, 2), uniform_in(-2, 2), uniform_in(0.5, 2)
        ),
        forbidden_ids=TokenIds(*pairs(2 * rows)),
        logprob_rows=torch.arange(rows),
        num_top_logprobs=3,
    )


def only_row(batch: SamplingBatch, row: int) -> SamplingBatch:
    """Return the same parameters for one row alone."""

    def of(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[row : row + 1]

    bias, penalties, forbidden = batch.logit_bias, batch.penalties, batch.forbidden_ids
    assert bias is not None
    assert penalties is not None
    assert forbidden is not None
    in_bias, in_penalties, in_forbidden = bias.rows == row, penalties.rows == row, forbidden.rows == row
    return replace(
        batch,
        temperature=of(batch.temperature),
        seeds=of(batch.seeds),
        output_positions=of(batch.output_positions),
        top_k=of(batch.top_k),
        top_p=of(batch.top_p),
        min_p=of(batch.min_p),
        logit_bias=LogitBias(bias.rows[in_bias] * 0, bias.token_ids[in_bias], bias.values[in_bias]),
        penalties=Penalties(
            penalties.rows[in_penalties] * 0,
            penalties.token_ids[in_penalties],
            penalties.output_counts[in_penalties],
            penalties.presence[row : row + 1],
            penalties.frequency[row : row + 1],
            penalties.repetition[row : row + 1],
        ),
        forbidden_ids=TokenIds(forbidden.rows[in_forbidden] * 0, forbidden.token_ids[in_forbidden]),
        logprob_rows=ints(0),
    )


@pytest.mark.parametrize("vocab", [50, 1999])
def test_the_same_seed_gives_the_same_token_whatever_the_batch(
    vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 24
    logits, batch = random_logits(rows, vocab, seed=1), everything_on(rows, vocab)
    together = sample(logits, batch)
    for row in range(rows):
        alone = sample(logits[row : row + 1], only_row(batch, row))
        assert int(alone.token_ids) == int(together.token_ids[row])
        assert together.logprobs is not None
        assert together.top_ids is not None
        assert alone.logprobs is not None
        assert alone.top_ids is not None
        assert torch.equal(alone.logprobs, together.logprobs[row : row + 1])
        assert torch.equal(alone.top_ids, together.top_ids[row : row + 1])
    monkeypatch.setattr(sampling_reference, "MAX_ELEMENTS", 5 * vocab)
    assert torch.equal(sample(logits, batch).token_ids, together.token_ids)


def test_seed_and_position_both_matter() -> None:
    logits = torch.zeros(64, 500)
    ones, rows = torch.ones(64), torch.arange(64)
    by_seed = sample(logits, SamplingBatch(ones, rows, rows * 0)).token_ids
    by_position = sample(logits, SamplingBatch(ones, rows * 0, rows)).token_ids
    high_bits = sample(logits, SamplingBatch(ones, rows << 40, rows * 0)).token_ids
    for tokens in (by_seed, by_position, high_bits):
        assert len(set(tokens.tolist())) > 50
    assert torch.equal(sample(logits, SamplingBatch(ones, rows, rows * 0)).token_ids, by_seed)


def greedy_after(logits: Tensor, **parts: object) -> list[int]:
    """Return token ids from best to worst as the modified logits order them, found by forbidding
    the best again and again."""
    found: list[int] = []
    for _ in range(logits.shape[1]):
        batch = SamplingBatch(**parts, forbidden_ids=TokenIds(ints(*([0] * len(found))), ints(*found)))  # type: ignore[arg-type]
        found.append(int(sample(logits, batch).token_ids))
    return found


def test_penalties_and_bias_in_their_order() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(1, 20, generator=generator) * 2
    ids = torch.randperm(20, generator=generator)[:9]
    counts = torch.tensor([0, 1, 2, 3, 0, 1, 5, 1, 2], dtype=torch.int32)
    bias_ids, bias_values = ints(int(ids[1]), 3, 3), vector(-2.5, 1.0, 0.75)
    expected = logits[0].double().tolist()
    for token, value in zip(bias_ids.tolist(), bias_values.tolist(), strict=True):
        expected[token] += value
    for token, count in zip(ids.tolist(), counts.tolist(), strict=True):
        value = expected[token]
        value = value / 1.3 if value > 0 else value * 1.3
        value -= 0.4 * count
        if count:
            value -= 0.9
        expected[token] = value
    penalties = Penalties(ids * 0, ids, counts, vector(0.9), vector(0.4), vector(1.3))
    found = greedy_after(
        logits, logit_bias=LogitBias(bias_ids * 0, bias_ids, bias_values), penalties=penalties
    )
    assert found == sorted(range(20), key=lambda token: -expected[token])


def test_penalties_touch_only_their_rows() -> None:
    logits = random_logits(3, 10)
    best = logits.argmax(-1)
    penalties = Penalties(
        ints(1),
        best[1:2],
        torch.tensor([1], dtype=torch.int32),
        vector(0, 100, 0),
        vector(0, 0, 0),
        vector(1, 1, 1),
    )
    found = sample(logits, SamplingBatch(penalties=penalties)).token_ids
    assert found[[0, 2]].tolist() == best[[0, 2]].tolist()
    assert int(found[1]) == int(logits[1].argsort(descending=True)[1])


def test_allowed_and_forbidden_tokens() -> None:
    logits = random_logits(4, 50)
    order = logits.argsort(-1, descending=True)
    allowed = TokenIds(
        ints(1, 1, 1, 3), ints(int(order[1, 40]), int(order[1, 10]), int(order[1, 10]), int(order[3, 49]))
    )
    forbidden = TokenIds(ints(0, 0, 2), ints(int(order[0, 0]), int(order[0, 1]), int(order[2, 5])))
    batch = SamplingBatch(allowed_ids=allowed, forbidden_ids=forbidden)
    expected = [int(order[0, 2]), int(order[1, 10]), int(order[2, 0]), int(order[3, 49])]
    assert sample(logits, batch).token_ids.tolist() == expected
    draws = 4 * 500
    many = SamplingBatch(
        torch.full((draws,), 50.0),
        torch.arange(draws),
        torch.zeros(draws, dtype=torch.int64),
        forbidden_ids=TokenIds(torch.arange(draws).repeat_interleave(48), torch.arange(48).repeat(draws)),
    )
    assert set(sample(logits.repeat(500, 1), many).token_ids.tolist()) == {48, 49}


def test_allowed_bits_are_little_endian() -> None:
    vocab = 21
    logits = random_logits(3, vocab, seed=8)
    for row in (0, 2):
        for token in range(vocab):
            bits = (1 << token).to_bytes(3, "little")
            mask = AllowedBits(ints(row), torch.tensor(list(bits), dtype=torch.uint8)[None])
            expected = logits.argmax(-1)
            expected[row] = token
            assert torch.equal(sample(logits, SamplingBatch(allowed_bits=mask)).token_ids, expected)


def test_bits_end_before_or_after_the_vocabulary() -> None:
    logits = torch.arange(20.0)[None]
    for num_bytes, best in ((1, 7), (2, 15), (3, 19), (5, 19)):
        mask = AllowedBits(ints(0), torch.full((1, num_bytes), 255, dtype=torch.uint8))
        assert int(sample(logits, SamplingBatch(allowed_bits=mask)).token_ids) == best


def test_a_row_in_both_kinds_of_allowed_takes_what_both_allow() -> None:
    logits = torch.arange(16.0)[None]
    mask = AllowedBits(ints(0), torch.tensor([[0b00110000, 0b1]], dtype=torch.uint8))
    batch = SamplingBatch(allowed_ids=TokenIds(ints(0, 0, 0), ints(3, 5, 9)), allowed_bits=mask)
    assert int(sample(logits, batch).token_ids) == 5


def test_forbidding_all_that_is_allowed_is_ignored_for_that_row() -> None:
    logits = torch.arange(10.0).repeat(2, 1)
    batch = SamplingBatch(
        allowed_ids=TokenIds(ints(0, 0, 1, 1), ints(2, 4, 2, 4)),
        forbidden_ids=TokenIds(ints(0, 0, 1), ints(2, 4, 4)),
    )
    assert sample(logits, batch).token_ids.tolist() == [4, 2]


@pytest.mark.parametrize("vocab", [7, 3000])
def test_logprobs_are_of_the_raw_logits(vocab: int) -> None:
    logits = random_logits(5, vocab)
    logits[2, [4, 1, 6]] = 9.0  # ties come in order of ids
    before = logits.clone()
    batch = replace(everything_on(5, vocab), logprob_rows=ints(4, 2, 0), num_top_logprobs=4)
    found = sample(logits, batch)
    assert torch.equal(logits, before)
    assert found.logprobs is not None
    assert found.top_ids is not None
    assert found.top_logprobs is not None
    for index, row in enumerate([4, 2, 0]):
        values = logits[row].double().numpy()
        logprobs = values - np.log(np.exp(values).sum())
        order = sorted(range(vocab), key=lambda token, values=values: (-values[token], token))[:4]
        assert found.top_ids[index].tolist() == order
        assert found.top_logprobs[index].tolist() == pytest.approx(logprobs[order].tolist(), abs=1e-5)
        assert float(found.logprobs[index]) == pytest.approx(logprobs[int(found.token_ids[row])], abs=1e-5)


@pytest.mark.parametrize("num_top", [0, 3])
def test_scores_are_the_log_probabilities_of_given_tokens(num_top: int) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    tokens = ints(3, 49, 0, 7, 7, 20)
    found = select(logits.device).run.score(logits, tokens, num_top)
    expected = logits.double().log_softmax(-1)
    assert found.logprobs is not None
    assert found.top_ids is not None
    assert found.top_logprobs is not None
    assert found.token_ids.tolist() == tokens.tolist()
    wanted = expected.gather(1, tokens[:, None])[:, 0].float()
    torch.testing.assert_close(found.logprobs, wanted, rtol=0, atol=1e-5)
    top = expected.topk(num_top)
    assert torch.equal(found.top_ids, top.indices)
    torch.testing.assert_close(found.top_logprobs, top.values.float(), rtol=0, atol=1e-5)


def test_no_alternatives_and_no_logprobs() -> None:
    logits = random_logits(2, 5)
    found = sample(logits, SamplingBatch(logprob_rows=ints(1)))
    assert found.top_ids is not None
    assert found.top_ids.shape == (1, 0)
    assert found.logprobs is not None
    assert found.logprobs.shape == (1,)
    plain = sample(logits, SamplingBatch())
    assert plain.logprobs is plain.top_ids is plain.top_logprobs is None


def test_the_end_of_top_p_beyond_the_first_candidates() -> None:
    """A flat distribution: top_p reaches further than the tokens that are sorted at first."""
    vocab = 5 * sampling_reference.FIRST_CANDIDATES
    draws = 400
    tokens = sample(torch.zeros(draws, vocab), batch_of(draws, 5, top_p=0.5)).token_ids
    assert int(tokens.max()) < vocab // 2
    assert int(tokens.max()) > vocab // 2 - vocab // 20


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    logits = random_logits(200, 30)
    tokens = sample(logits, batch_of(200, 3, temperature=temperature)).token_ids
    if temperature < 1:
        assert torch.equal(tokens, logits.argmax(-1))
    else:
        assert len(set(tokens.tolist())) == 30


def test_broken_logits_do_not_raise() -> None:
    logits = torch.full((3, 40), torch.nan)
    logits[1] = -torch.inf
    batch = replace(everything_on(3, 40), penalties=None)
    found = sample(logits, batch)
    assert bool(((found.token_ids >= 0) & (found.token_ids < 40)).all())


def test_bf16_logits_and_an_empty_batch() -> None:
    logits = random_logits(3, 40).bfloat16()
    assert torch.equal(sample(logits, SamplingBatch()).token_ids, logits.float().argmax(-1))
    assert sample(torch.zeros(0, 40), SamplingBatch()).token_ids.shape == (0,)
    assert sample(torch.zeros(0, 40), batch_of(0, 1)).token_ids.shape == (0,)


def test_bad_arguments_are_named() -> None:
    logits = torch.zeros(2, 9)
    two, long_two = torch.ones(2), ints(0, 0)
    good = SamplingBatch(two, long_two, long_two)
    sample(logits, good)
    one_row, byte = ints(0), torch.zeros(1, 2, dtype=torch.uint8)
    off = (torch.zeros(2), torch.zeros(2), torch.ones(2))
    bad: list[tuple[str, dict[str, object]]] = [
        ("temperature", {"temperature": torch.ones(3)}),
        ("temperature", {"temperature": two.double()}),
        ("seeds", {"seeds": None}),
        ("seeds", {"seeds": two}),
        ("output_positions", {"output_positions": None}),
        ("output_positions", {"output_positions": ints(1)}),
        ("top_k", {"top_k": two}),
        ("top_p", {"top_p": two.double()}),
        ("min_p", {"min_p": torch.ones(2, 1)}),
        ("logit_bias.rows", {"logit_bias": LogitBias(ints(2), one_row, vector(1))}),
        ("logit_bias.token_ids", {"logit_bias": LogitBias(one_row, ints(9), vector(1))}),
        ("logit_bias.values", {"logit_bias": LogitBias(one_row, one_row, vector(1, 2))}),
        (
            "penalties.token_ids",
            {"penalties": Penalties(one_row, ints(1, 2), torch.ones(1, dtype=torch.int32), *off)},
        ),
        ("penalties.output_counts", {"penalties": Penalties(one_row, one_row, one_row, *off)}),
        (
            "penalties.presence",
            {"penalties": Penalties(one_row, one_row, torch.ones(1, dtype=torch.int32), vector(0), *off[1:])},
        ),
        ("allowed_ids.token_ids", {"allowed_ids": TokenIds(one_row, ints(-1))}),
        ("forbidden_ids.rows", {"forbidden_ids": TokenIds(ints(-1), one_row)}),
        ("forbidden_ids.rows", {"forbidden_ids": TokenIds(vector(0), one_row)}),
        ("allowed_bits.rows", {"allowed_bits": AllowedBits(ints(5), byte)}),
        ("allowed_bits.bits", {"allowed_bits": AllowedBits(ints(0, 1), byte)}),
        ("allowed_bits.bits", {"allowed_bits": AllowedBits(one_row, byte.int())}),
        ("logprob_rows", {"logprob_rows": ints(2)}),
        ("num_top_logprobs", {"num_top_logprobs": 10}),
        ("num_top_logprobs", {"num_top_logprobs": -1}),
    ]
    for named, change in bad:
        with pytest.raises(ValueError, match=rf"^{named} "):
            sample(logits, replace(good, **change))  # type: ignore[arg-type]
    for wrong in (torch.zeros(9), torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match=r"^logits "):
            sample(wrong, SamplingBatch())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("repetition", "wanted"), [(1e-45, {3, 7}), (3e38, {9})])
def test_extreme_repetition_penalties_leave_a_choice(
    temperature: float, repetition: float, wanted: set[int]
) -> None:
    logits = random_logits(1, 50).clamp(-5, 5)
    logits[0, [3, 7, 9]] = vector(20.0, 20.0, -20.0)
    batch = SamplingBatch(
        temperature=vector(temperature),
        seeds=ints(1),
        output_positions=ints(0),
        penalties=Penalties(
            ints(0, 0, 0),
            ints(3, 7, 9),
            torch.ones(3, dtype=torch.int32),
            vector(0.0),
            vector(0.0),
            vector(repetition),
        ),
        # The only token allowed was seen, and its logit is negative.
        allowed_ids=TokenIds(ints(0), ints(9)) if repetition > 1 else None,
    )
    assert int(sample(logits, batch).token_ids) in wanted


@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize("implementation", FP32_ISAS, indirect=True)
@pytest.mark.parametrize(
    "filters",
    [*FILTERS, {"top_k": 5000}, {"top_k": 700, "top_p": 0.9}, {"top_p": 0.999}, {"min_p": 1e-3}],
    ids=str,
)
def test_the_whole_vocabulary_against_the_reference(implementation: str, filters: dict[str, float]) -> None:
    """The vocabulary is gpt-oss's; logits were rounded to bf16, as the model's are: many are
    equal."""
    rows = 6
    logits = random_logits(rows, 201_088, seed=11, spread=1.5).bfloat16().float()
    logits[:2] *= 4  # some peaked distributions
    batch = replace(batch_of(rows, 17, **filters), logprob_rows=ints(5, 1), num_top_logprobs=20)
    found, expected = sample(logits, batch), sampling_reference.sample(logits, batch)
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.equal(found.top_ids, expected.top_ids)  # type: ignore[arg-type]
    for name in ("logprobs", "top_logprobs"):
        # Two fp32 sums of 201,088 terms, and logits up to 30.
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=2e-5, rtol=0)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        again = sample(logits, batch)
        assert torch.equal(again.token_ids, found.token_ids)
        assert torch.equal(again.logprobs, found.logprobs)  # type: ignore[arg-type]


@pytest.mark.parametrize("vocab", [1, 15, 511, 512, 513, 1040])
def test_rows_that_are_not_side_by_side(vocab: int) -> None:
    wide = random_logits(4, 2 * vocab + 3, seed=2)
    wide[:, vocab:] = torch.inf  # what may not be read
    batch = replace(batch_of(4, 3, top_k=7, top_p=0.9), logprob_rows=ints(2), num_top_logprobs=min(vocab, 3))
    whole, part = sample(wide[:, :vocab].contiguous(), batch), sample(wide[:, :vocab], batch)
    across = sample(wide[:, :vocab].T.contiguous().T, batch)
    for other in (part, across):
        assert torch.equal(other.token_ids, whole.token_ids)
        assert torch.equal(other.logprobs, whole.logprobs)  # type: ignore[arg-type]
        assert torch.equal(other.top_ids, whole.top_ids)  # type: ignore[arg-type]


def test_both_zeros_are_equal() -> None:
    logits = torch.full((1, 600), -1.0)
    logits[0, 530], logits[0, 3], logits[0, 599] = 0.0, -0.0, 0.0
    assert sample(logits, SamplingBatch()).token_ids.tolist() == [3]
    draws = sample(logits.expand(300, -1), batch_of(300, 1, top_k=2)).token_ids
    assert set(draws.tolist()) == {3, 530}
    top = sample(logits, SamplingBatch(logprob_rows=ints(0), num_top_logprobs=3)).top_ids
    assert top is not None
    assert top.tolist() == [[3, 530, 599]]


def test_many_alternatives() -> None:
    logits = random_logits(2, 1500).round()
    for count in (512, 513, 1500):
        top = sample(logits, SamplingBatch(logprob_rows=ints(0, 1), num_top_logprobs=count)).top_ids
        assert top is not None
        assert torch.equal(top, logits.sort(dim=-1, descending=True, stable=True).indices[:, :count])
