"""`cantata serve --standalone`: engines as child processes, and the gateway's HTTP and gRPC servers
in this one. No Ray; on loopback."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import uvicorn

from cluster.assembly import (
    Gateway,
    build_gateway,
    check_model,
    context_with_enough_memory,
    load_encoding,
    with_secret,
)
from cluster.config import CantataConfig, ListenConfig
from cluster.fleet.directory import ReplicaSet
from cluster.fleet.infos import ReplicaInfos
from cluster.frontend.app import build_app
from cluster.frontend.grpc_api import GrpcServer, start_grpc_server
from cluster.frontend.http_server import HttpServer
from cluster.harmony.encoding import HarmonyEncoding
from cluster.sockets import bound_socket, check_port_is_free
from cluster.standalone.supervisor import EngineFailed, EngineProcess, watch_children_without_threads
from cluster.state.settings import location
from cluster.state.state import State, open_state
from cluster.summary import Reach, start_up_summary
from cluster.ways_of_serving import DRAIN_S, check_standalone
from workers.config_json import engine_config_to_json
from workers.cores import engine_threads, thread_environment
from workers.errors import ConfigError
from workers.private_folder import PrivateFolder
from workers.rpc.convert import EngineInfo

T = TypeVar("T")

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 3600.0
"""Maximum seconds for an engine to load its model. A large checkpoint on a slow disk takes long,
and its progress is shown."""
CUT_S = 5.0
"""Seconds after that for the servers to tell the remaining clients that they were cut off."""


def serve_standalone(config: CantataConfig) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code.

    Raises:
        ConfigError, CheckpointError: one sentence for the user.
    """
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    check_standalone(config)
    watch_children_without_threads()
    return asyncio.run(_serve(config))


