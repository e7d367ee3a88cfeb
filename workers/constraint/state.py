"""States of sequences in their automata during generation, on rank 0, which samples."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from workers.constraint.automaton import NO_LIMITS, ConstraintLimits
from workers.constraint.codec import parse

Ints = npt.NDArray[np.int64]


class AutomatonTables:
    """An automaton in the form that the sampler reads. The tables of a state are built when the
    first sequence enters it, and shared by all sequences.

    Args:
        body: the encoded automaton, checked by the engine.
    Attributes:
        grammars: those of its states, as llguidance reads them.
    """

    def __init__(self, body: bytes) -> None:
        message = parse(body)
        self.start = message.start
        self.states = message.states
        self.grammars = tuple(message.grammars)
        self._allowed: dict[int, Ints | None] = {}
        self._forbidden: dict[int, Ints] = {}
        self._next: dict[int, dict[int, int]] = {}

    def allowed(self, state: int) -> Ints | None:
        """Return the only ids that may come next; None for all but the forbidden ones."""
        if state not in self._allowed:
            entry = self.states[state]
            self._allowed[state] = np.array(entry.allowed, dtype=np.int64) if entry.restrict else None
        return self._allowed[state]

    def forbidden(self, state: int) -> Ints:
        """Return the ids that may not come next. Valid only where `allowed` is None."""
        if state not in self._forbidden:
            self._forbidden[state] = np.array(self.states[state].forbidden, dtype=np.int64)
        return self._forbidden[state]

    def begin(self, output: Iterable[int], limits: ConstraintLimits) -> "Place":
        """Return the place of a sequence after its output so far."""
        place = self._overflowed(Place(self.start), limits)
        for token_id in output:
            place = self.advance(place, token_id, limits)
        return place

    def advance(self, place: "Place", token_id: int, limits: ConstraintLimits) -> "Place":
        """Return the place after one more token."""
        state = place.state
        following = self._next.get(state)
        if following is None:
            # Reversed, because of several transitions for one token the first counts.
            entries = reversed(self.states[state].transitions)
            following = self._next[state] = {entry.token_id: entry.state for entry in entries}
        return self._overflowed(
            Place(
                following.get(token_id, state),
                place.num_counted + self.states[state].counted,
                place.num_tokens + 1,
            ),
            limits,
        )

    def _overflowed(self, place: "Place", limits: ConstraintLimits) -> "Place":
        state = self.states[place.state]
        if not state.HasField("overflow") or not place.reaches(limits):
            return place
        return replace(place, state=state.overflow)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sequence is in its automaton.

    Attributes:
        num_counted: number of output tokens that came in counted states.
        num_tokens: number of output tokens.
    """

    state: int
    num_counted: int = 0
    num_tokens: int = 0

    def reaches(self, limits: ConstraintLimits) -> bool:
        """Return whether a limit is reached."""
        return (limits.max_counted_tokens is not None and self.num_counted >= limits.max_counted_tokens) or (
            limits.max_length is not None and self.num_tokens >= limits.max_length
        )


class ConstraintState:
    """The place of one sequence, advanced token by token.

    Args:
        output: the sequence's output tokens so far.
    """

    def __init__(
        self, tables: AutomatonTables, output: Iterable[int], limits: ConstraintLimits = NO_LIMITS
    ) -> None:
        self.tables = tables
        self._limits = limits
        self.place = tables.begin(output, limits)

    def push(self, token_id: int) -> None:
        """Advance by one output token."""
        self.place = self.tables.advance(self.place, token_id, self._limits)

    def after(self, token_ids: Iterable[int]) -> Place:
        """Return the place after these further tokens, without a change to this one."""
        place = self.place
        for token_id in token_ids:
            place = self.tables.advance(place, token_id, self._limits)
        return place
