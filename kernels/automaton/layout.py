"""The layout of token automata on a device, and the rows of a step that follow one.

An automaton is a run of 32-bit words anywhere in one tensor; indices in it count from its beginning
(BASE of a row). It begins with STATE_WORDS words for each state, `State`. The set of a state's
tokens is sparse: only words of 32 tokens that are not empty are stored. A set of n such words is n
indices, ascending, then n bitmasks: bit i of the word with index w is token 32 * w + i. Transitions
are n token ids, ascending and distinct, then the n states that follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]

UNLIMITED = 2**31 - 1
"""Value of a limit that is never reached."""
ON_DEVICE = -1
"""STATE of a row whose place is that of its slot."""
NO_STATE = -1
FORBIDS, COUNTED = 1, 2
"""Bits of `State.FLAGS`: whether the set's tokens are forbidden, all others being allowed, instead
of the other way round; and whether tokens that come in the state are counted."""


class State(IntEnum):
    """The words of a state.

    FLAGS: sum of FORBIDS and COUNTED. OVERFLOW: state that is entered in its place at a limit, or
    NO_STATE. SET, SET_SIZE: index of its set, number of words of 32 tokens. NEXT, NEXT_SIZE: index
    of its transitions, and their number.
    """

    FLAGS = 0
    OVERFLOW = 1
    SET = 2
    SET_SIZE = 3
    NEXT = 4
    NEXT_SIZE = 5


STATE_WORDS = len(State)


class Row(IntEnum):
    """The vectors of `AutomatonRows.rows`.

    ROW: row of the logits. SLOT: where its sequence's place is kept. BASE: index of its automaton's
    first word. STATE, NUM_COUNTED: its place, where the host knows it; else ON_DEVICE, and
    anything. POSITION: number of output tokens before the one to sample. MAX_COUNTED, MAX_LENGTH:
    limits at which states overflow, or UNLIMITED. NUM_DRAFTS: number of rows of the same sequence
    just before this one, each of which computes a draft. DRAFT: the token that the next row
    assumes to follow this row; negative in the last row of a sequence.
    """

    ROW = 0
    SLOT = 1
    BASE = 2
    STATE = 3
    NUM_COUNTED = 4
    POSITION = 5
    MAX_COUNTED = 6
    MAX_LENGTH = 7
    NUM_DRAFTS = 8
    DRAFT = 9


NUM_ROW_VECTORS = len(Row)


@dataclass(frozen=True, slots=True)
class AutomatonRows:
    """The rows of a batch that follow an automaton, all rows of a sequence one after the other.

    Attributes:
        words: [W] int32: automata.
        places: [num_slots, 2] int32: state and number of counted tokens of each slot's sequence.
            `advance` changes it.
        rows: [NUM_ROW_VECTORS, n] int32, see `Row`.
    """

    words: Tensor
    places: Tensor
    rows: Tensor

    @property
    def num_rows(self) -> int:
        return int(self.rows.shape[1])

    def check_shapes(self) -> None:
        """Check shapes and dtypes.

        Raises:
            ValueError: names the field.
        """
        for name, tensor, shape in (
            ("words", self.words, (len(self.words),)),
            ("places", self.places, (len(self.places), 2)),
            ("rows", self.rows, (NUM_ROW_VECTORS, self.rows.shape[-1])),
        ):
            if tuple(tensor.shape) != shape or tensor.dtype != torch.int32 or not tensor.is_contiguous():
                raise ValueError(
                    f"automaton.{name} must be contiguous {list(shape)} int32, got shape "
                    f"{list(tensor.shape)} of {tensor.dtype}"
                )

    def check(self, num_rows: int) -> None:
        """Check shapes, dtypes, and the range of rows, slots and first words.

        Raises:
            ValueError: names the field.
        """
        self.check_shapes()
        if not self.num_rows:
            return
        bounds = {Row.ROW: num_rows, Row.SLOT: len(self.places), Row.BASE: len(self.words)}
        # By numpy, as this runs in each step on a CPU: the first vectors are those checked.
        checked = self.rows[: len(bounds)].cpu().numpy()
        least, greatest = checked.min(axis=1).tolist(), checked.max(axis=1).tolist()
        for vector, bound in bounds.items():
            if not 0 <= least[vector] <= greatest[vector] < bound:
                raise ValueError(
                    f"automaton.rows[{vector.name}] must be from 0 to {bound - 1}, found "
                    f"{least[vector]} to {greatest[vector]}"
                )


@dataclass(frozen=True, slots=True)
class StateLists:
    """The states of an automaton as lists; each attribute has one entry for each state.

    Attributes:
        forbids: whether `tokens` are the forbidden ones instead of the allowed ones.
        tokens: token ids in any order.
        next_tokens, next_states: transitions; of several for one token the first counts.
        counted: as in `State.FLAGS`.
        overflow: a state or NO_STATE.
    """

    forbids: Sequence[bool]
    tokens: Sequence[Sequence[int]]
    next_tokens: Sequence[Sequence[int]]
    next_states: Sequence[Sequence[int]]
    counted: Sequence[bool]
    overflow: Sequence[int]


def pack(states: StateLists) -> Words:
    """Return the words of an automaton."""
    num_states = len(states.forbids)
    set_sizes, set_words = _sets(states.tokens)
    next_sizes, next_words = _transitions(states.next_tokens, states.next_states)
    head = np.zeros((num_states, STATE_WORDS), dtype=np.int64)
    head[:, State.FLAGS] = FORBIDS * np.array(states.forbids) + COUNTED * np.array(states.counted)
    head[:, State.OVERFLOW] = states.overflow
    head[:, State.SET_SIZE], head[:, State.NEXT_SIZE] = set_sizes, next_sizes
    head[:, State.SET] = head.size + 2 * (np.cumsum(set_sizes) - set_sizes)
    head[:, State.NEXT] = head.size + len(set_words) + 2 * (np.cumsum(next_sizes) - next_sizes)
    return np.concatenate((head.reshape(-1), set_words, next_words)).astype(np.int32)


def rows_that_allow_all(num_rows: int, device: torch.device) -> AutomatonRows:
    """Return rows of as many sequences, all in an automaton of one state, in which any token may
    come: for steps that only compile kernels or measure memory."""
    words = pack(StateLists([True], [[]], [[]], [[]], [False], [NO_STATE]))
    rows = torch.zeros(NUM_ROW_VECTORS, num_rows, dtype=torch.int32)
    rows[Row.ROW] = rows[Row.SLOT] = torch.arange(num_rows, dtype=torch.int32)
    rows[Row.MAX_COUNTED] = rows[Row.MAX_LENGTH] = UNLIMITED
    rows[Row.DRAFT] = -1
    places = torch.zeros(num_rows, 2, dtype=torch.int32, device=device)
    return AutomatonRows(torch.from_numpy(words).to(device), places, rows.to(device))


def _sets(tokens: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    """Return the number of words of each set, and all sets one after the other."""
    owners, ids = _flat(tokens)
    keys = owners << 32 | ids >> 5
    order = np.argsort(keys, kind="stable")
    keys, bits = keys[order], np.int64(1) << (ids[order] & 31)
    firsts = np.flatnonzero(np.diff(keys, prepend=-1))
    masks = np.bitwise_or.reduceat(bits, firsts) if len(firsts) else bits
    # The same 32 bits as a signed number.
    masks = masks.astype(np.uint32).view(np.int32).astype(np.int64)
    keys = keys[firsts]
    return _side_by_side(keys >> 32, keys & 0xFFFFFFFF, masks, len(tokens))


def _transitions(tokens: Sequence[Sequence[int]], following: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    """Return the number of each state's transitions, and all of them one state after the other."""
    owners, ids = _flat(tokens)
    _, targets = _flat(following)
    keys = owners << 32 | ids
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    firsts = np.flatnonzero(np.diff(keys, prepend=-1))
    keys, targets = keys[firsts], targets[order][firsts]
    return _side_by_side(keys >> 32, keys & 0xFFFFFFFF, targets, len(tokens))


def _flat(lists: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    """Return (index of the list, value) of all values."""
    sizes = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
    values = np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=int(sizes.sum()))
    return np.repeat(np.arange(len(lists)), sizes), values


def _side_by_side(owners: Ints, first: Ints, second: Ints, num_owners: int) -> tuple[Ints, Ints]:
    """Return the number of values of each owner, and for each owner its values of `first`, then
    those of `second`.

    Args:
        owners: ascending.
    """
    sizes = np.bincount(owners, minlength=num_owners)
    # An owner's values of `first` begin after two values for each one before.
    at = np.arange(len(owners)) + (np.cumsum(sizes) - sizes)[owners]
    both = np.empty(2 * len(owners), dtype=np.int64)
    both[at] = first
    both[at + sizes[owners]] = second
    return sizes, both
