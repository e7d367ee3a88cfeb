"""The gateway deployment, which is Serve's ingress: HTTP through the FastAPI app, gRPC through
methods that Serve calls by name."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

import grpc
from fastapi import FastAPI
from grpc_health.v1 import health_pb2
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle

from cluster.assembly import build_gateway, capacity, chat_defaults, load_encoding
from cluster.config import AppConfig, with_private_settings
from cluster.frontend.app import build_app
from cluster.frontend.grpc_api import SERVICE_NAME, InferenceServicer
from cluster.frontend.grpc_handlers import ReceivedHere, decoded
from cluster.metrics import Scrape
from cluster.rpc import inference_pb2 as pb
from cluster.run_time_settings import reconfigured
from cluster.serve.cluster_view import (
    SERVE_LOGGER,
    RefusedCall,
    ServeFleet,
    ServeReplicas,
    ServeStanding,
    hard_stop_s,
    missing_ingress_variables,
    quiet_refusals,
)
from cluster.serve.ray_environment import HAPROXY_HARD_STOP_S
from cluster.serve.room import num_hosts, replica_bundles, shortage
from cluster.serve.shared_secret import with_shared_secret
from cluster.state.settings import location
from cluster.state.state import open_state
from cluster.summary import address
from cluster.ways_of_serving import DRAIN_S
from workers.errors import ConfigError, InvalidRequest
from workers.rpc.convert import EngineInfo

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]

logger = logging.getLogger(SERVE_LOGGER)

_MAX_UNSENT_EVENTS = 16
_FIRST_WORD_S = 5.0
"""Seconds that a new gateway waits for Serve's list of engines and for their answers."""
_STANDING_PERIOD_S = 2.0
"""Seconds between two checks of whether this gateway is being stopped."""
_REPORT_PERIOD_S = 60.0
"""Seconds between two log lines that report what is missing while no engine serves."""


