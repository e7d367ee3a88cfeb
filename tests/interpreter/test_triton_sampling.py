"""Sampling by Triton kernels against the reference: the same tokens, and logits changed to the same
bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from kernels.automaton import device as automaton_device
from kernels.sampling import (
    AllowedBits,
    LogitBias,
    Penalties,
    SamplingBatch,
    TokenIds,
    choose,
    logprobs,
    modify,
    sample,
    select,
    warm_up,
)
from kernels.sampling import reference as sampling_reference
from tests.interpreter.guards import guarded
from tests.interpreter.interpreter import recorded_launches
from tests.interpreter.launches import NoHostReads
from tests.support.sampling_cases import (
    assert_same,
    drawn_by_case,
    exact_thresholds,
    ints,
    random_batch,
    random_logits,
)

SMALL = {"CHUNK": 64, "SKIP": 32, "TILE": 16}
"""Sizes with which rows of a few hundred tokens have several chunks, and chunks several passes."""
EVERYTHING = "bias penalties automaton allowed bits forbidden"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(choose, name, value)
    monkeypatch.setattr(modify, "CHUNK", 32)
    monkeypatch.setattr(automaton_device, "CHUNK", 64)
    monkeypatch.setattr(modify, "ENTRIES", 8)
    monkeypatch.setattr(logprobs, "CHUNK", 32)


@pytest.fixture(autouse=True)
def one_pass_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a tile of 16 tokens as for one of 8192."""
    monkeypatch.setattr(choose, "TILE", choose.CHUNK)
    monkeypatch.setattr(choose, "SKIP", choose.CHUNK)


def check(logits: Tensor, batch: SamplingBatch) -> None:
    expected = sampling_reference.sample(logits, batch)
    original = logits.clone()
    places = None if batch.automaton is None else batch.automaton.places.clone()
    assert_same(sample(guarded(logits), batch), expected)
    assert torch.equal(logits, original)
    if batch.automaton is not None:
        assert torch.equal(batch.automaton.places, places)
    changed = guarded(logits)
    assert_same(sample(changed, replace(batch, overwrite_logits=True)), expected)
    assert torch.equal(changed, original) == (batch.logprob_rows is not None or not batch.changes_logits)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 193])
def test_the_reference_s_tokens_at_every_boundary(vocab: int) -> None:
    for rows in (1, 3):
        check(random_logits(rows, vocab, seed=vocab), random_batch(rows, vocab, seed=vocab + rows))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "parts",
    [
        *("", "k", "p", "m", "k p", "p m", "bias", "penalties", "automaton", "allowed", "bits", "forbidden"),
        "logprobs",
    ],
)
def test_each_part_alone(parts: str) -> None:
    check(random_logits(4, 130, seed=1), random_batch(4, 130, seed=2, parts=parts))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 3),
    vocab=st.integers(1, 150),
    levels=st.integers(0, 9),
    parts=st.sampled_from(["k", "p", "k p", "k p m"]),
)
def test_filters_with_ties(seed: int, rows: int, vocab: int, levels: int, parts: str) -> None:
    with small():
        check(
            random_logits(rows, vocab, seed=seed, levels=levels),
            random_batch(rows, vocab, seed=seed + 1, parts=parts),
        )


