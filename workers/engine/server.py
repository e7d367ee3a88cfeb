"""The engine over gRPC: engine.proto, health and reflection, in the asyncio loop of the process or
Ray Serve replica that starts it."""

import asyncio
import importlib.metadata
import logging
import math
import secrets
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from workers.config import BLOCK_SIZE, EngineConfig, ModelConfig, longest_context
from workers.constraint.compiler import COMPILE_TIMEOUT_S, TOO_SLOW, PreparedConstraint
from workers.constraint.registry import KnownAutomata
from workers.engine.access import SecretInterceptor, check_address, close_to_others
from workers.engine.engine import Engine
from workers.engine.stream import AsyncReader
from workers.errors import CantataError, ConfigError, ConstraintNotReady, DeadlineExceeded, InvalidRequest
from workers.executor.base import Executor, ExecutorInfo
from workers.executor.local import local_executor
from workers.metrics import EngineMetrics, MetricsServer
from workers.model.stored_model import fingerprint
from workers.model_config import load_model_config
from workers.rank.rank import Progress
from workers.request import EngineRequest
from workers.rpc import convert, engine_pb2_grpc
from workers.rpc import engine_pb2 as pb
from workers.rpc.decode_errors import DecodeErrors

logger = logging.getLogger(__name__)

SERVICE = "cantata.engine.v1.Engine"
_MAX_GRACE_S = 24 * 3600.0
_OPTIONS = (
    ("grpc.max_receive_message_length", convert.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", convert.MAX_MESSAGE_BYTES),
    # Otherwise two engines on one port would share its calls.
    ("grpc.so_reuseport", 0),
    # Pings detect a client whose machine is gone, and its requests are aborted.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)

ExecutorFactory = Callable[[EngineConfig, ModelConfig], Executor]
Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]


@dataclass(frozen=True, slots=True)
class StartUp:
    """The findings and selections of start-up, for the summary.

    Attributes:
        longest_context: maximum tokens of a sequence if memory were unlimited.
    """

    info: convert.EngineInfo
    executor: ExecutorInfo
    longest_context: int


class EngineServer:
    """One engine and its gRPC server.

    Args:
        progress: called with start-up phases, on another thread.
        executor_factory: (config, model) → executor; None for the default of this host.
        secret: the secret that callers over TCP have to send (`workers.engine.access`); None if it
            serves on a Unix socket.
    Attributes:
        ended: set when the engine has died or a caller has drained it: it serves no longer, and its
            process should end.
    """

    def __init__(
        self,
        *,
        progress: Progress | None = None,
        executor_factory: ExecutorFactory | None = None,
        secret: str | None = None,
    ) -> None:
        self.metrics = EngineMetrics()
        self.ended = asyncio.Event()
        self._secret = secret
        self._make_executor = executor_factory or (
            lambda config, model: local_executor(config, model, progress=progress)
        )
        self._engine: Engine | None = None
        self._server: grpc.aio.Server | None = None
        self._health = HealthServicer()
        self._metrics_server: MetricsServer | None = None
        # For our own drain and stop: callers of Drain may keep all of the loop's threads waiting.
        self._stoppers = _started(ThreadPoolExecutor(2, thread_name_prefix="cantata-stop"), 2)
        self.start_up: StartUp

    @property
    def engine(self) -> Engine:
        """The engine of this server, once started."""
        assert self._engine is not None, "the server has not started"
        return self._engine

    @property
    def metrics_address(self) -> str | None:
        """host:port of the scrape port, or None."""
        return self._metrics_server.address if self._metrics_server else None

    async def start(self, config: EngineConfig, address: str, *, metrics_port: int | None = None) -> str:
        """Load the model and serve it.

        Args:
            address: host:port (port 0 selects a free one) or unix:PATH.
            metrics_port: HTTP scrape port on loopback; 0 selects a free one, None opens none.
        Returns:
            The address, with the port that was bound.
        Raises:
            CheckpointError, ConfigError: one sentence for the user.
        """
        loop = asyncio.get_running_loop()
        check_address(address, self._secret)
        # The secret is checked first.
        secret = [] if self._secret is None else [SecretInterceptor(self._secret)]
        undecodable = DecodeErrors(lambda method: self.metrics.undecodable.inc())
        server = grpc.aio.server(options=_OPTIONS, interceptors=[*secret, undecodable])
        # Bound before the model is loaded: a port in use should be found in a second, not after
        # minutes.
        address = _bind(server, address)
        if metrics_port is not None:
            self._metrics_server = _start_metrics(self.metrics, metrics_port)
        try:
            model = load_model_config(config.model_path)
            engine = Engine(
                config,
                model,
                self._make_executor(config, model),
                metrics=self.metrics,
                on_death=partial(loop.call_soon_threadsafe, self._note_death),
            )
            model_fingerprint = await asyncio.to_thread(fingerprint, config.model_path)
            executor_info = await asyncio.to_thread(engine.start)
        except BaseException:
            await server.stop(None)
            await self._close_metrics()
            raise
        self._engine = engine
        info = _engine_info(config, model, executor_info, model_fingerprint)
        self.start_up = StartUp(info, executor_info, longest_context(model, config.max_model_len))
        engine_pb2_grpc.add_EngineServicer_to_server(EngineServicer(self, info), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        self._server = server
        await server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return address

    async def drain(self, grace_s: float) -> int:
        """Refuse new requests, wait for the live ones, abort those left after `grace_s`. Return the
        number aborted."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        return await asyncio.get_running_loop().run_in_executor(self._stoppers, self.engine.drain, grace_s)

    async def drain_for_caller(self, grace_s: float) -> int:
        """Run `drain` for the RPC: our own drain and stop never wait for its callers."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        num_aborted = await asyncio.to_thread(self.engine.drain, grace_s)
        self.ended.set()
        return num_aborted

    async def stop(self) -> None:
        """End running requests and close the ports. Idempotent."""
        if self._engine is not None:
            await self._health.enter_graceful_shutdown()
            await asyncio.get_running_loop().run_in_executor(self._stoppers, self._engine.shutdown)
        if self._server is not None:
            await self._server.stop(grace=5.0)
            self._server = None
        await self._close_metrics()

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        await self._health.set("", status)
        await self._health.set(SERVICE, status)

    def _note_death(self) -> None:
        self.ended.set()
        self._death_notice = asyncio.ensure_future(
            self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        )

    async def _close_metrics(self) -> None:
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
            self._metrics_server = None


def _started(executor: ThreadPoolExecutor, num_threads: int) -> ThreadPoolExecutor:
    """Start the executor's threads now, since later there may be no memory for them; return it."""
    all_run = threading.Barrier(num_threads + 1)
    for _ in range(num_threads):
        executor.submit(all_run.wait)
    all_run.wait()
    return executor


class EngineServicer(engine_pb2_grpc.EngineServicer):
    """The service of engine.proto for one engine."""

    def __init__(self, server: EngineServer, info: convert.EngineInfo) -> None:
        self._server = server
        self._engine = server.engine
        self._info = info
        self._reader = AsyncReader()
        self._automata = KnownAutomata()

    # A coroutine that writes, not a generator: grpc.aio cancels it at any wait, so the request is
    # aborted at once.
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        """Stream outputs up to the finish reason. A client that disconnects cancels this coroutine
        and its request."""
        try:
            async with aclosing(self._outputs(request, context)) as responses:
                async for response in responses:
                    await context.write(response)
            return
        except CantataError as caught:
            error = caught
        except Exception:
            # The edge of the request.
            logger.exception("request %s failed", request.request_id)
            error = CantataError(f"internal error; request {request.request_id}")
        await _abort(context, error)

    async def _outputs(
        self, message: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateResponse]:
        request = self._request(message, context.time_remaining())
        stream = self._engine.submit(request, self._reader, await self._prepared(request))
        try:
            await context.send_initial_metadata(convert.TAKEN_METADATA)
            async with aclosing(self._reader.read(stream)) as outputs:
                async for output in outputs:
                    if output.finish_reason is not None and stream.failure is not None:
                        if output.token_ids:
                            yield convert.output_to_wire(replace(output, finish_reason=None, error=None))
                        raise stream.failure
                    yield convert.output_to_wire(output)
        finally:
            self._engine.abort(stream)

    async def _prepared(self, request: EngineRequest) -> PreparedConstraint | None:
        """Return the request's constraint ready to run; None if it has none.

        Raises:
            InvalidRequest: a grammar is refused.
            ConstraintNotReady: it waits too long for compilation, or takes too long to compile.
        """
        if request.constraint is None:
            return None
        future = self._engine.prepare(request.constraint)
        if future.done():
            return future.result()
        try:
            # Others may wait for the same one: a caller that leaves does not cancel it.
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), COMPILE_TIMEOUT_S)
        except TimeoutError:
            raise ConstraintNotReady(TOO_SLOW) from None

    def _request(self, message: pb.GenerateRequest, time_remaining_s: float | None) -> EngineRequest:
        if time_remaining_s is not None and time_remaining_s <= 0:
            raise DeadlineExceeded("the request's deadline had passed when it came")
        request = convert.request_from_wire(
            message,
            vocab_size=self._info.vocab_size,
            deadline_s=time_remaining_s,
            automata=self._automata,
        )
        if request.sampling.seed is None:
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(64)))
        return request

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.EngineInfo:
        return convert.info_to_wire(self._info)

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.EngineLoad:
        return convert.load_to_wire(self._engine.load())

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Context) -> pb.MetricsText:
        return pb.MetricsText(text=self._server.metrics.render())

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        if not (math.isfinite(request.grace_s) and 0 <= request.grace_s <= _MAX_GRACE_S):
            await _abort(
                context,
                InvalidRequest(f"grace_s must be 0 to {_MAX_GRACE_S:g}, got {request.grace_s}", "grace_s"),
            )
        return pb.DrainResponse(num_aborted=await self._server.drain_for_caller(request.grace_s))


