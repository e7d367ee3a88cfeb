"""The view that one process of a Ray Serve application has of the others. All use of Ray's private
or alpha interfaces is in this module.

Serve's controller sends every change of a deployment's replicas to its long-poll listeners, which
Serve's own routers use too. An entry carries what the replica returned from
`record_replica_metadata` (for an engine, the address of its gRPC server) and its latest
`record_routing_stats` (how busy it is).
"""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray._private.worker import global_worker
from ray.exceptions import RayError
from ray.serve._private import constants
from ray.serve._private.common import DeploymentID, ReplicaState
from ray.serve._private.long_poll import LongPollClient, LongPollNamespace
from ray.serve.context import _get_global_client
from ray.serve.exceptions import gRPCStatusError
from ray.serve.handle import DeploymentHandle

from cluster.fleet.directory import ReplicaSet
from cluster.fleet.table import Replica
from cluster.metrics import Scrape
from cluster.serve.ray_environment import FAST_INGRESS

ADDRESS_KEY, START_ID_KEY, SECRET_KEY = "engine_address", "engine_start_id", "engine_secret"
"""Keys of an engine's metadata. The secret is for gateways only: metadata is neither logged nor
shown."""
SERVE_LOGGER = "ray.serve"

logger = logging.getLogger(SERVE_LOGGER)

_CONTROLLER_TIMEOUT_S = 30.0
_PAGE_TIMEOUT_S = 2.0
"""Seconds that other processes get to answer, out of the 10 s that a scrape may take."""


class ServeReplicas(ReplicaSet):
    """The ready replicas of the engine deployment, as Serve's controller reports them. Belongs to
    the event loop that created it."""

    def __init__(self, engine: DeploymentHandle[Any]) -> None:
        super().__init__()
        client = _get_global_client()
        assert client is not None, "made outside a replica"
        # Ray's type annotation of the keys omits those that its own routers use.
        listeners: Any = {(LongPollNamespace.DEPLOYMENT_TARGETS, engine.deployment_id): self._update}
        self._poll = LongPollClient(
            client._controller,
            listeners,
            call_in_event_loop=asyncio.get_running_loop(),
            client_id=f"cantata gateway of {engine.deployment_id}",
        )
        self._heard = asyncio.Event()

    async def heard(self) -> None:
        """Wait for the controller's first update. The list is empty until then."""
        await self._heard.wait()

    def stop(self) -> None:
        """Stop listening."""
        self._poll.stop()

    def _update(self, targets: Any) -> None:
        entries = [(info.replica_id.unique_id, info.replica_metadata) for info in targets.running_replicas]
        self.replace(
            [
                Replica(
                    replica_id,
                    metadata[ADDRESS_KEY],
                    metadata.get(START_ID_KEY, ""),
                    metadata.get(SECRET_KEY, ""),
                )
                for replica_id, metadata in entries
                if metadata.get(ADDRESS_KEY)
            ]
        )
        self.report(
            {
                info.replica_id.unique_id: int(
                    info.routing_stats.get("num_running", 0) + info.routing_stats.get("num_waiting", 0)
                )
                for info in targets.running_replicas
            }
        )
        self._heard.set()


class ServeStanding:
    """Tracks whether this gateway is in Serve's list of running gateways.

    Serve stops a replica only after its last request has ended.

    Args:
        on_change: called in the event loop when this gateway enters or leaves the list, with
            whether it is listed and the number of other gateways.
    """

    def __init__(self, on_change: Callable[[bool, int], None]) -> None:
        context, client = serve.get_replica_context(), _get_global_client()
        assert client is not None, "made outside a replica"
        self._id = context.replica_id.unique_id
        self._on_change = on_change
        self._counted = False
        self._controller = client._controller
        self._own = own = DeploymentID(name=context.deployment, app_name=context.app_name)
        listeners: Any = {(LongPollNamespace.DEPLOYMENT_TARGETS, own): self._update}
        self._poll = LongPollClient(
            client._controller,
            listeners,
            call_in_event_loop=asyncio.get_running_loop(),
            client_id=f"cantata gateway {self._id}",
        )

    def stop(self) -> None:
        """Stop listening."""
        self._poll.stop()

    async def is_stopping(self) -> bool:
        """Return whether Serve's controller is stopping this gateway.

        A controller that restarts after a crash lists no gateways until it has found them again.
        """
        try:
            async with asyncio.timeout(_PAGE_TIMEOUT_S):
                details = await self._controller.get_serve_instance_details.remote()
            replicas = details["applications"][self._own.app_name]["deployments"][self._own.name]["replicas"]
            states = {str(replica["replica_id"]): replica["state"] for replica in replicas}
            return bool(states.get(self._id) == ReplicaState.STOPPING)
        except KeyError:  # The application is gone. A restarted controller knows this at once.
            return True
        except (TimeoutError, RayError):  # The controller is restarting.
            return False

    def _update(self, targets: Any) -> None:
        ids = {info.replica_id.unique_id for info in targets.running_replicas}
        counted = self._id in ids
        if counted != self._counted:
            self._counted = counted
            self._on_change(counted, len(ids) - counted)


@dataclass(frozen=True, slots=True)
class Listens:
    """Host and port of Serve's HTTP and gRPC."""

    http: tuple[str, int]
    grpc: tuple[str, int]


