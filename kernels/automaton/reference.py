"""Token automata in torch: the definition that other implementations match.

A place is a state and the number of tokens that came in counted states. The place of a row is that
of its sequence (the host's, or that of its slot), followed over the drafts before the row. After a
token t in state s the count grows by 1 if s is counted; the state is the target of the transition
of s on t, or s itself; and if that state has an overflow, and the count has reached MAX_COUNTED or
the number of output tokens MAX_LENGTH, it is the overflow.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.automaton.layout import (
    COUNTED,
    FORBIDS,
    NO_STATE,
    ON_DEVICE,
    STATE_WORDS,
    AutomatonRows,
    Row,
    State,
)

Place = tuple[int, int]
"""State and number of counted tokens."""


def mask(logits: Tensor, automaton: AutomatonRows) -> None:
    """Set the logits of tokens that may not come to -inf.

    Args:
        logits: [S, V] float; changed.
    Raises:
        ValueError: names the field of a wrong shape, dtype or range.
    """
    automaton.check(len(logits))
    table = _Table(automaton)
    for index, row in enumerate(table.rows):
        state, _ = table.place_before(index)
        flags, size = table.state(row, state, State.FLAGS), table.state(row, state, State.SET_SIZE)
        start = row[Row.BASE] + table.state(row, state, State.SET)
        ids = _ids(automaton.words[start : start + size], automaton.words[start + size : start + 2 * size])
        ids = ids[ids < logits.shape[1]]
        if flags & FORBIDS:
            logits[row[Row.ROW], ids] = -torch.inf
        else:
            kept = logits[row[Row.ROW], ids]
            logits[row[Row.ROW]] = -torch.inf
            logits[row[Row.ROW], ids] = kept


def advance(automaton: AutomatonRows, token_ids: Tensor) -> None:
    """Store the place of each sequence after its newest token: the token sampled in the last row
    whose drafts before it were all sampled.

    Args:
        automaton: `places` is changed.
        token_ids: [S] int64, the tokens sampled in all rows of the batch.
    Raises:
        ValueError: names the field of a wrong shape, dtype or range.
    """
    automaton.check(len(token_ids))
    table = _Table(automaton)
    sampled = token_ids.tolist()
    newest = {}
    for index, row in enumerate(table.rows):
        before = table.rows[index - row[Row.NUM_DRAFTS] : index]
        if all(sampled[other[Row.ROW]] == other[Row.DRAFT] for other in before):
            token = sampled[row[Row.ROW]]
            newest[row[Row.SLOT]] = table.after(row, table.place_before(index), token, row[Row.POSITION] + 1)
    # Afterwards, since rows of the same sequence begin at the place that the slot had before.
    for slot, place in newest.items():
        automaton.places[slot] = torch.tensor(place, dtype=torch.int32)


def _ids(words: Tensor, bits: Tensor) -> Tensor:
    """Return the token ids of a set."""
    shifts = torch.arange(32, device=words.device)
    found = (bits[:, None].long() >> shifts & 1).nonzero()
    return words[found[:, 0]].long() * 32 + found[:, 1]


class _Table:
    """An automaton's words and rows as lists."""

    def __init__(self, automaton: AutomatonRows) -> None:
        self.rows: Sequence[Sequence[int]] = automaton.rows.T.tolist()
        self._words = automaton.words
        self._places = automaton.places

    def state(self, row: Sequence[int], state: int, word: State) -> int:
        """Return a word of a state."""
        return int(self._words[row[Row.BASE] + state * STATE_WORDS + word])

    def place_before(self, index: int) -> Place:
        """Return the place at which a row's token is sampled."""
        row = self.rows[index]
        if row[Row.STATE] == ON_DEVICE:
            state, num_counted = self._places[row[Row.SLOT]].tolist()
        else:
            state, num_counted = row[Row.STATE], row[Row.NUM_COUNTED]
        place = (state, num_counted)
        for before in self.rows[index - row[Row.NUM_DRAFTS] : index]:
            place = self.after(row, place, before[Row.DRAFT], before[Row.POSITION] + 1)
        return place

    def after(self, row: Sequence[int], place: Place, token: int, num_tokens: int) -> Place:
        """Return the place after one more token.

        Args:
            num_tokens: number of output tokens with this one.
        """
        state, num_counted = place
        num_counted += bool(self.state(row, state, State.FLAGS) & COUNTED)
        start, size = self.state(row, state, State.NEXT), self.state(row, state, State.NEXT_SIZE)
        first = row[Row.BASE] + start
        found = (self._words[first : first + size] == token).nonzero()
        if len(found):
            state = int(self._words[first + size + found[0, 0]])
        overflow = self.state(row, state, State.OVERFLOW)
        is_full = num_counted >= row[Row.MAX_COUNTED] or num_tokens >= row[Row.MAX_LENGTH]
        return (overflow if overflow != NO_STATE and is_full else state), num_counted
