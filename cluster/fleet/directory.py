"""A directory of replicas whose list changes: what standalone serving and Ray Serve have in
common."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from cluster.fleet.table import LoadTable, Replica, RoutingHint


class ReplicaSet:
    """A ReplicaDirectory over a list that is replaced from outside, in the gateway's event loop.

    A replica that leaves the list may still be serving: one that drains finishes what it has. It is
    gone when its last sequence is.
    """

    def __init__(self, loads: LoadTable | None = None) -> None:
        self._replicas: tuple[Replica, ...] = ()
        self._missing: tuple[str, ...] = ()
        self._loads = loads or LoadTable()
        self._on_gone: Callable[[Replica], None] = lambda replica: None
        self._on_change: Callable[[], None] = lambda: None
        self._num_open: Counter[Replica] = Counter()

    def replace(self, replicas: Sequence[Replica], missing: Sequence[str] = ()) -> None:
        """From now on these are all that requests may go to; `missing` are the ids of those that
        will be back."""
        before, self._replicas = self._replicas, tuple(replicas)
        self._missing = tuple(missing)
        for replica in before:
            if replica not in self._replicas:
                # It takes no more requests. What comes under this id again is a new process with an
                # empty cache.
                self._loads.gone(replica)
            self._report_if_gone(replica)
        self._on_change()

    def report(self, loads: Mapping[str, int]) -> None:
        """Sequences that replicas say they have, by id."""
        self._loads.report(
            {replica.key: loads[replica.id] for replica in self._replicas if replica.id in loads}
        )

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call this whenever the list has been replaced, by another or by the same."""
        self._on_change = callback

    def on_gone(self, callback: Callable[[Replica], None]) -> None:
        """Call this with each replica that has left the list and has no sequence any more."""
        self._on_gone = callback

    async def choose(self, hint: RoutingHint, excluded: frozenset[str]) -> Replica:
        """See ReplicaDirectory."""
        replica = self._loads.pick(self._replicas, excluded, hint)
        self._num_open[replica] += 1
        return replica

    def release(self, replica: Replica) -> None:
        """See ReplicaDirectory."""
        self._loads.release(replica)
        self._num_open[replica] -= 1
        if not self._num_open[replica]:
            del self._num_open[replica]
            self._report_if_gone(replica)

    def failed(self, replica: Replica) -> None:
        """See ReplicaDirectory."""
        self._loads.failed(replica)

    def silent(self, replica: Replica, is_silent: bool) -> None:
        """A replica with sequences from here does not answer, or does so again: avoid it
        meanwhile."""
        if not is_silent or replica in self._replicas:
            self._loads.silent(replica, is_silent)

    def known(self) -> Sequence[Replica]:
        """See ReplicaDirectory."""
        return self._replicas

    def missing(self) -> Sequence[str]:
        """See ReplicaDirectory."""
        return self._missing

    def _report_if_gone(self, replica: Replica) -> None:
        if replica not in self._num_open and all(
            replica.address != other.address for other in self._replicas
        ):
            self._on_gone(replica)
