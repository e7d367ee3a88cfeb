"""Steps of sequences in random automata on a device, against the same steps on the host."""

from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import torch
from torch import Tensor

from kernels.automaton.layout import AutomatonRows
from tests.support.automata import automata
from tests.support.host_automaton import ConstraintState, allowed_in
from workers.constraint.automaton import AutomatonState, ConstraintLimits, TokenAutomaton
from workers.constraint.codec import Constraint
from workers.constraint.state import AutomatonTables
from workers.rank.automata import Automata
from workers.rank.drafts import NO_DRAFT, DraftRows, kept_rows
from workers.request import SamplingParams
from workers.scheduler.plan import SequenceStart

VOCAB = 75
NUM_SLOTS = 4
PROMPT = (1, 2, 3)

token_ids = st.integers(0, VOCAB - 1) | st.integers(30, 34)
LIMITS = st.builds(ConstraintLimits, st.none() | st.integers(0, 6), st.none() | st.integers(0, 9))


@dataclass
class Followed:
    """A sequence as the host sees it; no state if it has no automaton."""

    num_tokens: int
    state: ConstraintState | None


class AutomatonSteps:
    """Sequences by slot, on the device and on the host.

    Args:
        mask, advance: as `kernels.automaton.reference`.
    """

    def __init__(
        self,
        mask: Callable[[Tensor, AutomatonRows], None],
        advance: Callable[[AutomatonRows, Tensor], None],
        device: torch.device,
    ) -> None:
        self._mask, self._advance, self._device = mask, advance, device
        self._automata = Automata(NUM_SLOTS, device)
        self._tables: dict[bytes, AutomatonTables] = {}
        self._sequences: dict[int, Followed] = {}

    def run(self, data: st.DataObject) -> None:
        """Take random steps, and compare what may come in each row."""
        for _ in range(data.draw(st.integers(1, 6), "steps")):
            self._exchange_automata(data)
            self._exchange_sequences(data)
            self._step(data)

    def _exchange_automata(self, data: st.DataObject) -> None:
        used = {sequence.state.tables for sequence in self._sequences.values() if sequence.state}
        idle = [key for key, tables in self._tables.items() if tables not in used]
        dropped = data.draw(st.sets(st.sampled_from(idle)) if idle else st.just(set()), "dropped")
        for key in dropped:
            del self._tables[key]
        new = {}
        for automaton in data.draw(st.lists(automata(token_ids), max_size=2), "new automata"):
            constraint = Constraint.of(automaton)
            if constraint.id not in self._tables:
                new[constraint.id] = constraint.body
                self._tables[constraint.id] = AutomatonTables(constraint.body)
        self._automata.update(list(new.items()), sorted(dropped))

    def _exchange_sequences(self, data: st.DataObject) -> None:
        for slot in range(NUM_SLOTS):
            if slot in self._sequences and data.draw(st.integers(0, 4), "drop") == 0:
                del self._sequences[slot]
                self._automata.drop(slot)
            if slot not in self._sequences and data.draw(st.integers(0, 3), "start") > 0:
                self._start(data, slot)

    def _start(self, data: st.DataObject, slot: int) -> None:
        key = data.draw(st.sampled_from([None, *self._tables]), "automaton")
        limits = data.draw(LIMITS, "limits")
        output = tuple(data.draw(st.lists(token_ids, max_size=4), "output"))
        state = None if key is None else ConstraintState(self._tables[key], output, limits)
        self._sequences[slot] = Followed(len(output), state)
        tokens = (*PROMPT, *output)
        sampling = SamplingParams(seed=0)
        self._automata.start(
            slot,
            SequenceStart(slot, tokens, len(PROMPT), sampling, constraint=key, constraint_limits=limits),
        )

    def _step(self, data: st.DataObject) -> None:
        if not self._sequences:
            return
        slots = data.draw(st.permutations(sorted(self._sequences)), "slots")
        slots = slots[: data.draw(st.integers(1, len(slots)), "number")]
        drafts = [data.draw(st.lists(token_ids, max_size=3), "drafts") for _ in slots]
        owners = [slot for slot, guesses in zip(slots, drafts, strict=True) for _ in range(len(guesses) + 1)]
        firsts = np.array([owners.index(slot) for slot in owners])
        expected = np.array([token for guesses in drafts for token in (*guesses, NO_DRAFT)])
        prefixes = [guesses[:count] for guesses in drafts for count in range(len(guesses) + 1)]
        positions = np.array(
            [
                self._sequences[slot].num_tokens + len(prefix)
                for slot, prefix in zip(owners, prefixes, strict=True)
            ]
        )
        relations = DraftRows(expected, firsts, {})
        has_drafts = any(drafts) or data.draw(st.booleans(), "as drafts")
        rows = self._automata.rows(np.array(owners), positions, relations if has_drafts else None)
        sampled = [
            token
            if token != NO_DRAFT and data.draw(st.booleans(), "right")
            else data.draw(token_ids, "token")
            for token in expected.tolist()
        ]
        if rows is None:
            assert not any(self._sequences[slot].state for slot in owners)
        else:
            automaton = self._automata.on_device(torch.from_numpy(rows).to(self._device))
            logits = torch.zeros(len(owners), VOCAB, device=self._device)
            self._mask(logits, automaton)
            assert [set(row.isfinite().nonzero()[:, 0].tolist()) for row in logits.cpu()] == [
                self._may_come(slot, prefix) for slot, prefix in zip(owners, prefixes, strict=True)
            ]
            self._advance(automaton, torch.tensor(sampled, device=self._device))
        kept, _ = kept_rows(sampled, relations)
        for slot, token, is_kept in zip(owners, sampled, kept, strict=True):
            if is_kept:
                self._sequences[slot].num_tokens += 1
                if (state := self._sequences[slot].state) is not None:
                    state.push(token)

    def _may_come(self, slot: int, prefix: list[int]) -> set[int]:
        sequence = self._sequences[slot].state
        if sequence is None:
            return set(range(VOCAB))
        return allowed_in(sequence.tables, sequence.after(prefix).state, VOCAB)