@contextmanager
def small() -> Iterator[None]:
    """Apply the fixture's settings in tests by hypothesis; two passes a chunk."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {"CHUNK": 64, "SKIP": 64, "TILE": 32}.items():
            patched.setattr(choose, name, value)
        yield


@pytest.mark.usefixtures("small_chunks")
def test_a_threshold_met_exactly_keeps_what_meets_it() -> None:
    logits, batch, kept = exact_thresholds()
    assert drawn_by_case(sample(logits, batch).token_ids) == kept


def test_a_row_of_gpt_oss() -> None:
    vocab = 201_088
    logits = random_logits(2, vocab, seed=4)
    check(logits, replace(random_batch(2, vocab, seed=5, parts="p logprobs"), top_p=torch.tensor([0.9, 1.0])))


@pytest.mark.usefixtures("small_chunks")
def test_a_row_does_not_depend_on_its_batch() -> None:
    logits, batch = random_logits(3, 150, seed=1), random_batch(3, 150, parts="k p m")
    together = sample(logits, batch).token_ids
    for row in range(3):
        alone = SamplingBatch(
            *(
                part[row : row + 1]
                for part in (
                    batch.temperature,
                    batch.seeds,
                    batch.output_positions,
                    batch.top_k,
                    batch.top_p,
                    batch.min_p,
                )
            )
        )
        assert torch.equal(sample(logits[row : row + 1], alone).token_ids, together[row : row + 1])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("temperature", [1e-45, 1e-6, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    logits = random_logits(4, 100)
    batch = replace(random_batch(4, 100, parts="k p"), temperature=torch.full((4,), temperature))
    found = sample(logits, batch).token_ids
    assert torch.equal(found, sampling_reference.sample(logits, batch).token_ids)


@pytest.mark.usefixtures("small_chunks")
def test_broken_logits_give_valid_ids() -> None:
    logits = torch.full((5, 90), torch.nan)
    logits[1] = -torch.inf
    logits[2, 7] = torch.inf
    logits[3, 80] = -3.0
    logits[4, ::2] = random_logits(1, 45)[0]
    for parts in ("", "k p m", "k p m forbidden logprobs"):
        found = sample(logits, random_batch(5, 90, parts=parts))
        assert bool(((found.token_ids >= 0) & (found.token_ids < 90)).all())
    greedy = sample(logits, SamplingBatch()).token_ids
    assert greedy.tolist() == [0, 0, 7, 80, int(logits[4].nan_to_num(-9).argmax())]


@pytest.mark.usefixtures("small_chunks")
def test_changed_logits_are_the_reference_s_bit_for_bit() -> None:
    for seed, parts in enumerate(
        ("bias", "penalties", "automaton", "automaton allowed", "allowed bits", EVERYTHING)
    ):
        logits, batch = random_logits(4, 77, seed=seed), random_batch(4, 77, seed=seed, parts=parts)
        logits[0, :40] = -torch.inf
        logits[3, 1:] = -torch.inf
        assert torch.equal(modify.modify(logits, batch), sampling_reference.modify(logits, batch)), parts
    assert modify.modify(logits, SamplingBatch()) is logits


@pytest.mark.usefixtures("small_chunks")
def test_extreme_penalties() -> None:
    logits = random_logits(3, 40, seed=2).clamp(-5, 5)
    logits[0, :3] = torch.tensor([torch.inf, -torch.inf, 30.0])
    ids = torch.arange(40).repeat(3)
    rows = torch.arange(3).repeat_interleave(40)
    counts = torch.ones(120, dtype=torch.int32)
    penalties = Penalties(rows, ids, counts, torch.zeros(3), torch.zeros(3), torch.tensor([1e-45, 3e38, 1.0]))
    batch = SamplingBatch(penalties=penalties)
    assert torch.equal(modify.modify(logits, batch), sampling_reference.modify(logits, batch))


@pytest.mark.usefixtures("small_chunks")
def test_entries_outside_the_logits_are_passed_over() -> None:
    """Guarded allocations fail the test if anything is written around the copy."""
    logits = random_logits(2, 50)
    rows, ids = ints(-1, 2, 0, 1, 10**12), ints(3, 3, -1, 50, 3)
    ones, counts = torch.ones(5), torch.ones(5, dtype=torch.int32)
    off = (torch.ones(2), torch.ones(2), torch.full((2,), 2.0))
    batch = SamplingBatch(
        logit_bias=LogitBias(rows, ids, ones * 100),
        penalties=Penalties(rows, ids, counts, *off),
        forbidden_ids=TokenIds(rows, ids),
        allowed_ids=TokenIds(rows, ids),
        allowed_bits=AllowedBits(ints(-1, 2), torch.zeros(2, 7, dtype=torch.uint8)),
    )
    assert torch.equal(modify.modify(logits, batch), logits)
    assert (
        sample(logits, replace(batch, logprob_rows=ints(5, -1))).token_ids.tolist()
        == logits.argmax(-1).tolist()
    )


def test_wide_strides_bf16_and_no_rows() -> None:
    wide = random_logits(3, 90)
    batch = random_batch(3, 40, parts="k p logprobs")
    assert_same(sample(wide[:, 20:60], batch), sampling_reference.sample(wide[:, 20:60], batch))
    half = wide.bfloat16()
    batch = random_batch(3, 90, parts="p bias logprobs")
    assert_same(sample(half, batch), sampling_reference.sample(half, batch))
    empty = sample(
        torch.zeros(0, 40),
        SamplingBatch(torch.zeros(0), ints(), ints(), top_p=torch.zeros(0), logit_bias=None),
    )
    assert empty.token_ids.shape == (0,)
    none_wanted = sample(wide, SamplingBatch(logprob_rows=ints(), num_top_logprobs=4))
    assert none_wanted.top_ids is not None
    assert none_wanted.top_ids.shape == (0, 4)


def test_scores_of_given_tokens() -> None:
    logits, tokens = random_logits(3, 90), ints(0, 89, 5)
    expected = sampling_reference.logprobs(logits, tokens, torch.arange(3), 2)
    with recorded_launches() as launches:
        assert_same(select(logits.device).run.score(logits, tokens, 2), expected)
    assert launches == ["chunk_logprobs_kernel", "logprobs_kernel"]


@pytest.mark.parametrize(
    ("parts", "launches"),
    [
        ("greedy", ["chunk_best_kernel", "greedy_kernel"]),
        ("", ["chunk_best_kernel", "chunk_sum_kernel", "pick_kernel"]),
        ("m", ["chunk_best_kernel", "chunk_sum_kernel", "pick_kernel"]),
        (
            "p",
            [
                "chunk_best_kernel",
                *["search_kernel"] * 8,
                "finish_search_kernel",
                "chunk_sum_kernel",
                "pick_kernel",
            ],
        ),
        (
            "greedy logprobs",
            ["chunk_best_kernel", "greedy_kernel", "chunk_logprobs_kernel", "logprobs_kernel"],
        ),
        ("greedy automaton", ["mask_kernel", "chunk_best_kernel", "greedy_kernel", "advance_kernel"]),
        (
            "greedy allowed",
            ["mark_kernel", "look_kernel", "restrict_kernel", "chunk_best_kernel", "greedy_kernel"],
        ),
    ],
)
def test_launches(parts: str, launches: list[str]) -> None:
    batch = random_batch(2, 40, parts=parts)
    if "greedy" in parts:
        batch = replace(batch, temperature=None)
    with recorded_launches() as names:
        sample(random_logits(2, 40), batch)
    assert names == launches


def test_warm_up_meets_every_kernel() -> None:
    kernels = {
        name
        for module in (automaton_device, choose, logprobs, modify)
        for name, value in vars(module).items()
        if isinstance(value, InterpretedFunction) and name.endswith("_kernel")
    }
    with recorded_launches() as names:
        warm_up(40, torch.device("cpu"))
    assert set(names) == kernels
    assert len(kernels) > 14


def test_nothing_is_read_back() -> None:
    logits, batch = random_logits(5, 60), random_batch(5, 60)
    with NoHostReads():
        sample(logits, batch)
    with pytest.raises(AssertionError, match="waits for the device"), NoHostReads():
        sampling_reference.sample(logits, batch)


def test_bad_shapes_are_named() -> None:
    good = SamplingBatch(torch.ones(2), ints(0, 0), ints(0, 0))
    for name, change in (
        ("seeds", {"seeds": ints(1)}),
        ("top_p", {"top_p": torch.ones(2, dtype=torch.float64)}),
        ("allowed_ids.token_ids", {"allowed_ids": TokenIds(ints(0), ints(0, 1))}),
        ("num_top_logprobs", {"num_top_logprobs": 10}),
    ):
        with pytest.raises(ValueError, match=rf"^{name} "):
            sample(torch.zeros(2, 9), replace(good, **change))
    for wrong in (torch.zeros(9), torch.zeros(2, 0), torch.zeros(9, 2).T):
        with pytest.raises(ValueError, match=r"^logits "):
            sample(wrong, good)