async def _abort(context: Context, error: CantataError) -> None:
    await context.abort(grpc.StatusCode[error.status], error.message, convert.error_to_metadata(error))


def _bind(server: grpc.aio.Server, address: str) -> str:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {address}: the port is in use, or the address is not this machine's"
        ) from error
    close_to_others(address)
    return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"


def _start_metrics(metrics: EngineMetrics, port: int) -> MetricsServer:
    try:
        return MetricsServer(metrics, port)
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on 127.0.0.1:{port}: {error.strerror}") from error


def _engine_info(
    config: EngineConfig, model: ModelConfig, executor: ExecutorInfo, model_fingerprint: str
) -> convert.EngineInfo:
    return convert.EngineInfo(
        version=importlib.metadata.version("cantata"),
        model_name=config.model_path.resolve().name,
        model_fingerprint=model_fingerprint,
        max_model_len=executor.max_model_len,
        vocab_size=model.vocab_size,
        block_size=BLOCK_SIZE,
        device=executor.device,
        dtype=executor.dtype,
        kv_capacity_tokens=((executor.num_full_blocks or executor.num_sliding_blocks) - 1) * BLOCK_SIZE,
        num_ranks=executor.num_ranks,
        start_id=secrets.token_hex(8),
        capabilities=convert.CAPABILITIES,
    )
