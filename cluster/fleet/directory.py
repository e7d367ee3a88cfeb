"""A directory of replicas whose list changes: the part that standalone serving and Ray Serve
share."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from cluster.fleet.table import LoadTable, Replica, RoutingHint


class ReplicaSet:
    """A ReplicaDirectory over a list that is replaced from outside, in the gateway's event loop.

    A replica that leaves the list may still be serving: a draining replica finishes its sequences.
    It is gone when its last sequence has ended.
    """

    def __init__(self, loads: LoadTable | None = None) -> None:
        self._replicas: tuple[Replica, ...] = ()
        self._missing: tuple[str, ...] = ()
        self._loads = loads or LoadTable()
        self._on_gone: Callable[[Replica], None] = lambda replica: None
        self._on_change: Callable[[], None] = lambda: None
        self._num_open: Counter[Replica] = Counter()

    def replace(self, replicas: Sequence[Replica], missing: Sequence[str] = ()) -> None:
        """Replace the list of replicas that may get requests. `missing` are the ids of those that
        will return."""
        before, self._replicas = self._replicas, tuple(replicas)
        self._missing = tuple(missing)
        for replica in before:
            if replica not in self._replicas:
                # It gets no more requests. A replica with the same id later is a new process with
                # an empty cache.
                self._loads.gone(replica)
            self._report_if_gone(replica)
        self._on_change()

    def report(self, loads: Mapping[str, int]) -> None:
        """Record the number of sequences that replicas report, by id."""
        self._loads.report(
            {replica.key: loads[replica.id] for replica in self._replicas if replica.id in loads}
        )

    def on_change(self, callback: Callable[[], None]) -> None:
        """Register a callback for each replacement of the list, whether or not its contents
        changed."""
        self._on_change = callback

    def on_gone(self, callback: Callable[[Replica], None]) -> None:
        """Register a callback for each replica that has left the list and whose last sequence has
        ended."""
        self._on_gone = callback

    async def choose(self, hint: RoutingHint, excluded: frozenset[str]) -> Replica:
        """Choose a replica (see ReplicaDirectory)."""
        replica = self._loads.pick(self._replicas, excluded, hint)
        self._num_open[replica] += 1
        return replica

    def release(self, replica: Replica) -> None:
        """Release a replica (see ReplicaDirectory)."""
        self._loads.release(replica)
        self._num_open[replica] -= 1
        if not self._num_open[replica]:
            del self._num_open[replica]
            self._report_if_gone(replica)

    def failed(self, replica: Replica) -> None:
        """Mark a replica as failed (see ReplicaDirectory)."""
        self._loads.failed(replica)

    def silent(self, replica: Replica, is_silent: bool) -> None:
        """Record whether a replica with sequences from here is failing to answer, and avoid it
        while it is."""
        if not is_silent or replica in self._replicas:
            self._loads.silent(replica, is_silent)

    def known(self) -> Sequence[Replica]:
        """Return the replicas of the list (see ReplicaDirectory)."""
        return self._replicas

    def missing(self) -> Sequence[str]:
        """Return the ids of missing replicas (see ReplicaDirectory)."""
        return self._missing

    def _report_if_gone(self, replica: Replica) -> None:
        if replica not in self._num_open and all(
            replica.address != other.address for other in self._replicas
        ):
            self._on_gone(replica)