class ServeFleet:
    """The `cluster.metrics.FleetView` of a gateway replica. Serve reaches all gateways and knows
    how many engines were requested.

    Args:
        engine: the engine deployment.
    """

    def __init__(self, engine: DeploymentHandle[Any]) -> None:
        context = serve.get_replica_context()
        self._engine = engine.deployment_id
        self._id = context.replica_id.unique_id
        self._gateways: DeploymentHandle[Any] = serve.get_deployment_handle(
            context.deployment, context.app_name
        )

    def page(self, text: str) -> Scrape:
        """Return this gateway's metrics, labelled with its id."""
        return Scrape("gateway", "", text, self._id)

    async def gateways(self, own: str) -> Sequence[Scrape]:
        """Return the pages of all gateways (see FleetView), or only `own` if any of them does not
        answer."""
        try:
            answers = await self._gateways.broadcast("metrics_page").results_async(
                timeout_s=_PAGE_TIMEOUT_S, return_exceptions=True
            )
        except Exception as error:  # Serve may raise any exception here; the scrape shows what is available.
            logger.warning("the metrics of the other gateways are missing: %s", type(error).__name__)
            answers = []
        others = [answer for answer in answers if isinstance(answer, Scrape) and answer.gateway != self._id]
        return [self.page(own), *sorted(others, key=lambda scrape: scrape.gateway)]

    async def wanted_replicas(self, num_listed: int) -> int:
        """Return the number of engines requested (see FleetView)."""
        client = _get_global_client()
        assert client is not None, "made outside a replica"
        try:
            async with asyncio.timeout(_PAGE_TIMEOUT_S):
                details = await client._controller.get_serve_instance_details.remote()
            deployments = details["applications"][self._engine.app_name]["deployments"]
            return int(deployments[self._engine.name]["target_num_replicas"])
        except (TimeoutError, KeyError, RayError):  # The controller is restarting.
            return num_listed

    async def listens(self) -> Listens | None:
        """Return where Serve listens; None if its controller does not answer."""
        client = _get_global_client()
        assert client is not None, "made outside a replica"
        try:
            async with asyncio.timeout(_CONTROLLER_TIMEOUT_S):
                details = await client._controller.get_serve_instance_details.remote()
            http, grpc = details["http_options"], details["grpc_options"]
            return Listens((http["host"], http["port"]), (http["host"], grpc["port"]))
        except (TimeoutError, KeyError, TypeError, RayError):
            return None


def end_serve() -> None:
    """End Serve, of a Ray that this process ends next.

    Ray prints that it will call Serve's controller again, without limit, when the controller ends
    as it was asked to: what Ray's processes report is not shown from here on.
    """
    worker: Any = global_worker
    worker.threads_stopped.set()
    worker.gcs_error_subscriber.close()
    worker.listener_thread.join(_PAGE_TIMEOUT_S)
    serve.shutdown()  # type: ignore[no-untyped-call]


def missing_ingress_variables() -> dict[str, str]:
    """Return the variables of FAST_INGRESS that this Ray was started without."""
    in_force = {
        "RAY_SERVE_ENABLE_HA_PROXY": constants.RAY_SERVE_ENABLE_HA_PROXY,
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": constants.RAY_SERVE_THROUGHPUT_OPTIMIZED,
    }
    return {name: value for name, value in FAST_INGRESS.items() if not in_force[name]}


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """An application's settings in the Serve YAML, apart from its `args`.

    Attributes:
        external_scaler_enabled: whether an external scaler is enabled, which makes Serve refuse its
            own autoscaling.
        has_autoscaling_policy: whether the application has an autoscaling policy.
        deployments: options by deployment name; only those that are set.
    """

    external_scaler_enabled: bool
    has_autoscaling_policy: bool
    deployments: Mapping[str, Mapping[str, Any]]


def serve_options(args: Mapping[str, Any]) -> list[ServeOptions]:
    """Return the controller's settings of each application with these `args`; empty without a
    YAML."""
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    if client is None:
        return []
    # The controller lists a YAML's application before it is built. The builder is not told the
    # application's name, and its import path can be spelled in several ways.
    configs = ray.get(client._controller.get_app_configs.remote(), timeout=_CONTROLLER_TIMEOUT_S)
    return [
        ServeOptions(
            external_scaler_enabled=config.external_scaler_enabled,
            has_autoscaling_policy=config.autoscaling_policy is not None,
            deployments={
                deployment.name: deployment.model_dump(exclude_unset=True)
                for deployment in config.deployments
            },
        )
        for config in configs.values()
        if config.args == args
    ]


def hard_stop_s() -> float:
    """Return the seconds for which HAProxy keeps streams that began before its last reload,
    assuming that all nodes were started like this one."""
    return (
        float(constants.RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S)
        if constants.RAY_SERVE_ENABLE_HA_PROXY
        else math.inf
    )


class RefusedCall(Exception):
    """Raised to end a gRPC method of a deployment after its status was set on Serve's context."""


class _RefusalFilter(logging.Filter):
    """Logging filter that drops Serve's traceback of a RefusedCall: a client's mistake is not a
    server failure."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(
            error.original_exception if isinstance(error, gRPCStatusError) else error, RefusedCall
        )


def quiet_refusals() -> None:
    """Install the filter in this process, once."""
    serve_logger = logging.getLogger(SERVE_LOGGER)
    if not any(isinstance(installed, _RefusalFilter) for installed in serve_logger.filters):
        serve_logger.addFilter(_RefusalFilter())