THINKS, ANSWERS, CUT, OVER = range(4)
LIMITED = TokenAutomaton(
    (
        AutomatonState(
            forbidden=tuple(range(40, VOCAB)), transitions=((9, ANSWERS),), counted=True, overflow=CUT
        ),
        AutomatonState(allowed=(8, 9, 10), transitions=((8, OVER), (9, THINKS))),
        AutomatonState(allowed=(20,), transitions=((20, ANSWERS),)),
        AutomatonState(allowed=(30,)),
    )
)
STEPS: tuple[tuple[list[int], list[int], list[int]], ...] = (
    ([], [1], [THINKS]),
    ([9, 10], [9, 10, 9], [THINKS, ANSWERS, ANSWERS]),
    # The first draft is wrong; what follows it does not count.
    ([2, 9], [1, 20, 20], [THINKS, CUT, CUT]),
    ([20, 9], [20, 9, 20], [CUT, ANSWERS, CUT]),
    ([], [9], [ANSWERS]),
    ([20, 8], [20, 8, 30], [CUT, ANSWERS, OVER]),
    ([], [30], [OVER]),
)
"""(drafts, tokens sampled after each, states in which they are) of a sequence of LIMITED that may
have three counted tokens."""
MAX_LENGTH = 4


def follow_limits(
    mask: Callable[[Tensor, AutomatonRows], None],
    advance: Callable[[AutomatonRows, Tensor], None],
    device: torch.device,
) -> None:
    """Take STEPS beside a sequence that thinks until it has MAX_LENGTH tokens."""
    constraint = Constraint.of(LIMITED)
    followed = Automata(2, device)
    followed.update([(constraint.id, constraint.body)], [])
    for slot, limits in enumerate((ConstraintLimits(3), ConstraintLimits(None, MAX_LENGTH))):
        start = SequenceStart(
            slot, PROMPT, 3, SamplingParams(seed=0), constraint=constraint.id, constraint_limits=limits
        )
        followed.start(slot, start)
    tables = AutomatonTables(constraint.body)
    num_tokens = 0
    for step, (drafts, sampled, states) in enumerate(STEPS):
        count = len(sampled)
        relations = DraftRows(np.array([NO_DRAFT, *drafts, NO_DRAFT]), np.array([0, *[1] * count]), {})
        positions = np.array([step, *range(num_tokens, num_tokens + count)])
        rows = followed.rows(np.array([1, *[0] * count]), positions, relations)
        assert rows is not None
        automaton = followed.on_device(torch.from_numpy(rows).to(device))
        logits = torch.zeros(1 + count, VOCAB, device=device)
        mask(logits, automaton)
        for row, state in enumerate((THINKS if step < MAX_LENGTH else CUT, *states)):
            wanted = allowed_in(tables, state, VOCAB)
            assert set(logits[row].isfinite().nonzero()[:, 0].tolist()) == wanted, (drafts, sampled, row)
        tokens = [5, *sampled]
        advance(automaton, torch.tensor(tokens, device=device))
        _, (_, num_kept) = kept_rows(tokens, relations)
        num_tokens += num_kept
