"""Drafts change how many steps a sequence takes, and nothing else: through scheduler and runner on
real weights, one rank and two, by operations and by recorded programs."""

import queue
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from tests.support.thread_ranks import TIMEOUT_S, on_ranks
from tests.support.tiny_model import TINY
from workers.config import BLOCK_SIZE, ParallelConfig, SchedulerConfig
from workers.constraint.automaton import AutomatonState, TokenAutomaton
from workers.constraint.codec import Constraint
from workers.kv_cache.manager import KVCacheManager
from workers.model.checkpoint import load_model
from workers.model.gpt_oss import GptOss
from workers.model.make_checkpoint import write_checkpoint
from workers.parallel.collectives import Collectives
from workers.parallel.shard import plan_shards
from workers.rank.drafts import NO_DRAFT, DraftRows, kept_rows, newest_slots
from workers.rank.recorded.cpu_program import DecodePrograms, programs_run
from workers.rank.runner import Runner
from workers.request import EngineRequest, SamplingParams, TokenLogprobs
from workers.scheduler.plan import StepPlan
from workers.scheduler.scheduler import Proposer, Scheduler
from workers.scheduler.sequence import Sequence

# Widths that programs can be recorded for, and heads that two ranks can share.
MODEL = replace(TINY, head_dim=32, num_heads=8, num_kv_heads=4)
NUM_TOKENS = 24
NUM_BLOCKS = 120
EVEN = tuple(range(0, 210, 2))
ALTERNATING = TokenAutomaton(
    (
        AutomatonState(forbidden=EVEN, transitions=tuple((token, 1) for token in range(1, 211, 2))),
        AutomatonState(allowed=EVEN, transitions=tuple((token, 0) for token in EVEN)),
    )
)
LONG = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, seed=0, ignore_eos=True)
REQUESTS = [
    EngineRequest("greedy", (1, 2, 3), replace(LONG, logprobs=2)),
    EngineRequest(
        "seeded",
        tuple(range(20)),
        replace(LONG, temperature=1.3, top_p=0.9, seed=2**64 - 5, prompt_logprobs=1),
    ),
    EngineRequest(
        "penalties",
        tuple(range(30, 63)),
        replace(LONG, temperature=0.9, seed=4, repetition_penalty=1.4, frequency_penalty=0.5, logprobs=0),
    ),
    EngineRequest(
        "constrained", (7,), replace(LONG, temperature=1.0, seed=8), constraint=Constraint.of(ALTERNATING)
    ),
    EngineRequest(
        "min_tokens",
        (9, 8),
        replace(LONG, temperature=1.5, seed=9, min_tokens=20, stop_token_ids=tuple(range(100))),
    ),
    EngineRequest(
        "bad words",
        (5, 6),
        replace(
            LONG,
            temperature=1.0,
            seed=10,
            allowed_token_ids=tuple(range(0, 200, 20)),
            bad_words_token_ids=tuple(
                (first, second) for first in range(0, 200, 20) for second in (0, 60, 100)
            ),
        ),
    ),
]


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_token_id: int | None = None


def new_runner(model: GptOss) -> Runner:
    shape = (2, NUM_BLOCKS, BLOCK_SIZE, model.num_kv_heads, MODEL.head_dim)
    caches = [torch.full(shape, float("nan")) for _ in MODEL.layer_windows]
    return Runner(model, caches, max_num_seqs=40, max_model_len=200)


def generate(
    runner: Runner,
    requests: list[EngineRequest],
    propose: Proposer | None = None,
    send: Callable[[StepPlan], object] = lambda plan: None,
) -> tuple[list[Answer], int]:
    """Return (answers, number of steps), with plans run one by one; `send` is called with each plan
    first."""
    kv = KVCacheManager(num_full_blocks=NUM_BLOCKS, num_sliding_blocks=NUM_BLOCKS, window=24)
    scheduler = Scheduler(SchedulerConfig(40, 300), kv, max_model_len=200, propose=propose)
    answers = [Answer() for _ in requests]
    for seq_id, request in enumerate(requests):
        scheduler.add(Sequence(seq_id, request))
    num_steps = 0
    while (plan := scheduler.schedule()) is not None:
        num_steps += 1
        send(plan)
        for update in scheduler.update(runner.step(plan)):
            answer = answers[update.seq_id]
            answer.tokens += update.token_ids
            answer.logprobs += update.logprobs
            answer.prompt_logprobs += update.prompt_logprobs
            if not update.token_ids:
                continue
            answer.finish_reason, answer.stop_token_id = update.finish_reason, update.stop_token_id
        scheduler.check_integrity()
    return answers, num_steps


