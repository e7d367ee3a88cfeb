"""States of sequences in their automata during generation, on rank 0, which samples."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from workers.constraint.codec import parse

Ints = npt.NDArray[np.int64]


class AutomatonTables:
    """An automaton in the form that the sampler reads. The tables of a state are built when the
    first sequence enters it, and shared by all sequences.

    Args:
        body: the encoded automaton, checked by the engine.
    """

    def __init__(self, body: bytes) -> None:
        message = parse(body)
        self.start = message.start
        self._states = message.states
        self._allowed: dict[int, Ints | None] = {}
        self._forbidden: dict[int, Ints] = {}
        self._next: dict[int, dict[int, int]] = {}

    def allowed(self, state: int) -> Ints | None:
        """Return the only ids that may come next; None for all but the forbidden ones."""
        if state not in self._allowed:
            entry = self._states[state]
            self._allowed[state] = np.array(entry.allowed, dtype=np.int64) if entry.restrict else None
        return self._allowed[state]

    def forbidden(self, state: int) -> Ints:
        """Return the ids that may not come next. Valid only where `allowed` is None."""
        if state not in self._forbidden:
            self._forbidden[state] = np.array(self._states[state].forbidden, dtype=np.int64)
        return self._forbidden[state]

    def advance(self, state: int, token_ids: Iterable[int]) -> int:
        """Return the state after these tokens."""
        for token_id in token_ids:
            following = self._next.get(state)
            if following is None:
                # Reversed, because of several transitions for one token the first counts.
                entries = reversed(self._states[state].transitions)
                following = self._next[state] = {entry.token_id: entry.state for entry in entries}
            state = following.get(token_id, state)
        return state


class ConstraintState:
    """The state of one sequence.

    Args:
        output: the sequence's output tokens so far.
    """

    def __init__(self, tables: AutomatonTables, output: Iterable[int]) -> None:
        self.tables = tables
        self.state = tables.advance(tables.start, output)

    def push(self, token_id: int) -> None:
        """Advance by one output token."""
        self.state = self.tables.advance(self.state, (token_id,))

    def after(self, token_ids: Iterable[int]) -> int:
        """Return the state after these further tokens, without a change to this one."""
        return self.tables.advance(self.state, token_ids)
