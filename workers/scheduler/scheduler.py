"""Continuous batching: selects the sequences of the next step and the number of tokens that each
computes. No clocks, threads or tensors.

A sequence has no prefill or decode phase: `num_computed_tokens` catches up with its tokens, in
chunks where the budget is short, and whenever it has caught up the step yields one more token
(after vLLM's `v1/core/sched/scheduler.py`).
"""

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable
from itertools import compress

from workers.config import SchedulerConfig
from workers.constraint.registry import HeldAutomata
from workers.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from workers.kv_cache.manager import KVCacheManager
from workers.request import EngineRequest, FinishReason
from workers.scheduler.plan import SequenceStart, StepPlan, StepResult
from workers.scheduler.sequence import Sequence, SequenceStatus, SequenceUpdate
from workers.scheduler.step import (
    InFlight,
    PlanBuilder,
    append_tokens,
    check_result,
    commit,
    prompt_updates,
    settle_drafts,
    tokens_of,
)

Proposer = Callable[[Sequence, int], Iterable[int]]
"""Function that guesses the tokens after a sequence's tokens and those in flight, whose number (0
or 1) is the second argument; it returns ids of the vocabulary, in most cases none."""


class Scheduler:
    """Plans steps and takes in their results. Running sequences come first, then waiting ones, both
    by priority and, among equals, by arrival. When blocks run out, the last of the running
    sequences loses its blocks and is computed again later.

    `schedule` may be called again before `update`: a sequence whose next token is still in flight
    is planned one token further, since the ranks have that token. If the token turns out to end the
    sequence, this one entry was wasted. The sequence's blocks are free from then on and may be
    given away in the plan after the wasted one: ranks run plans in order, so the writes of the
    wasted entry (the key of the last token, in a block not yet committed to the prefix cache) come
    before any write or read of the new owner. Results must come in the order of the plans.

    With `propose`, plans carry drafts. A sequence with drafts in flight is planned again when their
    result is back. Drafts use what the other entries leave: budget, free blocks, and rows to sample
    (max_num_seqs), for which the ranks have sized their memory.

    Args:
        max_model_len: maximum tokens of a sequence, prompt and output together.
        propose: makes drafts; None for no drafts.
    Attributes:
        propose: as given; may be set between two plans.
    Raises:
        ConfigError: the KV cache cannot hold one sequence of max_model_len.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVCacheManager,
        *,
        max_model_len: int,
        propose: Proposer | None = None,
    ) -> None:
        if not kv.fits(max_model_len):
            raise ConfigError(
                f"max_model_len {max_model_len} is more than the KV cache can hold of one sequence"
            )
        self._max_num_seqs = config.max_num_seqs
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._max_model_len = max_model_len
        self._kv = kv
        self.propose = propose
        self._step = 0
        self._sequences: dict[int, Sequence] = {}
        self._num_scored = 0  # number of sequences that want log-probabilities of their prompts
        # Both in the order of `_order`.
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._drops: list[int] = []
        self._automata = HeldAutomata()
        self._in_flight: deque[InFlight] = deque()
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        """Number of sequences that hold KV blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Number of sequences not admitted yet, or preempted."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """True if any sequence is unfinished."""
        return bool(self._sequences)

    def check(self, request: EngineRequest) -> None:
        """Refuse a request that passed `workers.rpc.validate` but does not fit into the context.
        Reads only constants, so any thread may call it.

        Raises:
            ContextLengthExceeded: the prompt, or prompt and max_tokens together, exceed
                max_model_len.
            InvalidRequest: min_tokens or output_token_ids exceed the number of tokens that may be
                generated.
        """
        sampling = request.sampling
        num_prompt, num_output = len(request.prompt_token_ids), len(request.output_token_ids)
        limit = self._max_model_len
        if num_prompt >= limit:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt} tokens, which leaves no room for output in the context of "
                f"{limit}; shorten it",
                "prompt_token_ids",
            )
        if sampling.max_tokens is not None and num_prompt + sampling.max_tokens > limit:
            raise ContextLengthExceeded(
                f"the prompt of {num_prompt} tokens and max_tokens {sampling.max_tokens} together "
                f"exceed the context of {limit}; "
                f"shorten the prompt or set max_tokens to at most {limit - num_prompt}",
                "max_tokens",
            )
        max_output = limit - num_prompt if sampling.max_tokens is None else sampling.max_tokens
        if sampling.min_tokens > max_output:
            raise InvalidRequest(
                f"min_tokens must be from 0 to the {max_output} tokens that may be generated, got "
                f"{sampling.min_tokens}",
                "min_tokens",
            )
        if num_output > max_output:
            raise InvalidRequest(
                f"output_token_ids has {num_output} tokens, but at most {max_output} may be generated",
                "output_token_ids",
            )

    def add(self, sequence: Sequence) -> SequenceUpdate | None:
        """Queue a sequence whose request passed `check`.

        Returns:
            None; or the sequence's end, if it resumes with output that is already complete: it is
            then not queued.
        """
        assert sequence.seq_id not in self._sequences, f"sequence {sequence.seq_id} was added twice"
        max_tokens = sequence.request.sampling.max_tokens
        sequence.max_len = self._max_model_len
        if max_tokens is not None:
            sequence.max_len = min(sequence.max_len, sequence.num_prompt_tokens + max_tokens)
        reason = sequence.finish_reason()
        if reason is not None:
            sequence.status = SequenceStatus.FINISHED
            return SequenceUpdate(
                sequence.seq_id,
                finish_reason=reason,
                stop_token_id=sequence.token_ids[-1] if reason == "stop" else None,
            )
        self._sequences[sequence.seq_id] = sequence
        self._num_scored += sequence.wants_prompt_logprobs
        insort(self._waiting, sequence, key=_order)
        return None

    def abort(self, seq_id: int, reason: str, finish_reason: FinishReason = "abort") -> SequenceUpdate | None:
        """End a sequence now; a result for it that arrives later is ignored.

        Args:
            reason: one sentence, which becomes the update's `error`.
            finish_reason: `abort` or `error`.
        Returns:
            Its last update; None if it has ended before or is unknown.
        """
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            return None
        return self._end(sequence, finish_reason, reason)

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None if no sequence can compute anything now."""
        builder = PlanBuilder()
        budget = self._max_num_batched_tokens
        num_preemptions = self.num_preemptions
        entries = builder.entries
        propose = self.propose
        spare_rows = self._max_num_seqs - len(self._sequences)
        scores_prompts = self._num_scored > 0
        has_extras = scores_prompts or propose is not None
        # Preemption, in `_claim_blocks`, takes sequences from the end of this list, after the
        # current one.
        for sequence in self._running:
            if budget == 0:
                break
            num_computed = sequence.num_computed_tokens
            num_pending = sequence.num_pending_tokens
            num_new = len(sequence.token_ids) + num_pending - num_computed
            # Skip if planned twice, as sequences with drafts in flight count, or complete with the
            # token in flight.
            if num_pending and (num_new <= 0 or num_computed + num_new >= sequence.max_len):
                continue
            samples = num_new <= budget
            if not samples:
                num_new = budget
            if num_computed + num_new > sequence.blocks.capacity:
                num_granted = self._claim_blocks(sequence, num_new, builder)
                if num_granted == 0:  # it was the last itself
                    break
                samples = samples and num_granted == num_new
                num_new = num_granted
            if has_extras:
                if scores_prompts:
                    builder.ask_prompt_logprobs(sequence, num_computed, num_new)
                if propose is not None and samples and spare_rows > 0:
                    room = min(spare_rows, budget - num_new)
                    proposed = propose(sequence, num_pending)
                    num_drafts = builder.claim_drafts(self._kv, sequence, num_new, proposed, room)
                    sequence.num_draft_tokens = num_drafts
                    spare_rows -= num_drafts
                    num_new += num_drafts
            sequence.num_computed_tokens = num_computed + num_new
            sequence.num_pending_tokens = num_pending + samples
            entries.append((sequence, sequence.seq_id, num_computed, num_new, samples))
            budget -= num_new
        if self.num_preemptions == num_preemptions:
            self._admit_waiting(budget, builder)
        if not entries:
            return None
        plan, sequences = builder.build(self._step, tuple(self._drops), self._automata.take_changes())
        self._step += 1
        self._drops.clear()
        self._in_flight.append(InFlight(plan, sequences))
        return plan

    def _claim_blocks(self, sequence: Sequence, num_new: int, builder: PlanBuilder) -> int:
        """Get blocks for up to `num_new` further tokens of a running sequence, taking them from the
        last sequences if necessary.

        Returns:
            Number of tokens with blocks; 0 if the sequence itself was the last and lost its blocks.
        """
        blocks = sequence.blocks
        num_full, num_sliding = len(blocks.full), len(blocks.sliding)
        while (num_granted := self._kv.grow(blocks, sequence.num_computed_tokens, num_new)) == 0:
            last = self._running[-1]
            self._preempt(last)
            if last is sequence:
                return 0
        builder.add_blocks(tuple(blocks.full[num_full:]), tuple(blocks.sliding[num_sliding:]))
        return num_granted

    def _admit_waiting(self, budget: int, builder: PlanBuilder) -> None:
        while self._waiting and budget > 0 and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            num_cached = self._kv.admit(sequence.blocks, sequence.token_ids, sequence.max_cached_tokens)
            if num_cached is None:
                return
            self._waiting.popleft()
            insort(self._running, sequence, key=_order)
            sequence.status = SequenceStatus.RUNNING
            sequence.num_computed_tokens = num_cached
            if sequence.num_preemptions == 0:
                sequence.num_cached_tokens = min(num_cached, sequence.num_prompt_tokens)
            blocks, constraint = sequence.blocks, sequence.request.constraint
            if constraint is not None:
                self._automata.use(constraint)
            builder.starts.append(
                SequenceStart(
                    seq_id=sequence.seq_id,
                    token_ids=tuple(sequence.token_ids),
                    num_prompt_tokens=sequence.num_prompt_tokens,
                    sampling=sequence.request.sampling,
                    stop_token_ids=sequence.stop_token_ids,
                    constraint=None if constraint is None else constraint.id,
                    constraint_limits=sequence.request.constraint_limits,
                    full_blocks=tuple(blocks.full),
                    sliding_blocks=tuple(blocks.sliding),
                )
            )
            num_missing = len(sequence.token_ids) - num_cached
            num_new = self._claim_blocks(sequence, min(num_missing, budget), builder)
            assert num_new > 0, "a sequence was admitted without room to advance"
            if self._num_scored:
                builder.ask_prompt_logprobs(sequence, num_cached, num_new)
            sequence.num_computed_tokens = num_cached + num_new
            sequence.num_pending_tokens = int(num_new == num_missing)
            builder.entries.append((sequence, sequence.seq_id, num_cached, num_new, num_new == num_missing))
            budget -= num_new

    def update(self, result: StepResult) -> list[SequenceUpdate]:
        """Take in the result of the oldest plan without one, and return new tokens and ends, in
        batch order.

        Raises:
            ValueError: the result does not belong to that plan, or is an error.
        """
        if result.error is not None:
            raise ValueError(f"step {result.step} failed: {result.error}")
        if not self._in_flight or self._in_flight[0].plan.step != result.step:
            raise ValueError(f"a result for step {result.step} came, which is not the oldest step in flight")
        plan = self._in_flight[0].plan
        check_result(plan, result)
        sequences = self._in_flight.popleft().sequences
        commit(self._kv, plan, sequences)
        updates = prompt_updates(plan, sequences, result) if plan.prompt_logprobs else []
        sampling = compress(sequences, plan.samples)
        if plan.drafts:
            ends = settle_drafts(self._kv, plan, sampling, tokens_of(result), updates)
        else:
            ends = append_tokens(sampling, result.token_ids, updates)
        if result.logprobs:
            for update in updates:
                update.logprobs = result.logprobs.get(update.seq_id, ())[: len(update.token_ids)]
        if ends:
            for sequence, update in ends:
                if update.finish_reason == "stop":
                    update.stop_token_id = update.token_ids[-1]
                self._forget(sequence)
            self._running = [
                sequence for sequence in self._running if sequence.status is SequenceStatus.RUNNING
            ]
        return updates

    def _preempt(self, sequence: Sequence) -> None:
        """Take the blocks of the last running sequence. It waits again, in its place, and starts
        again with all its tokens."""
        assert self._running[-1] is sequence
        self._running.pop()
        self._release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed_tokens = sequence.num_pending_tokens = sequence.num_draft_tokens = 0
        sequence.next_prompt_logprob = sequence.first_missing_prompt_logprob
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        insort(self._waiting, sequence, key=_order)

    def _end(self, sequence: Sequence, reason: FinishReason, error: str) -> SequenceUpdate:
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._forget(sequence)
        return SequenceUpdate(
            sequence.seq_id, finish_reason=reason, num_cached_tokens=sequence.num_cached_tokens, error=error
        )

    def _forget(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._release(sequence)
        sequence.status = SequenceStatus.FINISHED
        del self._sequences[sequence.seq_id]
        self._num_scored -= sequence.wants_prompt_logprobs

    def _release(self, sequence: Sequence) -> None:
        """Free the blocks of a running sequence, and make the ranks and the steps in flight drop
        it."""
        self._kv.release(sequence.blocks)
        self._drops.append(sequence.seq_id)
        if sequence.request.constraint is not None:
            self._automata.release(sequence.request.constraint)
        for step in self._in_flight:
            step.sequences = [None if entry is sequence else entry for entry in step.sequences]

    def check_integrity(self) -> None:
        """Assert that queues, sequences and KV blocks agree. For tests, and for an idle engine."""
        self._kv.check_integrity()
        assert len(self._running) <= self._max_num_seqs, "more sequences run than may"
        members = [*self._running, *self._waiting]
        for queue in (self._running, self._waiting):
            assert list(queue) == sorted(queue, key=_order), "a queue is out of order"
        assert len(members) == len(self._sequences), "a sequence is in no queue, or in two"
        assert all(self._sequences.get(sequence.seq_id) is sequence for sequence in members), (
            "a queue holds a sequence that ended"
        )
        for sequence in self._running:
            assert sequence.status is SequenceStatus.RUNNING, "a sequence runs without that status"
            assert sequence.num_computed_tokens <= sequence.blocks.capacity, (
                "more tokens are computed than have blocks"
            )
            num_known = len(sequence.token_ids) + sequence.num_pending_tokens
            assert sequence.num_computed_tokens - sequence.num_draft_tokens <= num_known, (
                "more tokens are computed than are known"
            )
            assert num_known <= sequence.max_len, "a running sequence is too long"
            assert 0 <= sequence.num_pending_tokens <= len(self._in_flight), (
                "more tokens are awaited than plans are in flight"
            )
            assert sequence.seq_id not in self._drops, "a running sequence is to be dropped"
        for sequence in self._waiting:
            assert sequence.status is SequenceStatus.WAITING, "a sequence waits without that status"
            assert sequence.blocks.capacity == 0, "a waiting sequence holds blocks"
        if not self._running:
            assert self._kv.usage == 0.0, "blocks are held, but nothing runs"


def _order(sequence: Sequence) -> tuple[int, int]:
    """Return a sequence's place in a queue."""
    return sequence.request.priority, sequence.seq_id
