"""The runner against plain Python: the batch it builds from plans, and what reaches the sampler
from each sequence."""

import gc
import random
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.automaton import reference as automaton_reference
from kernels.sampling import SamplingBatch
from kernels.sampling import reference as sampling_reference
from tests.support import decode_plans
from tests.support.host_automaton import ConstraintState, allowed_in
from tests.support.model_steps import PagedSequences
from tests.support.thread_ranks import on_ranks
from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.config import BLOCK_SIZE, ParallelConfig
from workers.constraint.automaton import AutomatonState, TokenAutomaton
from workers.constraint.codec import Constraint
from workers.constraint.state import AutomatonTables
from workers.model.checkpoint import load_model
from workers.model.gpt_oss import GptOss
from workers.parallel.collectives import Alone, Collectives
from workers.parallel.shard import plan_shards
from workers.rank.drafts import DraftRows
from workers.rank.recorded.cuda_graph import DecodeGraphs, GraphReport
from workers.rank.runner import Runner
from workers.rank.sampling_state import SamplingState, SeenTokens
from workers.rank.slots import DeviceSlots, SequenceSlots
from workers.rank.step_arrays import upload_step
from workers.rank.step_inputs import InputBuffers
from workers.request import SamplingParams
from workers.scheduler.plan import SequenceStart, StepPlan, StepResult
from workers.scheduler.plan_wire import decode_plan, encode_plan

CPU = torch.device("cpu")
VOCAB = 40


def start(
    seq_id: int, tokens: tuple[int, ...], num_prompt: int | None = None, **rest: object
) -> SequenceStart:
    sampling = rest.pop("sampling", SamplingParams(seed=0))
    if "constraint" in rest:
        rest["constraint"] = Constraint.of(rest["constraint"]).id
    return SequenceStart(seq_id, tokens, len(tokens) if num_prompt is None else num_prompt, sampling, **rest)


