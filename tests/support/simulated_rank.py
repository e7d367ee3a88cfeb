"""A rank without a model: it keeps what StepPlans tell it, and proves that attention would read the
right keys.

Instead of K and V it stores in each slot which token prefix the slot belongs to. A query then
checks every key position it sees.
"""

from collections.abc import Callable, Sequence

from workers.config import BLOCK_SIZE
from workers.kv_cache.block_pool import NULL_BLOCK
from workers.scheduler.plan import StepPlan, StepResult
from workers.scheduler.plan_wire import decode_plan, encode_plan

Sampler = Callable[[Sequence[int]], int]


class PrefixNumbers:
    """Numbers token prefixes exactly: equal numbers mean equal tokens from position 0 on."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}

    def of(self, token_ids: Sequence[int]) -> list[int]:
        """For each position the number of the prefix that ends with it."""
        numbers, number = [], 0
        for token_id in token_ids:
            number = self._numbers.setdefault((number, token_id), len(self._numbers) + 1)
            numbers.append(number)
        return numbers


class SimulatedRank:
    """Applies plans in order.

    Args:
        num_full_blocks, num_sliding_blocks, window: as KVCacheManager's.
        sampler: the next token of a sequence from all its tokens.
    """

    def __init__(
        self, num_full_blocks: int, num_sliding_blocks: int, window: int | None, sampler: Sampler
    ) -> None:
        self._num_blocks = (num_full_blocks, num_sliding_blocks)
        self._window = window
        self._sampler = sampler
        self._prefixes = PrefixNumbers()
        self._slots: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self.tokens: dict[int, list[int]] = {}
        self._tables: dict[int, tuple[list[int], list[int]]] = {}
        self._next_step = 0
        self.start_order: list[int] = []
        self.automata: dict[bytes, bytes] = {}

    def run(self, plan: StepPlan) -> StepResult:
        """Apply the plan as it comes off the wire, check all that attention reads, and sample."""
        received = decode_plan(encode_plan(plan))
        assert received == plan
        assert received.step == self._next_step
        self._next_step += 1
        self._apply_changes(received)
        spans = list(
            zip(
                received.seq_ids,
                received.num_computed_tokens,
                received.num_scheduled_tokens,
                received.samples,
                strict=True,
            )
        )
        assert len(set(received.seq_ids)) == len(received.seq_ids)
        for (
            seq_id,
            num_computed,
            num_scheduled,
            _samples,
        ) in spans:  # as in a layer: all keys are stored before any query reads
            self._store(seq_id, num_computed, num_computed + num_scheduled)
        seq_ids, token_ids = [], []
        for seq_id, num_computed, num_scheduled, samples in spans:
            end = num_computed + num_scheduled
            self._attend(seq_id, num_computed, end)
            assert samples == (end == len(self.tokens[seq_id]))
            if samples:
                token_id = self._sampler(self.tokens[seq_id])
                self.tokens[seq_id].append(token_id)
                seq_ids.append(seq_id)
                token_ids.append(token_id)
        return StepResult(received.step, tuple(seq_ids), tuple(token_ids))

    def _apply_changes(self, plan: StepPlan) -> None:
        for seq_id in plan.drops:
            del self.tokens[seq_id], self._tables[seq_id]
        for automaton_id in plan.dropped_automata:
            del self.automata[automaton_id]
        for automaton_id, body in plan.automata:
            assert automaton_id not in self.automata, "an automaton was sent twice"
            self.automata[automaton_id] = body
        for start in plan.starts:
            assert start.seq_id not in self.tokens
            assert start.constraint is None or start.constraint in self.automata
            assert 0 < start.num_prompt_tokens <= len(start.token_ids)
            self.tokens[start.seq_id] = list(start.token_ids)
            self._tables[start.seq_id] = (list(start.full_blocks), list(start.sliding_blocks))
            self.start_order.append(start.seq_id)
        for index, full, sliding in plan.new_blocks:
            tables = self._tables[plan.seq_ids[index]]
            for group, blocks in enumerate((full, sliding)):
                assert NULL_BLOCK not in blocks
                assert all(block < self._num_blocks[group] for block in blocks)
                tables[group].extend(blocks)

    def _store(self, seq_id: int, start: int, end: int) -> None:
        numbers = self._prefixes.of(self.tokens[seq_id][:end])
        for group, table in enumerate(self._tables[seq_id]):
            if self._num_blocks[group]:
                for position in range(start, end):
                    block = table[position // BLOCK_SIZE]
                    assert block != NULL_BLOCK
                    self._slots[group][block * BLOCK_SIZE + position % BLOCK_SIZE] = numbers[position]

    def _attend(self, seq_id: int, start: int, end: int) -> None:
        numbers = self._prefixes.of(self.tokens[seq_id][:end])
        for group, table in enumerate(self._tables[seq_id]):
            if self._num_blocks[group]:
                first = 0 if group == 0 else max(start - self._window + 1, 0)
                for position in range(first, end):
                    block = table[position // BLOCK_SIZE]
                    assert block != NULL_BLOCK, (
                        f"sequence {seq_id} at {start}: key {position} of group {group} has no block"
                    )
                    found = self._slots[group].get(block * BLOCK_SIZE + position % BLOCK_SIZE)
                    assert found == numbers[position], (
                        f"sequence {seq_id} at {start}: key {position} of group {group} is not its own"
                    )
