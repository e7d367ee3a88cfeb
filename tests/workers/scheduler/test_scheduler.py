"""The scheduler's rules, one at a time, with plans written out."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.support.simulated_rank import SimulatedRank
from workers.config import SchedulerConfig
from workers.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from workers.kv_cache.manager import KVCacheManager
from workers.request import EngineRequest, SamplingParams, TokenLogprobs
from workers.scheduler.plan import StepPlan, StepResult
from workers.scheduler.plan_wire import encode_plan
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.sequence import Sequence, SequenceUpdate

STOP = 2


def request(
    num_prompt: int,
    *,
    output: tuple[int, ...] = (),
    first: int = 1000,
    priority: int = 0,
    **sampling: object,
) -> EngineRequest:
    params = replace(SamplingParams(max_tokens=None, seed=0), **sampling)
    return EngineRequest("r", tuple(range(first, first + num_prompt)), params, output, priority=priority)


def build(
    *,
    num_full: int = 50,
    num_sliding: int = 0,
    window: int | None = None,
    seqs: int = 8,
    budget: int = 100,
    max_model_len: int = 200,
) -> Scheduler:
    kv = KVCacheManager(num_full_blocks=num_full, num_sliding_blocks=num_sliding, window=window)
    return Scheduler(SchedulerConfig(seqs, budget), kv, max_model_len=max_model_len)


def add(scheduler: Scheduler, seq_id: int, num_prompt: int, **kwargs: object) -> Sequence:
    """A prompt unlike those of other sequences."""
    checked = request(num_prompt, first=1000 * (seq_id + 1), **kwargs)
    scheduler.check(checked)
    sequence = Sequence(seq_id, checked, (STOP,))
    assert scheduler.add(sequence) is None
    return sequence


def answer(scheduler: Scheduler, plan: StepPlan | None, token_id: int = 7) -> list[SequenceUpdate]:
    assert plan is not None
    seq_ids = tuple(seq_id for seq_id, samples in zip(plan.seq_ids, plan.samples, strict=True) if samples)
    updates = scheduler.update(StepResult(plan.step, seq_ids, (token_id,) * len(seq_ids)))
    scheduler.check_integrity()
    return updates


def summary(plan: StepPlan | None) -> list[tuple[int, int, int, bool]]:
    assert plan is not None
    return list(
        zip(plan.seq_ids, plan.num_computed_tokens, plan.num_scheduled_tokens, plan.samples, strict=True)
    )


def test_prompts_are_computed_in_chunks_within_the_budget_beside_running_sequences() -> None:
    scheduler = build(budget=10)
    add(scheduler, 0, 4)
    add(scheduler, 1, 17)
    add(scheduler, 2, 3)
    plans = []
    for _ in range(4):
        plans.append(scheduler.schedule())
        answer(scheduler, plans[-1])
    assert [summary(plan) for plan in plans] == [
        [(0, 0, 4, True), (1, 0, 6, False)],
        [(0, 4, 1, True), (1, 6, 9, False)],
        [(0, 5, 1, True), (1, 15, 2, True), (2, 0, 3, True)],
        [(0, 6, 1, True), (1, 17, 1, True), (2, 3, 1, True)],
    ]
    assert [[start.seq_id for start in plan.starts] for plan in plans if plan] == [[0, 1], [], [2], []]
    assert [plan.step for plan in plans if plan] == [0, 1, 2, 3]
    # Blocks are named when they are taken: at the first token of each 16.
    assert [plan.new_blocks for plan in plans if plan] == [
        ((0, (1,), ()), (1, (2,), ())),
        (),
        ((1, (3,), ()), (2, (4,), ())),
        (),
    ]


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = build(seqs=2)
    for seq_id in range(3):
        add(scheduler, seq_id, 5, max_tokens=2)
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.has_work) == (0, 3, True)
    answer(scheduler, scheduler.schedule())
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    answer(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.drops == (0, 1)
    assert plan.seq_ids == (2,)


def test_a_waiting_sequence_is_not_overtaken_by_a_smaller_one() -> None:
    scheduler = build(num_full=14, max_model_len=200, budget=200)
    add(scheduler, 0, 100)
    answer(scheduler, scheduler.schedule())
    add(scheduler, 1, 120)
    add(scheduler, 2, 1)
    for _ in range(3):
        plan = scheduler.schedule()
        answer(scheduler, plan)
        assert summary(plan)[0][0] == 0
        assert len(summary(plan)) == 1
    assert scheduler.num_waiting == 2


def test_waiting_sequences_begin_by_priority_and_arrival() -> None:
    scheduler = build(seqs=1)
    for seq_id, priority in enumerate((0, 5, 0, -3, 5, -3)):
        add(scheduler, seq_id, 5, max_tokens=1, priority=priority)
        scheduler.check_integrity()
    begun = []
    while (plan := scheduler.schedule()) is not None:
        begun += plan.seq_ids
        answer(scheduler, plan)
    assert begun == [3, 5, 0, 2, 1, 4]


def test_a_running_sequence_is_not_interrupted_by_a_more_urgent_one() -> None:
    scheduler = build(seqs=1)
    add(scheduler, 0, 5, max_tokens=3)
    answer(scheduler, scheduler.schedule())
    add(scheduler, 1, 5, max_tokens=1, priority=-1)
    for _ in range(2):
        plan = scheduler.schedule()
        assert plan is not None
        assert plan.seq_ids == (0,)
        answer(scheduler, plan)
    assert summary(scheduler.schedule()) == [(1, 0, 5, True)]


def test_the_least_urgent_sequence_is_preempted_and_waits_behind_the_others() -> None:
    scheduler = build(num_full=13, budget=200, max_model_len=190)
    add(scheduler, 0, 60, priority=2)
    answer(scheduler, scheduler.schedule())
    add(scheduler, 1, 60, priority=1)
    add(scheduler, 2, 60, priority=1)
    answer(scheduler, scheduler.schedule())
    assert scheduler.num_running == 3
    add(scheduler, 3, 5, priority=2)
    plan = scheduler.schedule()
    while plan is not None and not plan.drops:  # until one needs a fifth block
        answer(scheduler, plan)
        plan = scheduler.schedule()
    assert plan is not None
    assert plan.drops == (0,)
    assert set(plan.seq_ids) == {1, 2}
    answer(scheduler, plan)
    assert [sequence.seq_id for sequence in scheduler._waiting] == [0, 3]


def test_the_newest_sequence_is_preempted_and_computed_again_with_its_output() -> None:
    scheduler = build(num_full=5, max_model_len=64, budget=64)
    add(scheduler, 0, 31)
    second = add(scheduler, 1, 31)
    for _ in range(2):  # 31 prompt tokens and one more fill two blocks each
        answer(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert summary(plan) == [(0, 32, 1, True)]
    assert (
        scheduler.num_preemptions,
        second.num_preemptions,
        scheduler.num_running,
        scheduler.num_waiting,
    ) == (1, 1, 1, 1)
    answer(scheduler, plan)
    assert plan is not None
    assert plan.drops == (1,)
    update = scheduler.abort(0, "gone")
    assert update == SequenceUpdate(0, finish_reason="abort", error="gone")
    plan = scheduler.schedule()
    assert plan is not None
    [start] = plan.starts
    assert (start.seq_id, start.num_prompt_tokens, start.token_ids[31:]) == (1, 31, (7, 7))
    # One of its two blocks was reused for the third of sequence 0; the first was still there.
    assert summary(plan) == [(1, 16, 17, True)]
    assert plan.drops == (0,)
    assert [entry.num_cached_tokens for entry in answer(scheduler, plan)] == [0]


def test_a_chunk_shrinks_to_the_sliding_blocks_there_are() -> None:
    scheduler = build(num_sliding=6, window=32, budget=200)
    add(scheduler, 0, 150)
    spans = []
    while not spans or not spans[-1][3]:
        plan = scheduler.schedule()
        spans += summary(plan)
        answer(scheduler, plan)
    assert spans == [(0, 0, 80, False), (0, 80, 48, False), (0, 128, 22, True)]
    assert scheduler.num_preemptions == 0


def test_prefix_hits_are_reported_and_not_computed() -> None:
    scheduler = build(num_sliding=50, window=20)
    assert scheduler.add(Sequence(0, request(40, max_tokens=1))) is None
    assert [update.num_cached_tokens for update in answer(scheduler, scheduler.schedule())] == [0]
    assert scheduler.add(Sequence(1, request(40, max_tokens=1))) is None
    plan = scheduler.schedule()
    assert plan is not None
    assert summary(plan) == [(1, 32, 8, True)]
    # The query at 32 sees keys from 13 on: both sliding blocks.
    assert (plan.starts[0].full_blocks, plan.starts[0].sliding_blocks) == ((1, 2), (1, 2))
    assert [update.num_cached_tokens for update in answer(scheduler, plan)] == [32]


def test_output_is_found_again_by_the_next_turn() -> None:
    """Blocks that decoding fills one token at a time are cached like those of prompts, the last
    token not yet being computed."""
    scheduler = build(num_sliding=50, window=20)
    assert scheduler.add(Sequence(0, request(20, max_tokens=29))) is None
    while scheduler.has_work:
        answer(scheduler, scheduler.schedule())
    longer = request(20, max_tokens=1)
    for num_output, num_cached in ((27, 32), (28, 32), (29, 48), (40, 48)):
        turn = replace(longer, prompt_token_ids=(*longer.prompt_token_ids, *(7,) * num_output))
        assert scheduler.add(Sequence(num_output, turn)) is None
        assert [update.num_cached_tokens for update in answer(scheduler, scheduler.schedule())] == [
            num_cached
        ]


def test_stop_tokens_end_a_sequence_after_min_tokens() -> None:
    scheduler = build()
    add(scheduler, 0, 3, stop_token_ids=(9,))
    add(scheduler, 1, 3, min_tokens=1, stop_token_ids=(9,))
    add(scheduler, 2, 3, ignore_eos=True, stop_token_ids=(9,), max_tokens=2)
    plan = scheduler.schedule()
    assert plan is not None
    assert [start.stop_token_ids for start in plan.starts] == [(9, STOP), (9, STOP), ()]
    updates = answer(scheduler, plan, STOP)
    assert [(entry.token_ids, entry.finish_reason, entry.stop_token_id) for entry in updates] == [
        ((STOP,), "stop", STOP),
        ((STOP,), None, None),
        ((STOP,), None, None),
    ]
    updates = answer(scheduler, scheduler.schedule(), 9)
    assert [(entry.seq_id, entry.finish_reason, entry.stop_token_id) for entry in updates] == [
        (1, "stop", 9),
        (2, "length", None),
    ]
    assert not scheduler.has_work
    assert scheduler.schedule() is None


def test_a_stop_token_at_the_limit_is_a_stop_and_a_prompt_never_stops() -> None:
    scheduler = build()
    sequence = Sequence(0, replace(request(2, max_tokens=1), prompt_token_ids=(5, STOP)), (STOP,))
    assert scheduler.add(sequence) is None
    [update] = answer(scheduler, scheduler.schedule(), STOP)
    assert update.finish_reason == "stop"


@pytest.mark.parametrize(("max_tokens", "num_output"), [(None, 10), (10, 10), (3, 3)])
def test_length_is_max_tokens_or_the_context(max_tokens: int | None, num_output: int) -> None:
    scheduler = build(max_model_len=30)
    add(scheduler, 0, 20, max_tokens=max_tokens)
    tokens = []
    while scheduler.has_work:
        tokens += answer(scheduler, scheduler.schedule())
    assert [entry.finish_reason for entry in tokens] == [None] * (num_output - 1) + ["length"]


def test_a_resumed_sequence_goes_on_behind_its_output() -> None:
    scheduler = build()
    sequence = add(scheduler, 0, 20, output=(7, 8, 9), max_tokens=4)
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.starts[0].token_ids[20:], plan.starts[0].num_prompt_tokens, summary(plan)) == (
        (7, 8, 9),
        20,
        [(0, 0, 23, True)],
    )
    assert sequence.num_output_tokens == 3
    [update] = answer(scheduler, plan)
    assert update.finish_reason == "length"


@pytest.mark.parametrize(
    ("output", "sampling", "reason", "stop"),
    [
        ((7, STOP), {}, "stop", STOP),
        ((7, 7), {"max_tokens": 2}, "length", None),
        ((7,) * 180, {}, "length", None),
    ],
)
def test_a_sequence_resumed_when_complete_ends_at_once(
    output: tuple[int, ...], sampling: dict[str, object], reason: str, stop: int | None
) -> None:
    scheduler = build()
    checked = request(20, output=output, **sampling)
    scheduler.check(checked)
    assert scheduler.add(Sequence(0, checked, (STOP,))) == SequenceUpdate(
        0, finish_reason=reason, stop_token_id=stop
    )
    assert not scheduler.has_work
    scheduler.check_integrity()


def test_logprobs_go_to_their_sequence() -> None:
    scheduler = build()
    add(scheduler, 0, 3)
    add(scheduler, 1, 3)
    plan = scheduler.schedule()
    assert plan is not None
    entry = TokenLogprobs(-0.5, ((5, -0.5),))
    updates = scheduler.update(StepResult(plan.step, (0, 1), (5, 6), {1: (entry,)}))
    assert [(update.token_ids, update.logprobs) for update in updates] == [((5,), ()), ((6,), (entry,))]


def test_abort_waiting_running_and_in_flight() -> None:
    scheduler = build(seqs=2)
    for seq_id in range(3):
        add(scheduler, seq_id, 20)
    assert scheduler.abort(7, "nobody") is None
    plan = scheduler.schedule()
    assert scheduler.abort(2, "left") == SequenceUpdate(2, finish_reason="abort", error="left")
    assert scheduler.abort(0, "left") == SequenceUpdate(0, finish_reason="abort", error="left")
    scheduler.check_integrity()
    assert [update.seq_id for update in answer(scheduler, plan)] == [1]
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.drops, plan.seq_ids) == ((0,), (1,))  # the ranks never heard of 2


def test_a_second_plan_may_leave_before_the_first_result() -> None:
    scheduler = build(budget=10)
    add(scheduler, 0, 15)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert summary(first) == [(0, 0, 10, False)]
    assert summary(second) == [(0, 10, 5, True)]
    assert answer(scheduler, first) == []
    third = scheduler.schedule()
    assert summary(third) == [(0, 15, 1, True)]  # its token is in flight; the ranks have it
    assert [update.token_ids for update in answer(scheduler, second)] == [(7,)]
    assert summary(scheduler.schedule()) == [(0, 16, 1, True)]
    assert [update.token_ids for update in answer(scheduler, third)] == [(7,)]


def test_a_stop_token_wastes_one_entry_and_no_block() -> None:
    scheduler = build(num_full=14)
    add(scheduler, 0, 20)
    first = scheduler.schedule()
    wasted = scheduler.schedule()
    assert summary(wasted) == [(0, 20, 1, True)]
    assert [(update.token_ids, update.finish_reason) for update in answer(scheduler, first, STOP)] == [
        ((STOP,), "stop")
    ]
    assert not scheduler.has_work
    assert scheduler._kv.usage == 0
    add(scheduler, 1, 150)  # needs the freed blocks
    following = scheduler.schedule()
    assert following is not None
    assert (following.drops, following.seq_ids) == ((0,), (1,))
    assert answer(scheduler, wasted, 9) == []
    assert [update.seq_id for update in answer(scheduler, following)] == []
    scheduler.check_integrity()


def test_an_end_by_length_wastes_nothing() -> None:
    scheduler = build()
    add(scheduler, 0, 5, max_tokens=2)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert summary(second) == [(0, 5, 1, True)]
    answer(scheduler, first)
    assert scheduler.schedule() is None  # the token in flight is the last one
    assert [update.finish_reason for update in answer(scheduler, second)] == ["length"]


def test_a_sequence_that_loses_its_blocks_with_a_token_in_flight_computes_it_again() -> None:
    scheduler = build(num_full=7, budget=100, max_model_len=90)
    add(scheduler, 0, 47)
    add(scheduler, 1, 47)
    first = scheduler.schedule()
    assert summary(first) == [(0, 0, 47, True), (1, 0, 47, True)]
    second = scheduler.schedule()
    assert summary(second) == [(0, 47, 1, True), (1, 47, 1, True)]
    answer(scheduler, first)
    third = (
        scheduler.schedule()
    )  # 0 needs a fourth block, and takes it from 1, whose second token is in flight
    assert summary(third) == [(0, 48, 1, True)]
    assert [(update.seq_id, update.token_ids) for update in answer(scheduler, second)] == [(0, (7,))]
    assert scheduler.num_preemptions == 1
    assert scheduler.num_waiting == 1
    answer(scheduler, third)


def test_a_preempted_prompt_is_scored_again_if_its_scores_are_in_flight() -> None:
    scheduler = build(num_full=8, budget=200, max_model_len=100)
    add(scheduler, 0, 48)
    add(scheduler, 1, 60, prompt_logprobs=2)
    first = scheduler.schedule()
    assert summary(first) == [(0, 0, 48, True), (1, 0, 60, True)]
    assert first is not None
    assert first.prompt_logprobs == ((1, 1, 59, 2),)
    second = scheduler.schedule()  # 0 needs a fourth block, and takes it from 1
    assert summary(second) == [(0, 48, 1, True)]
    scores = {1: (TokenLogprobs(-1.0),) * 59}
    updates = scheduler.update(StepResult(first.step, (0, 1), (7, 7), prompt_logprobs=scores))
    assert [update.seq_id for update in updates] == [0]
    answer(scheduler, second)
    scheduler.abort(0, "enough")
    third = scheduler.schedule()
    assert third is not None
    assert summary(third) == [(1, 0, 60, True)]
    assert third.prompt_logprobs == ((0, 1, 59, 2),)


def test_drafts_share_the_rows_that_are_left_and_end_with_the_sequence() -> None:
    kv = KVCacheManager(num_full_blocks=50, num_sliding_blocks=0, window=None)
    config = SchedulerConfig(max_num_seqs=5, max_num_batched_tokens=100)
    scheduler = Scheduler(config, kv, max_model_len=200, propose=lambda sequence, num_pending: (8,) * 4)
    add(scheduler, 0, 5, max_tokens=4)
    add(scheduler, 1, 5)
    answer(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.drafts == ((0, (8, 8)), (1, (8,))), "three rows are left, and two tokens before the last"
    scheduler.abort(1, "enough")
    scheduler.update(StepResult(plan.step, (0, 1), (7, 7), num_tokens=(1, 1)))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.drafts == ((0, (8,)),), "one token before the last"
    (update,) = scheduler.update(StepResult(plan.step, (0,), (8, STOP), num_tokens=(2,)))
    assert (update.token_ids, update.finish_reason, update.stop_token_id) == ((8, STOP), "stop", STOP)


@pytest.mark.parametrize(
    "result",
    [
        StepResult(1, (0,), (7,)),
        StepResult(0, (), ()),
        StepResult(0, (1,), (7,)),
        StepResult(0, (0,), ()),
        StepResult(0, (0,), (7, 8), num_tokens=(2,)),
        StepResult(0, (0,), (7,), num_tokens=(1, 0)),
        StepResult(0, (0,), (7, 8), num_tokens=(1,)),
        StepResult(0, (0,), (), num_tokens=(0,)),
        StepResult(0, (0,), (7,), error="the rank failed"),
    ],
)
def test_a_result_that_does_not_answer_the_plan_is_refused(result: StepResult) -> None:
    scheduler = build()
    add(scheduler, 0, 3)
    scheduler.schedule()
    with pytest.raises(ValueError, match="step"):
        scheduler.update(result)


@pytest.mark.parametrize(
    ("bad", "error", "param", "words"),
    [
        (request(200), ContextLengthExceeded, "prompt_token_ids", "200 tokens"),
        (request(150, max_tokens=51), ContextLengthExceeded, "max_tokens", "at most 50"),
        (request(3, max_tokens=5, min_tokens=6), InvalidRequest, "min_tokens", "from 0 to the 5"),
        (request(3, max_tokens=2, output=(1, 2, 3)), InvalidRequest, "output_token_ids", "3 tokens"),
        (request(190, output=(1,) * 11), InvalidRequest, "output_token_ids", "at most 10"),
    ],
)
def test_requests_that_could_never_run_are_refused(
    bad: EngineRequest, error: type, param: str, words: str
) -> None:
    with pytest.raises(error, match=words) as raised:
        build(max_model_len=200).check(bad)
    assert type(raised.value) is error
    assert raised.value.param == param


def test_requests_on_the_limits_are_taken() -> None:
    scheduler = build(max_model_len=200)
    for good in (
        request(199),
        request(150, max_tokens=50, min_tokens=50),
        request(190, output=(1,) * 10),
        request(1, max_tokens=1),
    ):
        scheduler.check(good)


def test_a_cache_too_small_for_one_sequence_is_a_config_error() -> None:
    build(num_full=5, max_model_len=64)
    with pytest.raises(ConfigError, match="max_model_len 65"):
        build(num_full=5, max_model_len=65)
    with pytest.raises(ConfigError, match="max_model_len 64"):
        build(num_full=5, num_sliding=3, window=33, max_model_len=64)


def print_plans_of_a_fixed_run() -> None:
    """Run by the next test in processes of their own: a busy run, with preemption and hits, as the
    bytes of its plans."""
    scheduler = build(num_full=14, num_sliding=14, window=20, seqs=4, budget=40, max_model_len=150)
    rank = SimulatedRank(14, 14, 20, lambda tokens: sum(tokens) % 50 + 3)
    for seq_id in range(20):
        checked = request(
            20 + seq_id * 5 % 33, first=seq_id % 3, max_tokens=30, stop_token_ids=(*range(3, 6), 40, 17)
        )
        scheduler.add(Sequence(seq_id, checked, (STOP,)))
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan is not None
        print(encode_plan(plan).hex())
        scheduler.update(rank.run(plan))
    assert scheduler.num_preemptions > 0


def test_plans_do_not_depend_on_the_process() -> None:
    code = "from tests.workers.scheduler.test_scheduler import print_plans_of_a_fixed_run as run; run()"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0].count("\n") > 50
    assert outputs[0] == outputs[1]