def proposer(answers: list[Answer], num_right: Callable[[int], int], length: int) -> Proposer:
    """Return a function that guesses `length` tokens of `length` tokens of which the first
    num_right(output position) are right."""

    def propose(sequence: Sequence, num_pending: int) -> Iterable[int]:
        position = sequence.num_output_tokens + num_pending
        known = answers[sequence.seq_id].tokens[position : position + num_right(position)]
        return [*known, *((token * 7 + position) % 200 for token in range(length))][:length]

    return propose


PROPOSERS: dict[str, tuple[Callable[[int], int], int]] = {
    "right": (lambda position: 99, 5),
    "wrong": (lambda position: 0, 5),
    "some right": (lambda position: random.Random(position).randrange(6), 4),
    "one": (lambda position: position % 2, 1),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(path, MODEL, seed=0)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> GptOss:
    return load_model(checkpoint, MODEL, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def plain(model: GptOss) -> tuple[list[Answer], int]:
    answers, num_steps = generate(new_runner(model), REQUESTS)
    assert num_steps == NUM_TOKENS
    assert len({tuple(answer.tokens) for answer in answers}) == len(answers)
    assert [token % 2 for token in answers[3].tokens] == [1, 0] * (NUM_TOKENS // 2)
    return answers, num_steps


@pytest.mark.parametrize("name", PROPOSERS)
@pytest.mark.parametrize("recorded", [False, True], ids=["operations", "program"])
def test_drafts_never_change_the_tokens(
    model: GptOss,
    plain: tuple[list[Answer], int],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    recorded: bool,
) -> None:
    runner = new_runner(model)
    sizes: list[int] = []
    if recorded:
        if not programs_run():
            pytest.skip("this installation has no C++ kernels")
        runner.record_programs()
        replay = DecodePrograms.replay
        monkeypatch.setattr(
            DecodePrograms,
            "replay",
            lambda self, rows, size, buffers: (sizes.append(size), replay(self, rows, size, buffers))[1],
        )
    answers, num_steps = generate(runner, REQUESTS, proposer(plain[0], *PROPOSERS[name]))
    assert answers == plain[0]
    if name == "right":
        assert num_steps <= 1 + -(-NUM_TOKENS // 6), "six tokens a step"
    else:
        assert (num_steps == NUM_TOKENS) == (name == "wrong")
    if recorded and name != "one":
        assert max(sizes) > len(REQUESTS), "drafts did not run as rows of a program"


def test_drafts_never_change_the_tokens_of_two_ranks(
    checkpoint: Path, plain: tuple[list[Answer], int]
) -> None:
    """The second rank never samples: it takes rank 0's tokens, and checks drafts itself."""
    shards = plan_shards(MODEL, ParallelConfig(tensor=2))

    plans: queue.Queue[StepPlan | None] = queue.Queue()
    names = ("right", "some right")

    def run(collectives: Collectives) -> list[list[Answer]]:
        model = load_model(
            checkpoint,
            MODEL,
            dtype=torch.float32,
            device=torch.device("cpu"),
            shard=shards[collectives.rank],
            collectives=collectives,
        )
        answers = []
        for propose in (None, *(proposer(plain[0], *PROPOSERS[name]) for name in names)):
            runner = new_runner(model)
            if collectives.rank == 0:
                answers.append(generate(runner, REQUESTS, propose, plans.put)[0])
                plans.put(None)
            else:
                while (plan := plans.get(timeout=TIMEOUT_S)) is not None:
                    result = runner.step(plan)
                    assert result.logprobs == result.prompt_logprobs == {}
        return answers

    answers, _ = on_ranks(2, run)
    assert answers[0] == answers[1] == answers[2]
    assert [answer.tokens for answer in answers[0]] == [answer.tokens for answer in plain[0]]


def test_a_sequence_ends_inside_of_drafts_that_are_right(
    model: GptOss, plain: tuple[list[Answer], int]
) -> None:
    answers, _ = plain
    for request, answer in zip(REQUESTS, answers, strict=True):
        if request.sampling.min_tokens:
            continue
        propose = proposer([answer], lambda position: 99, 8)
        for length in (1, 2, 5, 9, 10):
            short = replace(request, sampling=replace(request.sampling, max_tokens=length))
            (found,), _ = generate(new_runner(model), [short], propose)
            assert (found.tokens, found.finish_reason) == (answer.tokens[:length], "length")
            assert found.logprobs == answer.logprobs[:length]
        stop = answer.tokens[4]
        first = answer.tokens.index(stop)
        stopped = replace(
            request, sampling=replace(request.sampling, stop_token_ids=(stop,), ignore_eos=False)
        )
        (found,), num_steps = generate(new_runner(model), [stopped], propose)
        assert (found.tokens, found.finish_reason) == (answer.tokens[: first + 1], "stop")
        assert found.stop_token_id == stop
        assert found.logprobs == answer.logprobs[: first + 1]
        assert num_steps <= 2


def test_what_drafts_left_in_the_cache_is_what_others_may_read(
    model: GptOss, plain: tuple[list[Answer], int]
) -> None:
    """A turn after an answer finds blocks that drafts, right and wrong, went through."""
    answers, _ = plain
    request = REQUESTS[0]
    turn = replace(
        request, prompt_token_ids=(*request.prompt_token_ids, *answers[0].tokens, 5, 6), request_id="turn"
    )
    (expected,), _ = generate(new_runner(model), [turn])
    runner = new_runner(model)
    kv = KVCacheManager(num_full_blocks=NUM_BLOCKS, num_sliding_blocks=NUM_BLOCKS, window=24)
    propose = proposer([answers[0], expected], lambda position: position % 4, 4)
    scheduler = Scheduler(SchedulerConfig(40, 300), kv, max_model_len=200, propose=propose)
    found: list[list[int]] = [[], []]
    for seq_id, entry in enumerate((request, turn)):
        sequence = Sequence(seq_id, entry)
        scheduler.add(sequence)
        while (plan := scheduler.schedule()) is not None:
            for update in scheduler.update(runner.step(plan)):
                found[seq_id] += update.token_ids
    assert sequence.num_cached_tokens == 16
    assert found == [answers[0].tokens, expected.tokens]


few_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=5)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=5), st.lists(st.integers(0, 2), max_size=4)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_the_rows_that_are_kept(entries: list[tuple[list[int], list[int]]]) -> None:
    """Against a plain simulation, on the host and on the device alike."""
    sampled, expected, firsts, slots = [], [], [], []
    wanted_newest, wanted_counts, wanted_tokens = {}, [], []
    for slot, (tokens, drafts) in enumerate(entries):
        drafts = drafts[: len(tokens) - 1]
        tokens = tokens[: len(drafts) + 1]
        first = len(sampled)
        sampled += tokens
        expected += [*drafts, NO_DRAFT]
        firsts += [first] * len(tokens)
        slots += [slot] * len(tokens)
        count = 1
        while count <= len(drafts) and tokens[count - 1] == drafts[count - 1]:
            count += 1
        wanted_counts.append(count)
        wanted_tokens += tokens[:count]
        wanted_newest[slot] = tokens[count - 1]
    rows = DraftRows(np.array(expected), np.array(firsts), {})
    kept, counts = kept_rows(sampled, rows)
    assert list(counts) == wanted_counts
    assert [token for token, is_kept in zip(sampled, kept, strict=True) if is_kept] == wanted_tokens
    newest = torch.full((len(entries) + 1,), -5)
    at = newest_slots(*map(torch.tensor, (sampled, expected, firsts, slots)), len(entries))
    newest.index_copy_(0, at, torch.tensor(sampled))
    assert {slot: int(newest[slot]) for slot in wanted_newest} == wanted_newest
