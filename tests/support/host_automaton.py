"""An automaton that is followed token by token on the host: what devices and engines are compared
with."""

from collections.abc import Iterable

from workers.constraint.automaton import NO_LIMITS, ConstraintLimits
from workers.constraint.state import AutomatonTables, Place


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


def allowed_in(tables: AutomatonTables, state: int, vocab_size: int) -> set[int]:
    """Return the tokens that may come next."""
    entry = tables.states[state]
    return set(entry.allowed) if entry.restrict else set(range(vocab_size)) - set(entry.forbidden)