class StopSignals:
    """The stop signals SIGINT and SIGTERM: the first one asks for a stop, the second one skips the
    wait."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    async def unless_asked(self, work: Awaitable[T]) -> T | None:
        """Return the work's result. If a stop is requested first, cancel the work and return
        None."""
        task = asyncio.ensure_future(work)
        asked = asyncio.create_task(self.asked.wait())
        try:
            await asyncio.wait([task, asked], return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
            if not task.done():
                task.cancel()
        await asyncio.wait([task])
        return None if task.cancelled() else task.result()

    def _on_signal(self) -> None:
        (self.hurried if self.asked.is_set() else self.asked).set()


async def _serve(config: CantataConfig) -> int:
    stop = StopSignals()
    place = location(config.state, several_hosts=False)
    config = with_secret(config, place)
    encoding = load_encoding(config)
    check_model(config)
    with (
        closing(bound_socket(config.listen.host, config.listen.http_port, "listen.http_port")) as http_socket,
        closing(PrivateFolder()) as sockets,
    ):
        check_port_is_free(config.listen.host, config.listen.grpc_port, "listen.grpc_port")
        replicas = ReplicaSet()
        engines = _engines(config, replicas, sockets.path)
        state = await open_state(place, config.state)
        try:
            started = await stop.unless_asked(_start(config, encoding, engines, replicas, state))
            if started is not None:
                gateway, info = started
                try:
                    await _serve_gateway(config, gateway, info, http_socket, stop, engines)
                finally:
                    if state is not None:
                        await state.stop()
                    await gateway.service.close()
        except EngineFailed as error:
            if not error.explained:
                print(f"cantata: {error}", file=sys.stderr)
            return 1
        finally:
            grace_s = 0.0 if stop.hurried.is_set() else DRAIN_S
            await asyncio.gather(*(engine.stop(grace_s) for engine in engines))
            if state is not None:
                await state.close()
    return 0


async def _serve_gateway(
    config: CantataConfig,
    gateway: Gateway,
    info: EngineInfo,
    http_socket: socket.socket,
    stop: StopSignals,
    engines: Sequence[EngineProcess],
) -> None:
    """Run both servers until a stop is requested and running requests have ended or used up their
    time.

    Raises:
        EngineFailed: every engine has been given up.
    """
    keys, service = config.gateway.api_keys, gateway.service
    drain_s = _drain_s(config)
    grpc_address = _address(config.listen.host, config.listen.grpc_port)
    try:
        grpc_server = await start_grpc_server(service, gateway.status.ready, grpc_address, config.gateway)
    except OSError:
        raise ConfigError(
            f"cannot listen on {config.listen.host} port {config.listen.grpc_port}; set listen.grpc_port to "
            f"another"
        ) from None
    http_server = HttpServer(
        build_app(service, gateway.status, config.gateway, state=gateway.state),
        config.gateway,
        service.metrics,
        graceful_s=drain_s + CUT_S,
    )
    serving = asyncio.create_task(http_server.serve([http_socket]))
    http_host, http_port = http_socket.getsockname()[:2]
    grpc_port = int(grpc_server.address.rpartition(":")[2])
    summary = start_up_summary(
        info,
        model_name=config.model_name,
        longest_context=context_with_enough_memory(config),
        fp8_cache=config.engine.kv_dtype == "fp8_e4m3",
        num_replicas=config.replicas,
        reach=Reach(
            http=(http_host, http_port),
            grpc=(config.listen.host, grpc_port),
            needs_key=bool(keys),
            has_page=config.gateway.page,
            exposure=_exposure(config.listen, bool(keys)),
        ),
        state=location(config.state, several_hosts=False).sentence,
    )
    print(summary, flush=True)
    asked = asyncio.create_task(stop.asked.wait())
    no_engine = asyncio.create_task(_all_given_up(engines))
    await asyncio.wait([asked, serving, no_engine], return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    no_engine.cancel()
    logger.info(
        "stopping: running requests have %.0f s to finish; a second signal stops immediately", drain_s
    )
    await _drain(http_server, serving, grpc_server, gateway, stop, drain_s)
    if not stop.asked.is_set() and all(engine.given_up.is_set() for engine in engines):
        raise EngineFailed(engines[0].failure)


async def _all_given_up(engines: Sequence[EngineProcess]) -> None:
    for engine in engines:
        await engine.given_up.wait()


async def _drain(
    http_server: uvicorn.Server,
    serving: "asyncio.Task[None]",
    grpc_server: GrpcServer,
    gateway: Gateway,
    stop: StopSignals,
    drain_s: float,
) -> None:
    http_server.should_exit = True
    stopping = asyncio.create_task(grpc_server.stop(drain_s + CUT_S))
    hurried = asyncio.create_task(_hurry(http_server, grpc_server, stop))
    _, left = await asyncio.wait([serving, stopping], timeout=drain_s)
    if left:
        if gateway.state is not None:
            await gateway.state.stop()
        await gateway.service.close()
        await asyncio.wait(left)
    hurried.cancel()
    serving.result()


async def _hurry(http_server: uvicorn.Server, grpc_server: GrpcServer, stop: StopSignals) -> None:
    await stop.hurried.wait()
    http_server.force_exit = True
    await grpc_server.stop(0)


def _engines(config: CantataConfig, replicas: ReplicaSet, sockets: Path) -> list[EngineProcess]:
    command = [sys.executable, "-m", "workers.engine", "--config", engine_config_to_json(config.engine)]
    command += ["--grace-s", str(DRAIN_S), "--parent-pid", str(os.getpid()), "--heartbeats"]
    threads = None if config.engine_cpus is None else max(1, int(config.engine_cpus))
    if threads is None or config.engine.device.startswith("cpu"):
        threads = engine_threads(threads, config.replicas, setting="engine_cpus (--threads)")
    engines: list[EngineProcess] = []

    def publish() -> None:
        serving = [engine.replica for engine in engines if engine.replica]
        replicas.replace(serving, missing=[engine.name for engine in engines if not engine.replica])

    engines += [
        EngineProcess(
            name,
            [*command, "--address", f"unix:{sockets / name}.sock"],
            environment=thread_environment(threads),
            heartbeat_timeout_s=config.engine.heartbeat_timeout_s,
            on_change=publish,
        )
        for name in (f"engine-{index}" for index in range(config.replicas))
    ]
    return engines


async def _start(
    config: CantataConfig,
    encoding: HarmonyEncoding,
    engines: list[EngineProcess],
    replicas: ReplicaSet,
    state: State | None,
) -> tuple[Gateway, EngineInfo]:
    starts = [asyncio.create_task(engine.start(START_TIMEOUT_S)) for engine in engines]
    try:
        await asyncio.gather(*starts)
    finally:
        for start in starts:
            start.cancel()
        await asyncio.wait(starts)
    gateway, infos = build_gateway(config, encoding, replicas, state=state)
    try:
        return gateway, await _first_info(infos, engines)
    except BaseException:
        await gateway.service.close()
        raise


async def _first_info(infos: ReplicaInfos, engines: Sequence[EngineProcess]) -> EngineInfo:
    """Wait for what the first engine says of itself. Engines that served for a moment and died are
    started again meanwhile.

    Raises:
        EngineFailed: no engine will serve any more, or none has answered in the time for a start.
    """
    first = asyncio.create_task(infos.first())
    no_engine = asyncio.create_task(_all_given_up(engines))
    try:
        await asyncio.wait([first, no_engine], timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if first.done():
            return first.result()
        if no_engine.done():
            raise EngineFailed(engines[0].failure)
        raise EngineFailed(f"no engine has answered within {START_TIMEOUT_S:.0f} s of its start")
    finally:
        first.cancel()
        no_engine.cancel()


def _exposure(listen: ListenConfig, has_keys: bool) -> list[str]:
    if listen.host in ("127.0.0.1", "::1", "localhost"):
        return []
    return [
        f"{listen.host} is reachable from other machines"
        + ("" if has_keys else ", whose users need no key: set --api-key")
    ]


def _drain_s(config: CantataConfig) -> float:
    """Return the seconds that running requests get to end; the default is shorter than on Ray."""
    is_set = "gateway_drain_timeout_s" in config.model_fields_set
    return config.gateway_drain_timeout_s if is_set else DRAIN_S


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
