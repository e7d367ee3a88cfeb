"""Token automata on rank 0's device: their tables, and where each sequence is in its own.

The host knows a sequence's place only until its first token is sampled; from then on the place
lives on the device, which advances it with each sampled token. So no step waits for the tokens of
the step before.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kernels.automaton.layout import (
    NO_STATE,
    NUM_ROW_VECTORS,
    ON_DEVICE,
    UNLIMITED,
    AutomatonRows,
    Row,
    StateLists,
    Words,
    pack,
)
from workers.constraint.automaton import ConstraintLimits
from workers.constraint.state import AutomatonTables
from workers.rank.drafts import NO_DRAFT, DraftRows
from workers.scheduler.plan import SequenceStart

Ints = npt.NDArray[np.int64]
Ints32 = npt.NDArray[np.int32]

_LEAST_WORDS = 1 << 16
_NONE = -1


class AutomatonMemory:
    """The words of automata in one tensor, which is replaced when it is full.

    Attributes:
        words: [W] int32, see `kernels.automaton.layout`.
    """

    def __init__(self, device: torch.device) -> None:
        self.words = torch.zeros(_LEAST_WORDS, dtype=torch.int32, device=device)
        self._spans: dict[bytes, range] = {}
        self._end = 0

    def __getitem__(self, automaton_id: bytes) -> int:
        """Return the index of an automaton's first word."""
        return self._spans[automaton_id].start

    def add(self, automaton_id: bytes, words: Words) -> bool:
        """Copy an automaton to the device, in stream order. Return whether others were moved."""
        moves = self._end + len(words) > len(self.words)
        if moves:
            self._make_room(len(words))
        span = range(self._end, self._end + len(words))
        source = torch.from_numpy(words)
        if self.words.device.type != "cpu":
            # The copy of pageable memory would wait for the steps in flight.
            source = source.pin_memory()
        self.words[span.start : span.stop].copy_(source, non_blocking=True)
        self._spans[automaton_id] = span
        self._end = span.stop
        return moves

    def drop(self, automaton_id: bytes) -> None:
        """Forget an automaton."""
        del self._spans[automaton_id]

    def _make_room(self, num_words: int) -> None:
        """Move all automata to the beginning of a new tensor with room for as many words again.
        Steps in flight read the old one, whose memory is reused in stream order."""
        in_use = num_words + sum(map(len, self._spans.values()))
        old, self._end = self.words, 0
        self.words = torch.zeros(max(2 * in_use, _LEAST_WORDS), dtype=torch.int32, device=old.device)
        for automaton_id, span in self._spans.items():
            moved = self._spans[automaton_id] = range(self._end, self._end + len(span))
            self.words[moved.start : moved.stop] = old[span.start : span.stop]
            self._end = moved.stop


class Automata:
    """The automata that a rank holds, and the places of its sequences by slot.

    Args:
        max_num_seqs: number of slots.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self._memory = AutomatonMemory(device)
        self._tables: dict[bytes, AutomatonTables] = {}
        self._places = torch.zeros((max_num_seqs, 2), dtype=torch.int32, device=device)
        self._of_slot: list[bytes | None] = [None] * max_num_seqs
        self._base = np.full(max_num_seqs, _NONE, dtype=np.int64)
        # The place where a sequence starts; its state is ON_DEVICE once a token was sampled.
        self._state = np.zeros(max_num_seqs, dtype=np.int32)
        self._num_counted = np.zeros(max_num_seqs, dtype=np.int32)
        self._max_counted = np.zeros(max_num_seqs, dtype=np.int32)
        self._max_length = np.zeros(max_num_seqs, dtype=np.int32)

    def update(self, new: Sequence[tuple[bytes, bytes]], dropped: Sequence[bytes]) -> None:
        """Drop and add automata, as listed in `StepPlan`."""
        for automaton_id in dropped:
            del self._tables[automaton_id]
            self._memory.drop(automaton_id)
        for automaton_id, body in new:
            tables = self._tables[automaton_id] = AutomatonTables(body)
            if self._memory.add(automaton_id, packed(tables)):
                self._base[:] = [_NONE if key is None else self._memory[key] for key in self._of_slot]

    def start(self, slot: int, start: SequenceStart) -> None:
        """Add a sequence with its output so far."""
        key = start.constraint
        if key is None:
            return
        limits = start.constraint_limits
        place = self._tables[key].begin(start.token_ids[start.num_prompt_tokens :], limits)
        self._of_slot[slot] = key
        self._base[slot] = self._memory[key]
        self._state[slot], self._num_counted[slot] = place.state, place.num_counted
        self._max_counted[slot], self._max_length[slot] = _bounds(limits)

    def drop(self, slot: int) -> None:
        """Drop a slot's sequence."""
        self._of_slot[slot] = None
        self._base[slot] = _NONE

    def rows(self, slots: Ints, output_positions: Ints, drafts: DraftRows | None = None) -> Ints32 | None:
        """Return `AutomatonRows.rows` of the rows whose sequences have an automaton; None if there
        are none. A token is then sampled after each of them: from here on their places are on the
        device.

        Args:
            slots: [S] slot of each row.
            output_positions: [S] index of each row's next token among its output tokens.
        """
        base = self._base[slots]
        at = np.flatnonzero(base != _NONE)
        if not len(at):
            return None
        slots = slots[at]
        rows = np.empty((NUM_ROW_VECTORS, len(at)), dtype=np.int32)
        rows[Row.ROW], rows[Row.SLOT], rows[Row.BASE] = at, slots, base[at]
        rows[Row.STATE], rows[Row.NUM_COUNTED] = self._state[slots], self._num_counted[slots]
        rows[Row.POSITION] = output_positions[at]
        rows[Row.MAX_COUNTED], rows[Row.MAX_LENGTH] = self._max_counted[slots], self._max_length[slots]
        if drafts is None:
            rows[Row.NUM_DRAFTS], rows[Row.DRAFT] = 0, NO_DRAFT
        else:
            rows[Row.NUM_DRAFTS], rows[Row.DRAFT] = at - drafts.firsts[at], drafts.expected[at]
        self._state[slots] = ON_DEVICE
        return rows

    def on_device(self, rows: torch.Tensor) -> AutomatonRows:
        """Return uploaded `rows` with the tables and places that they refer to."""
        return AutomatonRows(self._memory.words, self._places, rows)


def packed(tables: AutomatonTables) -> Words:
    """Return an automaton's words."""
    states = tables.states
    return pack(
        StateLists(
            forbids=[not state.restrict for state in states],
            tokens=[state.allowed if state.restrict else state.forbidden for state in states],
            next_tokens=[[entry.token_id for entry in state.transitions] for state in states],
            next_states=[[entry.state for entry in state.transitions] for state in states],
            counted=[state.counted for state in states],
            overflow=[state.overflow if state.HasField("overflow") else NO_STATE for state in states],
        )
    )


def _bounds(limits: ConstraintLimits) -> tuple[int, int]:
    return _bound(limits.max_counted_tokens), _bound(limits.max_length)


def _bound(limit: int | None) -> int:
    return UNLIMITED if limit is None else min(limit, UNLIMITED)
