"""Readiness of the replicas that a gateway knows, and the metrics of all processes."""

import asyncio

from cluster.fleet.client import EngineClient
from cluster.fleet.table import Replica, ReplicaDirectory
from cluster.metrics import FleetView, GatewayMetrics, OneGateway, Scrape, merge
from workers.errors import CantataError

_PROBE_TIMEOUT_S = 2.0


class FleetStatus:
    """Asks the replicas of a directory.

    Args:
        metrics: this gateway's.
        view: the processes beside this one; None: there is one gateway.
    """

    def __init__(
        self,
        replicas: ReplicaDirectory,
        client: EngineClient,
        metrics: GatewayMetrics,
        view: FleetView | None = None,
    ) -> None:
        self._replicas = replicas
        self._client = client
        self._metrics = metrics
        self._view = view or OneGateway()

    async def ready(self) -> bool:
        """Return whether some replica answers and takes requests."""
        probes = [asyncio.create_task(self._accepting(replica)) for replica in self._replicas.known()]
        try:
            for probe in asyncio.as_completed(probes):
                if await probe:
                    return True
            return False
        finally:
            for task in probes:
                task.cancel()

    async def metrics_text(self) -> str:
        """Join the metrics of every gateway and of every replica that this one knows."""
        known, missing = self._replicas.known(), self._replicas.missing()
        gateways, wanted, engines = await asyncio.gather(
            self._view.gateways(self._metrics.render()),
            self._view.wanted_replicas(len(known) + len(missing)),
            asyncio.gather(*(self._scrape(replica) for replica in known)),
        )
        return merge(
            [*gateways, *engines, *(Scrape("engine", replica_id, None) for replica_id in missing)], wanted
        )

    async def _accepting(self, replica: Replica) -> bool:
        try:
            return (await self._client.load(replica, _PROBE_TIMEOUT_S)).accepting
        except CantataError:
            return False

    async def _scrape(self, replica: Replica) -> Scrape:
        try:
            return Scrape("engine", replica.id, await self._client.metrics(replica, _PROBE_TIMEOUT_S))
        except CantataError:
            return Scrape("engine", replica.id, None)
