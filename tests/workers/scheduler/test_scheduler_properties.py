"""Any mix of requests, aborts, preemptions and prefix hits, run against a rank that checks every
key it reads."""

import hashlib
import random
from collections import Counter
from contextlib import ExitStack
from unittest import mock

import hypothesis.strategies as st
from hypothesis import event, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.simulated_rank import SimulatedRank
from workers.config import SchedulerConfig
from workers.constraint.codec import Constraint, automaton_id
from workers.constraint.registry import HeldAutomata
from workers.kv_cache.manager import KVCacheManager, num_blocks_for, sliding_blocks_per_sequence
from workers.request import EngineRequest, SamplingParams
from workers.scheduler.plan import StepPlan
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.sequence import Sequence, SequenceUpdate

VOCAB_SIZE = 40
MODEL_STOP_TOKEN = 39


def sample(token_ids):
    """Return a token that depends on every token before it, and is the same in every process."""
    digest = hashlib.sha256(bytes(token_ids)).digest()
    return digest[0] % VOCAB_SIZE


def generate_alone(request, max_model_len):
    """Return the answer to a request, whatever else runs: (output tokens, finish_reason,
    stop_token_id)."""
    sampling = request.sampling
    stops = set() if sampling.ignore_eos else {MODEL_STOP_TOKEN, *sampling.stop_token_ids}
    tokens = list(request.prompt_token_ids)
    output = []
    while True:
        token = sample(tokens)
        tokens.append(token)
        output.append(token)
        if token in stops and len(output) > sampling.min_tokens:
            return output, "stop", token
        if len(output) == sampling.max_tokens or len(tokens) == max_model_len:
            return output, "length", None


def weak_hash(parent, packed_tokens):
    """Return two bits: prompts collide all the time, also after the same parent."""
    return bytes([hashlib.sha256(parent + packed_tokens).digest()[0] % 4])


def family_prompt(family, length):
    return [(family * 3 + i * i) % VOCAB_SIZE for i in range(length)]


