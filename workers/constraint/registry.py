"""Automata by id: those known to an engine, so that gateways send each once, and those held by its
ranks, so that plans carry each once."""

from collections import OrderedDict

from workers.constraint.codec import Constraint

MAX_KNOWN_BYTES = 64 * 1024 * 1024
"""Maximum bytes of encoded automata that an engine remembers."""
MAX_HELD_BYTES = 64 * 1024 * 1024
"""Maximum bytes of encoded automata that ranks keep beyond those in use; rank 0's tables take a few
times as much."""


class KnownAutomata:
    """Automata that an engine has received; the least recently used is dropped first. Belongs to
    the thread that serves requests.

    Args:
        max_bytes: maximum size of all bodies.
    """

    def __init__(self, max_bytes: int = MAX_KNOWN_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._known: OrderedDict[bytes, Constraint] = OrderedDict()

    def get(self, automaton_id: bytes) -> Constraint | None:
        """Return the automaton; None if it is unknown, or no longer kept."""
        constraint = self._known.get(automaton_id)
        if constraint is not None:
            self._known.move_to_end(automaton_id)
        return constraint

    def add(self, constraint: Constraint) -> None:
        """Add an automaton that was checked."""
        if constraint.id not in self._known:
            self._known[constraint.id] = constraint
            self._num_bytes += len(constraint.body)
        while self._num_bytes > self._max_bytes:
            _, forgotten = self._known.popitem(last=False)
            self._num_bytes -= len(forgotten.body)


class HeldAutomata:
    """The automata that the ranks hold, decided by the scheduler for all of them.

    Args:
        max_bytes: maximum size of all bodies, as far as running sequences allow.
    """

    def __init__(self, max_bytes: int = MAX_HELD_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._num_users: dict[bytes, int] = {}
        self._size_of: dict[bytes, int] = {}
        # Held, but used by no running sequence; the least recently used first.
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        self._new: list[tuple[bytes, bytes]] = []

    @property
    def num_bytes(self) -> int:
        """Size of all held bodies in bytes."""
        return self._num_bytes

    def use(self, constraint: Constraint) -> None:
        """Note that a sequence with this automaton starts with the next plan."""
        key = constraint.id
        if key not in self._size_of:
            self._new.append((key, constraint.body))
            self._size_of[key] = len(constraint.body)
            self._num_bytes += len(constraint.body)
        self._idle.pop(key, None)
        self._num_users[key] = self._num_users.get(key, 0) + 1

    def release(self, constraint: Constraint) -> None:
        """Note that a sequence for which `use` was called no longer runs."""
        key = constraint.id
        self._num_users[key] -= 1
        if not self._num_users[key]:
            del self._num_users[key]
            self._idle[key] = None

    def take_changes(self) -> tuple[tuple[tuple[bytes, bytes], ...], tuple[bytes, ...]]:
        """Return the changes for the next plan: ((id, body) of new automata, ids of those to drop
        before)."""
        if not self._new:
            return (), ()
        dropped = []
        while self._num_bytes > self._max_bytes and self._idle:
            key, _ = self._idle.popitem(last=False)
            self._num_bytes -= self._size_of.pop(key)
            dropped.append(key)
        new, self._new = tuple(self._new), []
        return new, tuple(dropped)
