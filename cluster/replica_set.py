"""A directory of replicas whose list changes: what standalone serving and Ray Serve have in common."""

from collections.abc import Callable, Sequence

from cluster.router.table import LoadTable, Replica, RoutingHint


class ReplicaSet:
    """A ReplicaDirectory over a list that is replaced from outside, in the gateway's event loop."""

    def __init__(self, loads: LoadTable | None = None) -> None:
        self._replicas: tuple[Replica, ...] = ()
        self._loads = loads or LoadTable()
        self._on_gone: Callable[[Replica], None] = lambda replica: None

    def replace(self, replicas: Sequence[Replica]) -> None:
        """From now on these are all. Sequences in flight on one that is not among them are left to end or fail."""
        addresses = {replica.address for replica in replicas}
        gone = [replica for replica in self._replicas if replica.address not in addresses]
        self._replicas = tuple(replicas)
        for replica in gone:
            self._on_gone(replica)

    def on_gone(self, callback: Callable[[Replica], None]) -> None:
        """Call this with each replica whose address is no longer in use."""
        self._on_gone = callback

    async def choose(self, hint: RoutingHint, excluded: frozenset[str]) -> Replica:
        """See ReplicaDirectory."""
        return self._loads.pick(self._replicas, excluded)

    def release(self, replica: Replica) -> None:
        """See ReplicaDirectory."""
        self._loads.release(replica)

    def failed(self, replica: Replica) -> None:
        """See ReplicaDirectory."""
        self._loads.failed(replica)

    def known(self) -> Sequence[Replica]:
        """See ReplicaDirectory."""
        return self._replicas
