"""Places of sequences in their automata, followed on the host: where a sequence starts, and in the
engine the states with grammars."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from workers.constraint.automaton import ConstraintLimits
from workers.constraint.codec import parse


class AutomatonTables:
    """An automaton as it is followed. The transitions of a state are read when the first sequence
    leaves it, and shared by all sequences.

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
        self._next: dict[int, dict[int, int]] = {}

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
