"""Plans and results survive the wire, whatever is in them."""

import hypothesis.strategies as st
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings

from workers.constraint.automaton import NO_LIMITS, ConstraintLimits
from workers.request import SamplingParams, TokenLogprobs
from workers.scheduler.plan import SequenceStart, StepMasks, StepPlan, StepResult
from workers.scheduler.plan_wire import (
    PLAN_VERSION,
    decode_masks,
    decode_plan,
    decode_result,
    encode_masks,
    encode_plan,
    encode_result,
)

int_ids = st.integers(0, 2**32 - 1)
small_tuples = st.lists(int_ids, max_size=5).map(tuple)
finite = st.floats(allow_nan=False)
sampling_params = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 2**31),
    temperature=finite,
    top_p=finite,
    top_k=st.integers(-1, 2**31),
    min_p=finite,
    presence_penalty=finite,
    frequency_penalty=finite,
    repetition_penalty=finite,
    logit_bias=st.lists(st.tuples(int_ids, finite), max_size=3).map(tuple),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    logprobs=st.none() | st.integers(0, 20),
    stop_token_ids=small_tuples,
    min_tokens=st.integers(0, 2**31),
    ignore_eos=st.booleans(),
    n=st.integers(1, 128),
    prompt_logprobs=st.none() | st.integers(0, 20),
)


starts = st.builds(
    SequenceStart,
    seq_id=int_ids,
    token_ids=small_tuples,
    num_prompt_tokens=int_ids,
    sampling=sampling_params,
    stop_token_ids=small_tuples,
    constraint=st.none() | st.binary(max_size=16),
    full_blocks=small_tuples,
    sliding_blocks=small_tuples,
)
plans = st.builds(
    StepPlan,
    step=int_ids,
    starts=st.lists(starts, max_size=3).map(tuple),
    drops=small_tuples,
    seq_ids=small_tuples,
    num_computed_tokens=small_tuples,
    num_scheduled_tokens=small_tuples,
    samples=st.lists(st.booleans(), max_size=5).map(tuple),
    new_blocks=st.lists(st.tuples(int_ids, small_tuples, small_tuples), max_size=3).map(tuple),
    automata=st.lists(st.tuples(st.binary(max_size=16), st.binary(max_size=9)), max_size=3).map(tuple),
    dropped_automata=st.lists(st.binary(max_size=16), max_size=3).map(tuple),
    drafts=st.lists(st.tuples(int_ids, small_tuples), max_size=3).map(tuple),
    prompt_logprobs=st.lists(st.tuples(int_ids, int_ids, int_ids, int_ids), max_size=3).map(tuple),
)
entries = st.builds(TokenLogprobs, finite, st.lists(st.tuples(int_ids, finite), max_size=3).map(tuple))
logprobs = st.dictionaries(int_ids, st.lists(entries, max_size=3).map(tuple), max_size=3)
results = st.builds(
    StepResult,
    step=int_ids,
    seq_ids=small_tuples,
    token_ids=small_tuples,
    logprobs=logprobs,
    num_tokens=small_tuples,
    prompt_logprobs=logprobs,
    elapsed_s=finite,
    error=st.none() | st.text(),
)


@settings(max_examples=200, deadline=None)
@given(plans)
def test_a_plan_comes_back_equal(plan: StepPlan) -> None:
    decoded = decode_plan(encode_plan(plan))
    assert decoded == plan
    assert hash(decoded) == hash(plan)  # tuples all the way down
    assert [type(flag) for flag in decoded.samples] == [bool] * len(plan.samples)


@settings(deadline=None)
@given(results)
def test_a_result_comes_back_equal(result: StepResult) -> None:
    decoded = decode_result(encode_result(result))
    assert decoded == result
    assert isinstance(decoded.seq_ids, tuple)
    assert isinstance(decoded.token_ids, tuple)


def test_every_field_is_on_the_wire() -> None:
    """A field that is added and forgotten in the encoding would pass the tests above with its
    default."""
    sampling = SamplingParams(
        7, 0.5, 0.9, 5, 0.1, 0.2, 0.3, 1.1, ((3, -1.5),), 2**64 - 1, 4, (8, 9), 2, True, 3, 6, (5,), ((7, 8),)
    )
    start = SequenceStart(1, (1, 2, 3), 2, sampling, (4, 5), b"id", ConstraintLimits(8, 9), (6,), (0,))
    plan = StepPlan(
        9, (start,), (2,), (1,), (16,), (1,), (True,), ((0, (7,), (8,)),), ((b"id", b"body"),), (b"old",),
        ((0, (4,)),), ((0, 1, 2, 3),), True,
    )  # fmt: skip
    entry = TokenLogprobs(-0.5, ((5, -0.5),))
    result = StepResult(9, (1,), (5,), {1: (entry,)}, 0.25, "broken", 0.5, (1,), {2: (entry, entry)})
    for message, default in ((sampling, SamplingParams()), (plan, StepPlan(0)), (result, StepResult(0))):
        # Engines refuse structured_outputs, which LLM has replaced by a constraint.
        for name in sorted({*type(message).__slots__} - {"structured_outputs"}):
            assert getattr(message, name) != getattr(default, name), (
                f"{name} has its default value: give it another here"
            )
    for name in SequenceStart.__slots__:
        assert getattr(start, name) not in (NO_LIMITS, None, ())
    assert decode_plan(encode_plan(plan)) == plan
    assert decode_result(encode_result(result)) == result


def test_masks_come_back_equal() -> None:
    masks = StepMasks(7, np.array([0, 5]), np.arange(24, dtype=np.uint8).reshape(2, 12))
    decoded = decode_masks(encode_masks(masks))
    assert decoded.step == 7
    np.testing.assert_array_equal(decoded.rows, masks.rows)
    np.testing.assert_array_equal(decoded.bits, masks.bits)
    with pytest.raises(ValueError, match="format version"):
        decode_masks(msgpack.packb([PLAN_VERSION + 1, 7, b"", (0, 0), b""]))


@pytest.mark.parametrize("decode", [decode_plan, decode_result])
def test_another_version_is_refused(decode) -> None:
    message = encode_plan(StepPlan(0)) if decode is decode_plan else encode_result(StepResult(0))
    fields = msgpack.unpackb(message)
    assert fields[0] == PLAN_VERSION
    with pytest.raises(
        ValueError, match=f"format version {PLAN_VERSION + 1}, this process speaks {PLAN_VERSION}"
    ):
        decode(msgpack.packb([PLAN_VERSION + 1, *fields[1:]]))