prompts = st.builds(
    lambda family, length, tail: family_prompt(family, length) + tail,
    st.integers(0, 2),
    st.one_of(st.integers(0, 90), st.sampled_from([15, 16, 17, 31, 32, 33, 48, 64])),
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=4),
)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        has_full=st.booleans(),
        window=st.sampled_from([None, 1, 2, 15, 16, 17, 18, 33, 50]),
        spare_blocks=st.tuples(st.integers(0, 12), st.integers(0, 12)),
        max_model_len=st.integers(20, 130),
        max_num_seqs=st.integers(1, 5) | st.just(30),
        max_num_batched_tokens=st.one_of(st.integers(1, 20), st.integers(20, 200)),
        prefix_caching=st.sampled_from([True, True, True, False]),
        collisions=st.booleans(),
        drafts=st.booleans(),
    )
    def build(
        self,
        has_full,
        window,
        spare_blocks,
        max_model_len,
        max_num_seqs,
        max_num_batched_tokens,
        prefix_caching,
        collisions,
        drafts=False,
    ):
        self.patches = ExitStack()
        if collisions:
            self.patches.enter_context(mock.patch("workers.kv_cache.prefix_cache.hash_block", weak_hash))
        has_full = has_full or window is None
        num_full = 1 + num_blocks_for(max_model_len) + spare_blocks[0] if has_full else 0
        num_sliding = (
            1 + sliding_blocks_per_sequence(window, max_model_len) + spare_blocks[1]
            if window is not None
            else 0
        )
        self.kv = KVCacheManager(
            num_full_blocks=num_full,
            num_sliding_blocks=num_sliding,
            window=window,
            prefix_caching=prefix_caching,
        )
        self.config = SchedulerConfig(max_num_seqs, max_num_batched_tokens)
        self.max_model_len = max_model_len
        self.guess = random.Random(1)
        self.scheduler = Scheduler(
            self.config, self.kv, max_model_len=max_model_len, propose=self.propose if drafts else None
        )
        self.scheduler._automata = HeldAutomata(max_bytes=2)
        self.rank = SimulatedRank(num_full, num_sliding, window, sample)
        self.has_drafts = drafts
        self.in_flight: list[StepPlan] = []
        self.expected = {}
        self.received: dict[int, list[SequenceUpdate]] = {}
        self.num_resumed: dict[int, int] = {}
        self.prompts: dict[int, tuple[int, ...]] = {}
        self.prompt_logprobs: dict[int, list[int]] = {}
        self.priorities: dict[int, int] = {}
        self.live: list[int] = []
        self.ended: set[int] = set()
        self.seen: Counter[str] = Counter()

    def propose(self, sequence, num_pending):
        """Return up to twelve tokens, of which the first few are right, or all, or none, also after
        a token in flight that was guessed wrong."""
        tokens = list(sequence.token_ids)
        num_right = self.guess.choice([0, 1, 3, 12])
        for count in range(num_pending + self.guess.randrange(13)):
            tokens.append(sample(tokens) if count < num_right else self.guess.randrange(VOCAB_SIZE))
        drafts = tokens[len(sequence.token_ids) + num_pending :]
        self.seen["drafts after a token in flight"] += bool(num_pending and drafts)
        return drafts

    @rule(
        prompt=prompts,
        max_tokens=st.one_of(st.none(), st.integers(1, 60)),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        stop_token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2),
        resume=st.integers(0, 40),
        constraint=st.none() | st.integers(0, 5),
        salt=st.sampled_from([None, None, "a", "b"]),
        prompt_logprobs=st.sampled_from([None, None, 2]),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
    )
    def add(
        self,
        prompt,
        max_tokens,
        min_tokens,
        ignore_eos,
        stop_token_ids,
        resume,
        constraint=None,
        salt=None,
        prompt_logprobs=None,
        priority=0,
    ):
        prompt = prompt[: self.max_model_len - 1]
        room = self.max_model_len - len(prompt)
        max_tokens = None if max_tokens is None else min(max_tokens, room)
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, room if max_tokens is None else max_tokens),
            ignore_eos=ignore_eos,
            stop_token_ids=tuple(stop_token_ids),
            seed=0,
            prompt_logprobs=prompt_logprobs,
        )
        seq_id = len(self.expected)
        self.prompts[seq_id] = tuple(prompt)
        self.prompt_logprobs[seq_id] = []
        self.rank.roots[seq_id] = {None: 0, "a": -1, "b": -2}[salt]
        request = EngineRequest(f"request {seq_id}", tuple(prompt), sampling)
        output, reason, stop = generate_alone(request, self.max_model_len)
        resumed = output[: resume if resume < 20 else 0]
        body = b"" if constraint is None else bytes([constraint])
        request = EngineRequest(
            request.request_id,
            request.prompt_token_ids,
            sampling,
            tuple(resumed),
            constraint=None if constraint is None else Constraint(automaton_id(body), body),
            cache_salt=salt,
            priority=priority,
        )
        self.priorities[seq_id] = priority
        self.scheduler.check(request)
        self.expected[seq_id] = (output, reason, stop)
        self.num_resumed[seq_id] = len(resumed)
        self.received[seq_id] = []
        self.live.append(seq_id)
        update = self.scheduler.add(Sequence(seq_id, request, (MODEL_STOP_TOKEN,)))
        if update is not None:
            assert len(resumed) == len(output), "only a complete sequence ends when it is added"
            self.seen["complete when added"] += 1
            self.take(update)

    @rule(count=st.integers(1, 12))
    def steps(self, count):
        """Run the engine's turns: plan, run, take in."""
        for _ in range(count):
            self.plan()
            while self.in_flight:
                self.run_oldest()
            self.scheduler.check_integrity()

    @rule()
    def plan(self):
        """Plan a step while another may still be in flight."""
        if len(self.in_flight) == 2:
            self.run_oldest()
        preemptions = self.scheduler.num_preemptions
        plan = self.scheduler.schedule()
        if self.scheduler.num_preemptions > preemptions:
            self.seen["preempted"] += 1
        if plan is None:
            assert self.in_flight or not self.scheduler.has_work, "there is work, but nothing is scheduled"
            return
        assert 0 < sum(plan.num_scheduled_tokens) <= self.config.max_num_batched_tokens
        num_rows = sum(plan.samples) + sum(len(drafts) for _, drafts in plan.drafts)
        assert num_rows <= self.config.max_num_seqs, "more rows are sampled than ranks have room for"
        ends = map(sum, zip(plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True))
        assert max(ends) <= self.max_model_len, "drafts go past the longest sequence"
        assert min(plan.num_scheduled_tokens) > 0
        assert len(plan.seq_ids) <= self.config.max_num_seqs
        begun = [start.seq_id for start in plan.starts]
        running = [seq_id for seq_id in plan.seq_ids if seq_id not in begun]
        assert running == sorted(running, key=self.order)
        assert begun == sorted(begun, key=self.order)
        waiting = [sequence.seq_id for sequence in self.scheduler._waiting]
        if begun and waiting:
            assert max(map(self.order, begun)) < min(map(self.order, waiting)), (
                "overtaken by a less urgent one"
            )
            self.seen["others waited"] += 1
        if any(block for start in plan.starts for block in (*start.full_blocks, *start.sliding_blocks)):
            self.seen["prefix hit"] += 1
        self.in_flight.append(plan)

    def order(self, seq_id):
        return self.priorities[seq_id], seq_id

    def run_oldest(self):
        for update in self.scheduler.update(self.rank.run(self.in_flight.pop(0))):
            self.take(update)

    @rule(position=st.integers(0, 5))
    def abort(self, position):
        if position >= len(self.live):
            return
        seq_id = self.live[position]
        update = self.scheduler.abort(seq_id, "the client left")
        assert update is not None
        assert (update.finish_reason, update.error, update.token_ids) == ("abort", "the client left", ())
        self.take(update)
        assert self.scheduler.abort(seq_id, "the client left") is None

    def take(self, update):
        assert update.seq_id not in self.ended, "an update after the last one"
        self.received[update.seq_id].append(update)
        wanted = self.prompt_logprobs[update.seq_id]
        wanted += [int(entry.logprob) for entry in update.prompt_logprobs]
        prompt = self.prompts[update.seq_id]
        assert tuple(wanted) == prompt[1 : 1 + len(wanted)]
        if wanted and update.token_ids:
            assert len(wanted) == len(prompt) - 1, "a token came before the prompt's log-probabilities"
            self.seen["prompt log-probabilities"] += 1
        if update.finish_reason is not None:
            self.ended.add(update.seq_id)
            self.live.remove(update.seq_id)
        output, reason, stop = self.expected[update.seq_id]
        tokens = [token for entry in self.received[update.seq_id] for token in entry.token_ids]
        start = self.num_resumed[update.seq_id]
        assert tokens == output[start : start + len(tokens)]
        if update.finish_reason not in (None, "abort"):
            assert (update.finish_reason, update.stop_token_id) == (reason, stop)
            assert start + len(tokens) == len(output)

    @invariant()
    def everything_agrees(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.live)
            assert 0.0 <= self.kv.usage <= 1.0

    def teardown(self):
        if hasattr(self, "scheduler"):
            self.finish()
            for name in self.seen:
                event(name)

    def finish(self):
        """Stop new requests and check that everything ends, once, and that nothing is held."""
        with self.patches:
            for _ in range(3 * sum(len(output) + 130 for output, _, _ in self.expected.values()) + 1):
                if not self.scheduler.has_work:
                    break
                self.steps(1)
            assert self.ended == set(self.expected), "a sequence never ended"
            while self.in_flight:
                self.run_oldest()
            self.scheduler.check_integrity()
            assert self.kv.usage == 0.0
            assert self.scheduler._automata._num_users == {}
            if self.has_drafts and self.rank.num_drafts > 50:
                assert 0 < self.rank.num_right < self.rank.num_drafts
                self.seen["drafts"] += 1
            for priority in set(self.priorities.values()):
                equal = [seq_id for seq_id in self.rank.start_order if self.priorities[seq_id] == priority]
                starts = list(dict.fromkeys(equal))
                assert starts == sorted(starts), "admitted out of order"


SchedulerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestSchedulerProperties = SchedulerMachine.TestCase


def test_a_long_run_under_tiny_pools_meets_everything() -> None:
    """The same machine driven at random for long, so that preemption, hits, collisions and
    resumption surely happen together."""
    choose = random.Random(4)
    seen: Counter[str] = Counter()
    for collisions in (False, True):
        for has_full, window, drafts in (
            (True, 18, False),
            (True, 18, True),
            (True, None, True),
            (False, 18, False),
            (True, 1, True),
        ):
            machine = SchedulerMachine()
            # Drafts use rows that sequences leave free.
            machine.build(has_full, window, (3, 2), 120, 100 if drafts else 4, 48, True, collisions, drafts)
            with machine.patches:
                for _ in range(150):
                    prompt = [
                        *family_prompt(choose.randrange(3), choose.randrange(90)),
                        choose.randrange(VOCAB_SIZE),
                    ]
                    machine.add(
                        prompt=prompt,
                        max_tokens=choose.choice([None, 5, 40]),
                        min_tokens=choose.randrange(3),
                        ignore_eos=choose.random() < 0.7,
                        stop_token_ids=[],
                        resume=choose.randrange(40),
                        constraint=choose.choice([None, *range(6)]),
                        salt=choose.choice([None, None, "a"]),
                        prompt_logprobs=choose.choice([None, None, 2]),
                        priority=choose.choice([0, 0, -5, 3]),
                    )
                    machine.steps(count=choose.randrange(8))
                    machine.plan()
                    if choose.random() < 0.1:
                        machine.abort(position=choose.randrange(5))
                    machine.everything_agrees()
                machine.finish()
            seen += machine.seen
            if has_full and window == 18:
                assert (
                    min(machine.seen[name] for name in ("preempted", "prefix hit", "complete when added"))
                    >= 5
                ), machine.seen
    assert min(seen[name] for name in ("preempted", "prefix hit", "complete when added")) >= 50, seen
    assert seen["drafts"] == 6
    assert seen["drafts after a token in flight"] > 100
    assert seen["prompt log-probabilities"] > 100
    assert seen["others waited"] > 20
