"""A rank without a model: it keeps the state that StepPlans describe, and proves that attention
would read the right keys.

Instead of K and V it stores in each slot which token prefix the slot belongs to. A query then
checks every key position it sees.
"""

from collections.abc import Callable, Sequence

from workers.config import BLOCK_SIZE
from workers.kv_cache.block_pool import NULL_BLOCK
from workers.request import TokenLogprobs
from workers.scheduler.plan import StepPlan, StepResult
from workers.scheduler.plan_wire import decode_plan, encode_plan

Sampler = Callable[[Sequence[int]], int]


class PrefixNumbers:
    """A numbering of token prefixes, exactly: equal numbers mean equal tokens from position 0
    on."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}

    def of(self, token_ids: Sequence[int], root: int = 0) -> list[int]:
        """Return for each position the number of the prefix that ends with it.

        Args:
            root: 0, or below: prefixes of different roots are different.
        """
        numbers, number = [], root
        for token_id in token_ids:
            number = self._numbers.setdefault((number, token_id), len(self._numbers) + 1)
            numbers.append(number)
        return numbers


class SimulatedRank:
    """A rank that applies plans in order.

    Args:
        num_full_blocks, num_sliding_blocks, window: as KVCacheManager's.
        sampler: the next token of a sequence from all its tokens.
    Attributes:
        roots: by seq_id, below 0: sequences with different ones may share no KV.
        num_drafts, num_right: number of drafts received, and of right ones.
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
        self.roots: dict[int, int] = {}
        self.num_prompt_tokens: dict[int, int] = {}
        self.num_drafts = self.num_right = 0

    def run(self, plan: StepPlan) -> StepResult:
        """Apply the plan as it comes off the wire, check all that attention reads, and sample."""
        received = decode_plan(encode_plan(plan))
        assert received == plan
        assert received.step == self._next_step
        self._next_step += 1
        self._apply_changes(received)
        drafts = dict(received.drafts)
        spans = [
            (seq_id, computed, computed + scheduled, samples, drafts.get(index, ()))
            for index, (seq_id, computed, scheduled, samples) in enumerate(
                zip(
                    received.seq_ids,
                    received.num_computed_tokens,
                    received.num_scheduled_tokens,
                    received.samples,
                    strict=True,
                )
            )
        ]
        assert len(set(received.seq_ids)) == len(received.seq_ids)
        # As in a layer: all keys are stored before any query reads.
        for seq_id, start, end, _, guessed in spans:
            self._store(seq_id, start, end, guessed)
        tokens: dict[int, list[int]] = {}
        for seq_id, start, end, samples, guessed in spans:
            self._attend(seq_id, start, end, guessed)
            known = self.tokens[seq_id]
            assert samples == (end - len(guessed) == len(known))
            assert samples or not guessed
            if samples:
                tokens[seq_id] = [self._sampler(known)]
                known.append(tokens[seq_id][0])
                for guess in guessed:
                    if known[-1] != guess:
                        break
                    tokens[seq_id].append(self._sampler(known))
                    known.append(tokens[seq_id][-1])
                self.num_drafts += len(guessed)
                self.num_right += len(tokens[seq_id]) - 1
        return StepResult(
            received.step,
            tuple(tokens),
            tuple(token for entry in tokens.values() for token in entry),
            num_tokens=tuple(map(len, tokens.values())) if drafts else (),
            prompt_logprobs=self._prompt_logprobs(received),
        )

    def _prompt_logprobs(self, plan: StepPlan) -> dict[int, tuple[TokenLogprobs, ...]]:
        """Return the prompt's log probabilities; the token itself stands for its logarithm."""
        found = {}
        for index, first, count, num_top in plan.prompt_logprobs:
            seq_id, computed = plan.seq_ids[index], plan.num_computed_tokens[index]
            assert computed <= first - 1 < first - 1 + count <= computed + plan.num_scheduled_tokens[index]
            assert first + count <= self.num_prompt_tokens[seq_id]
            found[seq_id] = tuple(
                TokenLogprobs(float(token), ((num_top, 0.0),))
                for token in self.tokens[seq_id][first : first + count]
            )
        return found

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
            self.num_prompt_tokens[start.seq_id] = start.num_prompt_tokens
            self._tables[start.seq_id] = (list(start.full_blocks), list(start.sliding_blocks))
            self.start_order.append(start.seq_id)
        for index, full, sliding in plan.new_blocks:
            tables = self._tables[plan.seq_ids[index]]
            for group, blocks in enumerate((full, sliding)):
                assert NULL_BLOCK not in blocks
                assert all(block < self._num_blocks[group] for block in blocks)
                tables[group].extend(blocks)

    def _numbers(self, seq_id: int, end: int, drafts: tuple[int, ...]) -> list[int]:
        tokens = [*self.tokens[seq_id], *drafts][:end]
        assert len(tokens) == end
        return self._prefixes.of(tokens, self.roots.get(seq_id, 0))

    def _store(self, seq_id: int, start: int, end: int, drafts: tuple[int, ...]) -> None:
        numbers = self._numbers(seq_id, end, drafts)
        for group, table in enumerate(self._tables[seq_id]):
            if self._num_blocks[group]:
                for position in range(start, end):
                    block = table[position // BLOCK_SIZE]
                    assert block != NULL_BLOCK
                    self._slots[group][block * BLOCK_SIZE + position % BLOCK_SIZE] = numbers[position]

    def _attend(self, seq_id: int, start: int, end: int, drafts: tuple[int, ...]) -> None:
        numbers = self._numbers(seq_id, end, drafts)
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