def test_batches_equal_a_plain_simulation() -> None:
    """Random plans over sequences that come, go and are scheduled in any order; every tensor is
    computed again token by token."""
    draw = random.Random(3)
    slots = SequenceSlots(max_num_seqs=6, max_model_len=200)
    device, inputs = DeviceSlots(slots, CPU), InputBuffers(CPU)
    tokens: dict[int, list[int]] = {}
    tables: dict[int, tuple[list[int], list[int]]] = {}
    computed: dict[int, int] = {}
    num_prompt: dict[int, int] = {}
    next_block, next_id = 1, 0
    for step in range(150):
        for seq_id in [seq_id for seq_id in tokens if draw.random() < 0.05 or len(tokens[seq_id]) > 180]:
            slots.drop(seq_id)
            del tokens[seq_id], tables[seq_id], computed[seq_id]
        while len(tokens) < 6 and draw.random() < 0.7:
            cached = draw.choice([0, 0, 16, 48])
            tokens[next_id] = [draw.randrange(1000) for _ in range(cached + draw.randrange(1, 60))]
            tables[next_id] = ([*range(next_block, next_block + cached // 16)], [0] * (cached // 16))
            next_block += cached // 16
            num_prompt[next_id] = len(tokens[next_id])
            computed[next_id] = cached
            slots.start(
                start(
                    next_id,
                    tuple(tokens[next_id]),
                    full_blocks=tuple(tables[next_id][0]),
                    sliding_blocks=tuple(tables[next_id][1]),
                )
            )
            next_id += 1
        if not tokens:
            continue
        seq_ids = draw.sample(list(tokens), draw.randrange(1, len(tokens) + 1))
        counts = [draw.randrange(1, len(tokens[seq_id]) - computed[seq_id] + 1) for seq_id in seq_ids]
        new_blocks = []
        for index, (seq_id, count) in enumerate(zip(seq_ids, counts, strict=True)):
            missing = -(-(computed[seq_id] + count) // BLOCK_SIZE) - len(tables[seq_id][0])
            if missing > 0:
                full, sliding = (
                    tuple(range(next_block, next_block + missing)),
                    tuple(range(next_block + 500, next_block + 500 + missing)),
                )
                next_block += missing
                tables[seq_id][0].extend(full)
                tables[seq_id][1].extend(sliding)
                new_blocks.append((index, full, sliding))
        samples = tuple(
            computed[seq_id] + count == len(tokens[seq_id])
            for seq_id, count in zip(seq_ids, counts, strict=True)
        )
        plan = StepPlan(
            step, seq_ids=tuple(seq_ids), num_computed_tokens=tuple(computed[seq_id] for seq_id in seq_ids),
            num_scheduled_tokens=tuple(counts), samples=samples, new_blocks=tuple(new_blocks),
        )  # fmt: skip
        rows = slots.build(plan)
        arrays, edges = upload_step(inputs, rows.model, rows.edges)
        device.set_blocks(edges)
        batch = device.batch(arrays, edges.sample_indices, rows.num_blocks, rows.max_query_len)
        where = [
            (seq_id, position)
            for seq_id, count in zip(seq_ids, counts, strict=True)
            for position in range(computed[seq_id], computed[seq_id] + count)
        ]
        assert batch.token_ids.tolist() == [tokens[seq_id][position] for seq_id, position in where]
        assert batch.positions.tolist() == [position for _, position in where]
        for group, mapping, table in (
            (0, batch.slot_mapping_full, batch.block_table_full),
            (1, batch.slot_mapping_sliding, batch.block_table_sliding),
        ):
            assert mapping.tolist() == [
                tables[seq_id][group][position // 16] * 16 + position % 16 for seq_id, position in where
            ]
            for row, (seq_id, count) in enumerate(zip(seq_ids, counts, strict=True)):
                used = -(-(computed[seq_id] + count) // 16)
                assert table[row, :used].tolist() == tables[seq_id][group][:used]
        assert batch.context_lens.tolist() == [
            computed[seq_id] + count for seq_id, count in zip(seq_ids, counts, strict=True)
        ]
        ends = np.cumsum(counts).tolist()
        assert batch.cu_seqlens_q.tolist() == [0, *ends]
        assert batch.sample_indices.tolist() == [
            end - 1 for end, yields in zip(ends, samples, strict=True) if yields
        ]
        assert {
            batch.token_ids.dtype,
            batch.positions.dtype,
            batch.slot_mapping_full.dtype,
            batch.sample_indices.dtype,
        } == {torch.int64}
        assert {batch.block_table_full.dtype, batch.context_lens.dtype, batch.cu_seqlens_q.dtype} == {
            torch.int32
        }
        sampled = [seq_ids[index] for index in rows.sampled.tolist()]
        new = [draw.randrange(1000) for _ in sampled]
        assert rows.output_positions.tolist() == [
            len(tokens[seq_id]) - num_prompt[seq_id] for seq_id in sampled
        ]
        device.newest.index_copy_(0, edges.sampled_slots, torch.tensor(new, dtype=torch.int64))
        for seq_id, count in zip(seq_ids, counts, strict=True):
            computed[seq_id] += count
        for seq_id, token in zip(sampled, new, strict=True):
            tokens[seq_id].append(token)


def build(state: SamplingState, slots: list[int], positions: list[int]) -> SamplingBatch:
    return state.build(np.array(slots), np.array(positions), InputBuffers(CPU))


def allowed_tokens(state: SamplingState, slot: int, position: int, then: int | None = None) -> set[int]:
    """Return all tokens that can be sampled.

    Args:
        then: the token that is sampled, if any more are.
    """
    batch = build(state, [slot], [position])
    logits = sampling_reference.modify(torch.zeros(1, VOCAB), batch)
    if then is not None:
        if batch.automaton is not None:
            automaton_reference.advance(batch.automaton, torch.tensor([then]))
        for _, listener in state.listeners(np.array([slot])):
            listener.push(then)
    return set(logits.isfinite()[0].nonzero()[:, 0].tolist())


def sampling_state(num_slots: int, *automata: TokenAutomaton) -> SamplingState:
    state = SamplingState(num_slots, CPU)
    constraints = [Constraint.of(automaton) for automaton in automata]
    state.update_automata([(constraint.id, constraint.body) for constraint in constraints], [])
    return state


def test_parameters_that_nobody_uses_cost_nothing() -> None:
    state = SamplingState(4, CPU)
    state.start(0, start(0, (1,), sampling=SamplingParams(temperature=0, seed=1)))
    state.start(1, start(1, (1,), sampling=SamplingParams(temperature=0, seed=1)))
    assert build(state, [0, 1], [0, 0]) == SamplingBatch(overwrite_logits=True)
    state.start(2, start(2, (1,), sampling=SamplingParams(temperature=0.5, seed=2**64 - 1, top_k=-1)))
    batch = build(state, [0, 2], [0, 7])
    assert batch.temperature is not None
    assert batch.seeds is not None
    assert batch.output_positions is not None
    assert batch.temperature.tolist() == [0.0, 0.5]
    assert batch.seeds.tolist() == [1, -1]
    assert batch.output_positions.tolist() == [0, 7]
    assert (batch.top_k, batch.top_p, batch.min_p, batch.penalties, batch.logit_bias) == (None,) * 5


def test_a_seed_keeps_its_64_bits() -> None:
    state = SamplingState(4, CPU)
    for slot, seed in enumerate((0, 2**63 - 1, 2**63, 2**64 - 1)):
        state.start(slot, start(slot, (1,), sampling=SamplingParams(seed=seed)))
    seeds = build(state, [0, 1, 2, 3], [0] * 4).seeds
    assert seeds is not None
    assert seeds.tolist() == [0, 2**63 - 1, -(2**63), -1]


def test_a_slot_forgets_its_last_tenant() -> None:
    only_one = TokenAutomaton((AutomatonState((1,)),))
    state = sampling_state(1, only_one)
    everything = SamplingParams(
        temperature=1, seed=5, top_k=3, top_p=0.5, min_p=0.1, presence_penalty=1, frequency_penalty=1,
        repetition_penalty=2,
        logit_bias=((1, 2.0),), logprobs=3, min_tokens=2, max_tokens=9,
    )  # fmt: skip
    state.start(
        0,
        start(
            0,
            (1,),
            sampling=everything,
            stop_token_ids=(3,),
            constraint=only_one,
        ),
    )
    batch = build(state, [0], [0])
    assert batch.penalties is not None
    assert batch.automaton is not None
    state.drop(0)
    state.start(0, start(1, (1,), sampling=SamplingParams(temperature=0, seed=1)))
    assert build(state, [0], [0]) == SamplingBatch(overwrite_logits=True)
    assert state.logprob_rows(np.array([0])) == []
    assert state.listeners(np.array([0])) == []


AUTOMATON = TokenAutomaton(
    (
        AutomatonState(allowed=(1, 2, 3), transitions=((2, 1), (3, 2))),
        AutomatonState(forbidden=tuple(range(10, VOCAB)), transitions=((5, 0), (5, 2))),
        AutomatonState(allowed=(7,)),
    ),
)


def test_the_automaton_decides_what_may_come() -> None:
    state = sampling_state(1, AUTOMATON)
    state.start(0, start(0, (4, 5), sampling=SamplingParams(seed=0), constraint=AUTOMATON))
    assert state.listeners(np.array([0])) == [], "the device follows it"
    assert allowed_tokens(state, 0, 0, then=1) == {1, 2, 3}
    assert allowed_tokens(state, 0, 1, then=2) == {1, 2, 3}, "a token without a transition stays"
    assert allowed_tokens(state, 0, 2, then=5) == set(range(10))
    assert allowed_tokens(state, 0, 3, then=3) == {1, 2, 3}, "the first of equal transitions counts"
    assert allowed_tokens(state, 0, 4) == {7}


def test_the_automaton_replays_output_but_not_the_prompt() -> None:
    for output, expected in (
        ((), {1, 2, 3}),
        ((1,), {1, 2, 3}),
        ((1, 2), set(range(10))),
        ((2, 5), {1, 2, 3}),
        ((2, 5, 3), {7}),
        ((2, 9, 9), set(range(10))),
    ):
        state = sampling_state(2, AUTOMATON)
        state.start(0, start(0, (3, 3), sampling=SamplingParams(seed=0), constraint=AUTOMATON))
        for position, token in enumerate(output):
            allowed_tokens(state, 0, position, then=token)
        state.start(
            1, start(1, (3, 3, *output), num_prompt=2, sampling=SamplingParams(seed=0), constraint=AUTOMATON)
        )
        position = len(output)
        assert allowed_tokens(state, 0, position) == allowed_tokens(state, 1, position) == expected


def test_an_automaton_is_forgotten_and_its_tables_with_it() -> None:
    state = sampling_state(1, AUTOMATON)
    state.update_automata([], [Constraint.of(AUTOMATON).id])
    with pytest.raises(KeyError):
        state.start(0, start(0, (4, 5), constraint=AUTOMATON))


def test_stop_tokens_wait_for_min_tokens() -> None:
    state = SamplingState(1, CPU)
    sampling = SamplingParams(seed=0, min_tokens=3, max_tokens=9)
    state.start(0, start(0, (1,), sampling=sampling, stop_token_ids=(0, 39)))
    everything = set(range(VOCAB))
    assert [allowed_tokens(state, 0, position) for position in (0, 2)] == [everything - {0, 39}] * 2
    assert allowed_tokens(state, 0, 3) == everything


def test_a_constraint_is_stronger_than_min_tokens() -> None:
    only_stop = TokenAutomaton((AutomatonState(allowed=(5,)),))
    all_but_stop_forbidden = TokenAutomaton(
        (AutomatonState(forbidden=tuple(range(5)) + tuple(range(6, VOCAB))),)
    )
    state = sampling_state(2, only_stop, all_but_stop_forbidden)
    sampling = SamplingParams(seed=0, min_tokens=3, max_tokens=9)
    state.start(0, start(0, (1,), sampling=sampling, stop_token_ids=(5,), constraint=only_stop))
    assert allowed_tokens(state, 0, 0) == {5}
    state.start(1, start(1, (1,), sampling=sampling, stop_token_ids=(5,), constraint=all_but_stop_forbidden))
    assert allowed_tokens(state, 1, 0) == {5}


def test_only_allowed_tokens_come() -> None:
    state = sampling_state(3, AUTOMATON)
    sampling = SamplingParams(seed=0, allowed_token_ids=(2, 3, 11))
    state.start(0, start(0, (1,), sampling=sampling))
    assert allowed_tokens(state, 0, 0) == {2, 3, 11}
    assert state.listeners(np.array([0])) == [], "it depends on no token"
    state.start(1, start(1, (1,), sampling=sampling, constraint=AUTOMATON))
    assert allowed_tokens(state, 1, 0, then=2) == {2, 3}
    assert allowed_tokens(state, 1, 1, then=5) == {2, 3}, "11 is forbidden in this state"
    assert allowed_tokens(state, 1, 2, then=3) == {2, 3}
    assert allowed_tokens(state, 1, 3) == {7}, "a constraint is stronger"
    state.start(
        2, start(2, (1,), sampling=SamplingParams(seed=0, allowed_token_ids=(20,)), constraint=AUTOMATON)
    )
    assert allowed_tokens(state, 2, 0, then=2) == {1, 2, 3}, "a constraint is stronger"
    assert allowed_tokens(state, 2, 1) == set(range(10)), "a constraint is stronger"


def test_bad_words_are_never_completed() -> None:
    everything = set(range(VOCAB))
    words = ((3,), (4, 5), (6, 7, 8), (7, 9), (4, 4, 5))
    state = SamplingState(3, CPU)
    state.start(0, start(0, (4,), sampling=SamplingParams(seed=0, bad_words_token_ids=words)))
    tokens = (4, 4, 6, 7, 7, 6, 1, 1)
    forbidden = (set(), {5}, {5}, set(), {8, 9}, {9}, set(), set())
    for position, (token, ends) in enumerate(zip(tokens, forbidden, strict=True)):
        assert allowed_tokens(state, 0, position, then=token) == everything - {3} - ends, position
    output = (1, 6, 7)
    state.start(
        1, start(1, (2, *output), num_prompt=1, sampling=SamplingParams(seed=0, bad_words_token_ids=words))
    )
    assert allowed_tokens(state, 1, 3) == everything - {3, 8, 9}, "the output of another replica counts"
    drafts = DraftRows(np.array([4, 7, -1]), np.zeros(3, dtype=np.int64), {1: (4,), 2: (6, 7)})
    state.start(2, start(2, (2,), sampling=SamplingParams(seed=0, bad_words_token_ids=words)))
    batch = state.build(np.array([2, 2, 2]), np.array([0, 1, 2]), InputBuffers(CPU), drafts)
    assert batch.forbidden_ids is not None
    found = list(zip(batch.forbidden_ids.rows.tolist(), batch.forbidden_ids.token_ids.tolist(), strict=True))
    assert sorted(found) == [(0, 3), (1, 3), (1, 5), (2, 3), (2, 8), (2, 9)]


def test_bad_words_of_one_token_depend_on_no_other() -> None:
    state = SamplingState(2, CPU)
    state.start(0, start(0, (1,), sampling=SamplingParams(seed=0, bad_words_token_ids=((3,), (9,)))))
    assert state.listeners(np.array([0])) == []
    assert allowed_tokens(state, 0, 0) == set(range(VOCAB)) - {3, 9}
    only = SamplingParams(seed=0, bad_words_token_ids=((3,),), allowed_token_ids=(3,))
    state.start(1, start(1, (1,), sampling=only))
    assert allowed_tokens(state, 1, 0) == {3}, "no other token is left"


def test_seen_tokens_are_counted() -> None:
    draw = random.Random(1)
    prompt, output = (
        tuple(draw.randrange(500) for _ in range(700)),
        tuple(draw.randrange(500) for _ in range(300)),
    )
    seen = SeenTokens(prompt, output[:100])
    for token in output[100:]:
        seen.push(token)
    assert dict(zip(seen.token_ids.tolist(), seen.output_counts.tolist(), strict=True)) == {
        token: output.count(token) for token in {*prompt, *output}
    }


def test_only_repetition_looks_at_the_prompt() -> None:
    state = SamplingState(2, CPU)
    state.start(
        0, start(0, (1, 2, 2, 3), num_prompt=3, sampling=SamplingParams(seed=0, presence_penalty=0.5))
    )
    state.start(
        1, start(1, (1, 2, 2, 3), num_prompt=3, sampling=SamplingParams(seed=0, repetition_penalty=1.5))
    )
    penalties = build(state, [1, 0], [1, 1]).penalties
    assert penalties is not None
    pairs = list(
        zip(
            penalties.rows.tolist(),
            penalties.token_ids.tolist(),
            penalties.output_counts.tolist(),
            strict=True,
        )
    )
    assert sorted(pairs) == [(0, 1, 0), (0, 2, 0), (0, 3, 1), (1, 3, 1)]
    assert penalties.presence.tolist() == [0.0, 0.5]
    assert penalties.repetition.tolist() == [1.5, 1.0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GptOss:
    path: Path = write_tiny_checkpoint(tmp_path_factory.mktemp("models"))
    return load_model(path, TINY, dtype=torch.float32, device=CPU)


@pytest.fixture
def runner(model: GptOss) -> Runner:
    caches = [torch.zeros(2, 8, BLOCK_SIZE, TINY.num_kv_heads, TINY.head_dim) for _ in TINY.layer_windows]
    return Runner(model, caches, max_num_seqs=2, max_model_len=64)


def plan_of(
    step: int,
    *starts: SequenceStart,
    seq_ids: tuple[int, ...],
    computed: tuple[int, ...],
    scheduled: tuple[int, ...],
    samples: bool,
) -> StepPlan:
    blocks = tuple((index, (2 * index + 1,), (2 * index + 1,)) for index in range(len(starts)))
    return StepPlan(step, starts, (), seq_ids, computed, scheduled, (samples,) * len(seq_ids), blocks)


def test_no_kernel_is_selected_in_a_step(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*facts: object, **others: object) -> None:
        raise AssertionError("kernels are selected when the model is loaded")

    for name, module in list(sys.modules.items()):
        for function in ("triton_runs_on", "by_device"):
            if name.startswith(("kernels.", "workers.")) and hasattr(module, function):
                monkeypatch.setattr(module, function, asked)
    plan = plan_of(0, start(0, (1, 2, 3)), seq_ids=(0,), computed=(0,), scheduled=(3,), samples=True)
    result = runner.step(replace(plan, prompt_logprobs=((0, 1, 2, 3),)))
    assert len(result.token_ids) == 1
    assert len(result.prompt_logprobs[0]) == 2


def test_a_missing_step_is_refused(runner: Runner) -> None:
    runner.step(plan_of(0, start(0, (1, 2)), seq_ids=(0,), computed=(0,), scheduled=(2,), samples=True))
    with pytest.raises(ValueError, match="step 2 came, but step 1 is due"):
        runner.step(plan_of(2, seq_ids=(0,), computed=(2,), scheduled=(1,), samples=True))


@pytest.mark.parametrize(
    "record", [Runner.record_programs, lambda runner: runner.capture_graphs(lambda phase, done, total: None)]
)
def test_recorded_steps_end_with_their_runner(
    model: GptOss, monkeypatch: pytest.MonkeyPatch, record: Callable[[Runner], object]
) -> None:
    """They end at once, not when cycles are collected: leaving a group of NCCL waits for graphs
    that hold its calls."""
    monkeypatch.setattr(DecodeGraphs, "capture", lambda self, progress: GraphReport((), ()))
    runner = Runner(model, PagedSequences(model, 8).kv_caches, max_num_seqs=2, max_model_len=64)
    record(runner)
    recorded = weakref.ref(runner._graphs)
    gc.disable()
    try:
        del runner
        assert recorded() is None
    finally:
        gc.enable()


def test_a_step_that_samples_nothing_returns_nothing(runner: Runner) -> None:
    result = runner.step(
        plan_of(0, start(0, (1, 2, 3)), seq_ids=(0,), computed=(0,), scheduled=(2,), samples=False)
    )
    assert (result.step, result.seq_ids, result.token_ids, result.error) == (0, (), (), None)


@pytest.mark.parametrize(
    ("change", "waits"),
    [
        ({}, False),
        ({"constraint": AUTOMATON}, False),
        ({"sampling": SamplingParams(seed=0, presence_penalty=1)}, True),
    ],
    ids=["plain", "constrained", "penalised"],
)
def test_a_step_waits_for_the_one_before_only_if_the_host_needs_its_tokens(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], waits: bool
) -> None:
    """An executor like that on a GPU: launched steps are not waited for."""

    class InFlight:
        num_waits = 0

        def result(self) -> None:
            InFlight.num_waits += 1

    monkeypatch.setattr(runner, "_pending", lambda *args: runner._unheard.append(InFlight()))
    plan = plan_of(0, start(0, (1, 2), **change), seq_ids=(0,), computed=(0,), scheduled=(2,), samples=True)
    constraint = Constraint.of(AUTOMATON)
    runner.launch(replace(plan, automata=((constraint.id, constraint.body),)))
    found = [int(runner._device_slots.newest[0])]
    for step in range(1, 5):
        runner.launch(plan_of(step, seq_ids=(0,), computed=(1 + step,), scheduled=(1,), samples=True))
        found.append(int(runner._device_slots.newest[0]))
    assert InFlight.num_waits == (4 if waits else 0)
    if "constraint" in change:
        state = ConstraintState(AutomatonTables(constraint.body), ())
        for token in found:
            assert token in allowed_in(state.tables, state.place.state, TINY.vocab_size)
            state.push(token)


def test_each_sequence_gets_the_logprobs_it_asked_for(runner: Runner) -> None:
    greedy = SamplingParams(temperature=0, seed=0, logprobs=3)
    plain = SamplingParams(temperature=0, seed=0)
    plan = plan_of(
        0,
        start(0, (1, 2), sampling=plain),
        start(1, (1, 2), sampling=greedy),
        seq_ids=(0, 1),
        computed=(0, 0),
        scheduled=(2, 2),
        samples=True,
    )
    result = runner.step(decode_plan(encode_plan(plan)))
    assert result.seq_ids == (0, 1)
    assert set(result.logprobs) == {1}
    (entry,) = result.logprobs[1]
    assert len(entry.top) == 3
    assert entry.top[0] == (result.token_ids[1], entry.logprob)
    assert result.elapsed_s > 0


def test_a_finished_sequence_may_be_planned_once_more(model: GptOss) -> None:
    """The plan after a sequence's last token may be on its way already: it computes one position
    past the end, which does no harm."""
    caches = [torch.zeros(2, 8, BLOCK_SIZE, TINY.num_kv_heads, TINY.head_dim) for _ in TINY.layer_windows]
    runner = Runner(model, caches, max_num_seqs=1, max_model_len=16)
    prompt = tuple(range(1, 16))
    first = runner.step(
        plan_of(0, start(0, prompt), seq_ids=(0,), computed=(0,), scheduled=(15,), samples=True)
    )
    second = runner.step(plan_of(1, seq_ids=(0,), computed=(15,), scheduled=(1,), samples=True))
    wasted = StepPlan(2, (), (), (0,), (16,), (1,), (True,), ((0, (2,), (2,)),))
    assert len(runner.step(wasted).token_ids) == 1
    plan = StepPlan(3, (start(1, prompt),), (0,), (1,), (0,), (15,), (True,), ((0, (3,), (3,)),))
    assert runner.step(plan).token_ids == first.token_ids, "the next tenant of the slot starts afresh"
    assert (
        runner.step(plan_of(4, seq_ids=(1,), computed=(15,), scheduled=(1,), samples=True)).token_ids
        == second.token_ids
    )


def test_a_plan_that_samples_where_a_token_is_missing_is_refused(runner: Runner) -> None:
    runner.step(plan_of(0, start(0, (1, 2)), seq_ids=(0,), computed=(0,), scheduled=(2,), samples=True))
    with pytest.raises(AssertionError, match="tokens are missing"):
        runner.launch(plan_of(1, seq_ids=(0,), computed=(3,), scheduled=(1,), samples=True))


def test_other_ranks_take_the_tokens_of_rank_0(tmp_path: Path) -> None:
    """Penalties and temperature on rank 0 only: the others never sample, and compute the same next
    step."""
    path = write_tiny_checkpoint(tmp_path)
    shards = plan_shards(TINY, ParallelConfig(tensor=3))
    sampling = SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.5, logprobs=2)
    starts = (start(0, (1, 2, 3), sampling=sampling), start(1, (4, 5)))
    plans = [
        plan_of(0, *starts, seq_ids=(0, 1), computed=(0, 0), scheduled=(3, 2), samples=True),
        plan_of(1, seq_ids=(1, 0), computed=(2, 3), scheduled=(1, 1), samples=True),
        plan_of(2, seq_ids=(0, 1), computed=(4, 3), scheduled=(1, 1), samples=True),
    ]

    def run(collectives: Collectives) -> list[StepResult]:
        shard = shards[collectives.rank] if collectives.size > 1 else plan_shards(TINY, ParallelConfig())[0]
        model = load_model(path, TINY, dtype=torch.float32, device=CPU, shard=shard, collectives=collectives)
        caches = [
            torch.zeros(2, 8, BLOCK_SIZE, model.num_kv_heads, TINY.head_dim) for _ in TINY.layer_windows
        ]
        runner = Runner(model, caches, max_num_seqs=2, max_model_len=64)
        return [runner.step(plan) for plan in plans]

    first, second, third = on_ranks(3, run)
    alone = run(Alone())
    assert [result.token_ids for result in first] == [result.token_ids for result in alone]
    assert [(result.seq_ids, result.token_ids) for result in second] == [
        (result.seq_ids, result.token_ids) for result in first
    ]
    assert all(set(result.logprobs) == {0} for result in first)
    assert all(result.logprobs == {} for result in (*second, *third))
    assert [result.token_ids for result in third] == [result.token_ids for result in first]


def test_launched_ahead_is_the_same_as_one_by_one_and_as_no_runner_at_all(model: GptOss) -> None:
    def new() -> Runner:
        shape = (2, decode_plans.NUM_BLOCKS, BLOCK_SIZE, TINY.num_kv_heads, TINY.head_dim)
        caches = [torch.zeros(shape) for _ in TINY.layer_windows]
        return Runner(
            model, caches, max_num_seqs=decode_plans.MAX_NUM_SEQS, max_model_len=decode_plans.MAX_MODEL_LEN
        )

    plans = decode_plans.plans(decode_plans.MIXED)
    runner = new()
    one_by_one = [runner.step(plan) for plan in plans]
    assert decode_plans.tokens(decode_plans.ahead(new(), plans)) == decode_plans.tokens(one_by_one)
    outputs: dict[int, list[int]] = {}
    for result in one_by_one:
        for seq_id, token_id in zip(result.seq_ids, result.token_ids, strict=True):
            outputs.setdefault(seq_id, []).append(token_id)
    prompts = {4: tuple(range(1, 9)), 5: (9, 8, 7)}
    expected = PagedSequences(model, 20).generate(prompts, 20)
    assert {seq_id: outputs[seq_id] for seq_id in prompts} == {
        seq_id: expected[seq_id][: len(outputs[seq_id])] for seq_id in prompts
    }