class GatewayReplica:
    """One replica of the deployment `gateway`. `serve.ingress()` turns the class into an ASGI app.

    Args:
        engine: the engine deployment. Only its identity is used: requests go to the engines' own
            servers.
    """

    async def __init__(self, engine: DeploymentHandle[Any], config: AppConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        quiet_refusals()
        _warn_of_environment(config)
        config = await with_shared_secret(with_private_settings(config))
        self._config = config
        self._configured = False
        self._replicas = ServeReplicas(engine)
        self._fleet = ServeFleet(engine)
        place = location(config.state, several_hosts=num_hosts() > 1)
        self._state = await open_state(place, config.state)
        gateway, self._infos = build_gateway(
            config, load_encoding(config), self._replicas, self._fleet, self._state
        )
        self._service, self._status = gateway.service, gateway.status
        self._servicer = InferenceServicer(self._service, config.gateway)
        self._ending: asyncio.Task[None] | None = None
        self._standing = ServeStanding(self._note_standing)
        self._watching = asyncio.create_task(_watch_engines(self._replicas, config))
        self._announcing = asyncio.create_task(self._announce())
        # A gateway that replaces another should know the engines before it gets requests. The first
        # gateway has none to wait for.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_WORD_S):
                await self._replicas.heard()
                if self._replicas.known():
                    await self._infos.first()

    async def reconfigure(self, user_config: object) -> None:
        """Apply the YAML's `user_config` at the start and whenever it changes (a hook of Serve).

        Raises:
            ConfigError: it is invalid at the start.
        """
        try:
            gateway = reconfigured(self._config.gateway, user_config)
        except ConfigError as error:
            if not self._configured:
                raise
            # If this raised, Serve would stop this replica and start others that cannot start
            # either.
            logger.error("the gateway keeps its previous settings: %s", error)
            return
        self._service.reconfigure(chat_defaults(gateway), capacity(gateway))
        self._configured = True

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the app that serves HTTP requests (a hook of Serve)."""
        return build_app(
            self._service, self._status, self._config.gateway, state=self._state, server_has_ids=True
        )

    async def engine_info(self) -> EngineInfo:
        """Return what the engines serve, for the start-up summary. Waits until an engine
        answers."""
        return await self._infos.first()

    async def metrics_page(self) -> Scrape:
        """Return this gateway's own metrics, for the gateway that was scraped."""
        return self._fleet.page(self._service.metrics.render())

    async def Chat(
        self, request: bytes | pb.ChatRequest, grpc_context: RayServegRPCContext
    ) -> pb.ChatResponse:
        """Serve cantata.inference.v1.Inference.Chat."""
        with contextlib.suppress(RefusedCall):
            return await self._servicer.Chat(request, _as_context(grpc_context))
        return pb.ChatResponse()

    async def ChatStream(
        self, request: bytes | pb.ChatRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.ChatEvent, None]:
        """Serve cantata.inference.v1.Inference.ChatStream."""
        context = _Context(grpc_context)
        call = asyncio.create_task(context.run(self._servicer.ChatStream(request, cast("Context", context))))
        try:
            while (event := await context.written.get()) is not None:
                yield event
            await call
        except RefusedCall:
            # A proxy of Serve learns the status from a message or an exception, not from the end.
            if not isinstance(request, ReceivedHere):
                raise
        finally:
            # Serve closes this generator when the client disconnects.
            call.cancel()
            await asyncio.wait([call])

    async def ListModels(
        self, request: bytes | pb.ListModelsRequest, grpc_context: RayServegRPCContext
    ) -> pb.ListModelsResponse:
        """Serve cantata.inference.v1.Inference.ListModels."""
        with contextlib.suppress(RefusedCall):
            return await self._servicer.ListModels(request, _as_context(grpc_context))
        return pb.ListModelsResponse()

    async def Check(
        self, request: bytes | health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthCheckResponse:
        """Serve grpc.health.v1.Health.Check: the server as a whole is up; the Inference service is
        SERVING while a replica answers."""
        with contextlib.suppress(RefusedCall):
            return await self._check(request, _Context(grpc_context))
        return health_pb2.HealthCheckResponse()

    async def _check(
        self, request: bytes | health_pb2.HealthCheckRequest, context: "_Context"
    ) -> health_pb2.HealthCheckResponse:
        try:
            request = decoded(request, health_pb2.HealthCheckRequest)
        except InvalidRequest as error:
            self._service.metrics.requests.labels("Health/Check", error.status).inc()
            await context.abort(grpc.StatusCode[error.status], error.message)
        if request.service not in ("", SERVICE_NAME):
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"This server has no service {request.service[:100]!r}."
            )
        serving = request.service == "" or await self._status.ready()
        status = (
            health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self, request: bytes | health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """Refuse grpc.health.v1.Health.Watch, as its definition allows: Serve ends a replica only
        after its last call, and a watch has no end."""
        await _Context(grpc_context).abort(
            grpc.StatusCode.UNIMPLEMENTED, "Watch is not supported; poll Check instead."
        )
        yield health_pb2.HealthCheckResponse()  # makes this method a stream

    async def __del__(self) -> None:
        # Called by Serve at the end of a replica, after its requests; __init__ may not have
        # completed.
        watching = getattr(self, "_watching", None)
        if watching is not None:
            watching.cancel()
            self._announcing.cancel()
            self._replicas.stop()
            self._standing.stop()
            if self._ending is not None:
                self._ending.cancel()
            await self._close_service()
            if self._state is not None:
                await self._state.close()

    async def _announce(self) -> None:
        """Log what is served and where, once an engine serves."""
        info = await self._infos.first()
        found = await self._fleet.listens()
        if found is not None:
            logger.info(
                "This gateway serves %s, up to %d tokens of context: HTTP http://%s/v1, gRPC %s",
                self._config.model_name,
                info.max_model_len,
                address(*found.http),
                address(*found.grpc),
            )

    def _note_standing(self, counted: bool, num_others: int) -> None:
        if self._ending is not None:
            self._ending.cancel()
        grace_s = (
            self._config.gateway_drain_timeout_s
            if num_others
            else min(self._config.gateway_drain_timeout_s, DRAIN_S)
        )
        self._ending = None if counted else asyncio.create_task(self._end_requests(grace_s))

    async def _end_requests(self, grace_s: float) -> None:
        """Wait for running requests, then end the rest with an error, since Serve would cut the
        connections."""
        await asyncio.sleep(grace_s)
        while not await self._standing.is_stopping():  # noqa: ASYNC110 - Serve does not tell
            await asyncio.sleep(_STANDING_PERIOD_S)
        logger.info(
            "this gateway is stopping: requests still running after %g s will end with an error",
            grace_s,
        )
        await self._close_service()

    async def _close_service(self) -> None:
        if self._state is not None:
            await self._state.stop()  # background responses go on elsewhere
        await self._service.close()


def _way_out(config: AppConfig) -> str:
    share = "" if config.engine.device != "cpu" else ", set engine_cpus below 1 so that engines share CPUs,"
    return f"lower engine.parallel.tensor{share} or add nodes"


def _warn_of_environment(config: AppConfig) -> None:
    missing = missing_ingress_variables()
    if missing:
        logger.warning(
            "This Ray runs Serve's slower ingress: about four times the CPU per token. Before Ray is "
            "started on each node, set %s "
            "(`cantata serve` does).",
            " ".join(f"{name}={value}" for name, value in missing.items()),
        )
    if hard_stop_s() < config.gateway_drain_timeout_s:
        logger.warning(
            "gateway_drain_timeout_s is %g, but after %g s HAProxy cuts the streams of a gateway that is "
            "replaced. Before Ray is started "
            "on each node, set RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S to at least as much (`cantata serve` "
            "sets %d).",
            config.gateway_drain_timeout_s,
            hard_stop_s(),
            HAPROXY_HARD_STOP_S,
        )


async def _watch_engines(replicas: ServeReplicas, config: AppConfig) -> None:
    """Log each minute what is missing while no engine serves, since Ray and Serve wait without a
    limit and report little."""
    bundles, without_since = replica_bundles(config), time.monotonic()
    while True:
        await asyncio.sleep(_REPORT_PERIOD_S)
        if replicas.known():
            without_since = time.monotonic()
            continue
        try:
            lack = await asyncio.to_thread(shortage, bundles)
        except Exception:
            logger.exception("Ray did not report its free resources")
            continue
        waited_s = time.monotonic() - without_since
        if lack is not None:
            logger.warning(
                "no engine has been able to start for %.0f s: %s; %s", waited_s, lack, _way_out(config)
            )
        else:
            logger.warning(
                "no engine has served for %.0f s: there is room, so they are loading or failing; see "
                "`serve status`",
                waited_s,
            )


class _Context:
    """The part of grpc.aio.ServicerContext that our servicer uses, on top of Serve's context.

    Attributes:
        written: messages that a streaming method has written and Serve has not yet sent; None marks
            the end.
    """

    def __init__(self, context: RayServegRPCContext) -> None:
        self._context = context
        self.written: asyncio.Queue[pb.ChatEvent | None] = asyncio.Queue(_MAX_UNSENT_EVENTS)

    async def run(self, method: Awaitable[None]) -> None:
        """Run a streaming method to its end, then queue the closing None. Cancelled when the client
        stops reading."""
        try:
            await method
        except asyncio.CancelledError:
            # The client does not read or has disconnected: nothing more is sent.
            while not self.written.empty():
                self.written.get_nowait()
            self.written.put_nowait(None)
            raise
        except Exception:
            await self.written.put(None)
            raise
        await self.written.put(None)

    async def write(self, event: pb.ChatEvent) -> None:
        """Queue one message of a streaming method; wait while Serve is slower than the method."""
        await self.written.put(event)

    async def send_initial_metadata(self, metadata: Sequence[tuple[str, str]]) -> None:
        """Do nothing: Serve's proxy sends them with the first message."""

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        """Return the metadata that the client sent."""
        return [(str(name), str(value)) for name, value in self._context.invocation_metadata()]

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Sequence[tuple[str, str]] = ()
    ) -> NoReturn:
        """End the call with a status, by raising RefusedCall.

        Serve sends the status in its context when the method returns. When the method raises, it
        omits the trailing metadata.
        """
        self._context.set_code(code)
        self._context.set_details(details)
        self._context.set_trailing_metadata([*self._context.trailing_metadata(), *trailing_metadata])
        raise RefusedCall(code.name)


def _as_context(context: RayServegRPCContext) -> "Context":
    return cast("Context", _Context(context))
