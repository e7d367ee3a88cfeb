"""The replicas' infos: each replica is asked what it serves when it joins the list."""

import asyncio
from collections.abc import Callable

from cluster.fleet.client import EngineClient
from cluster.fleet.directory import ReplicaSet
from cluster.fleet.table import Replica
from workers.errors import CantataError
from workers.rpc.convert import EngineInfo

_PROBE_TIMEOUT_S = 5.0
_PROBE_PERIOD_S = 0.1
_MAX_PROBES = 100
"""Maximum number of probes of a new replica. One that does not answer is asked again when the list
changes."""


class ReplicaInfos:
    """Asks each new replica what it serves. The service promises the shortest context among them:
    without max_model_len each engine takes what its memory allows.

    Args:
        use: called with the info of the replica with the shortest context whenever it may have
            changed.
    """

    def __init__(self, replicas: ReplicaSet, client: EngineClient, use: Callable[[EngineInfo], None]) -> None:
        self._replicas = replicas
        self._client = client
        self._use = use
        self._known: dict[Replica, EngineInfo] = {}
        self._asking: dict[Replica, asyncio.Task[None]] = {}
        self._latest: EngineInfo | None = None
        self._answered = asyncio.Event()

    async def first(self) -> EngineInfo:
        """Wait for the first answer, and briefly for those of other replicas being asked; return
        what the service promises."""
        await self._answered.wait()
        if self._asking:
            await asyncio.wait(list(self._asking.values()), timeout=_PROBE_TIMEOUT_S)
        assert self._latest is not None
        return self._latest

    def look(self) -> None:
        """Compare the list of replicas: forget those that have left, ask those that are new."""
        listed = self._replicas.known()
        self._known = {replica: info for replica, info in self._known.items() if replica in listed}
        for replica in listed:
            if replica not in self._known and replica not in self._asking:
                self._asking[replica] = asyncio.ensure_future(self._ask(replica))
        if self._known:
            self._latest = min(self._known.values(), key=lambda info: info.max_model_len)
            self._use(self._latest)
            self._answered.set()

    async def _ask(self, replica: Replica) -> None:
        info = None
        try:
            for _ in range(_MAX_PROBES):
                if replica not in self._replicas.known():
                    return
                try:
                    info = await self._client.info(replica, _PROBE_TIMEOUT_S)
                except CantataError:
                    await asyncio.sleep(_PROBE_PERIOD_S)
                else:
                    break
        finally:
            del self._asking[replica]
        if info is not None:
            self._known[replica] = info
            self.look()  # the replica may have left meanwhile
