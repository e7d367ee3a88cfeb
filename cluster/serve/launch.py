"""`cantata serve` without --standalone: start Ray on this machine with Serve's fast ingress, run
the application, and stop both on SIGINT or SIGTERM."""

import dataclasses
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from cluster.assembly import check_model, context_with_enough_memory, load_encoding, with_secret
from cluster.config import AppConfig, CantataConfig
from cluster.serve.ray_environment import RAY_ENVIRONMENT
from cluster.sockets import check_port_is_free
from cluster.state.settings import location
from cluster.summary import Reach, start_up_summary
from cluster.ways_of_serving import DRAIN_S, check_on_ray
from workers.cores import engine_threads, usable_cores
from workers.errors import ConfigError
from workers.rpc.convert import EngineInfo

APPLICATION = "cantata"
OBJECT_STORE_BYTES = 128 * 2**20
"""Size of Ray's object store in bytes. Nothing large passes through it here."""
_INFO_TIMEOUT_S = 60.0
_MOST_OF_A_CPU = 0.99
"""Largest share of a CPU reserved for an engine where engines share CPUs: less than one."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve_on_ray(config: CantataConfig) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code.

    Raises:
        ConfigError, CheckpointError: one sentence for the user.
    """
    check_on_ray(config)
    load_encoding(config)
    check_model(config)
    config = with_secret(config, location(config.state, several_hosts=False))
    _application(config)  # refuses more threads than cores before Ray starts
    check_port_is_free(config.listen.host, config.listen.http_port, "listen.http_port")
    check_port_is_free(config.listen.host, config.listen.grpc_port, "listen.grpc_port")
    for name, port in (
        ("listen.http_port", config.listen.http_port),
        ("listen.grpc_port", config.listen.grpc_port),
    ):
        if port == 0:
            raise ConfigError(
                f"{name} is 0 (any free port), which Ray Serve does not support; give a port number, or "
                f"use --standalone"
            )
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return _run(config)


def _application(config: CantataConfig) -> AppConfig:
    """Return the application's arguments, with the values that depend on this machine filled in."""
    engine = dataclasses.replace(config.engine, model_path=config.engine.model_path.resolve())
    cpus = config.engine_cpus
    num_ranks = config.replicas * engine.parallel.tensor
    if cpus is None and num_ranks > usable_cores():
        # Ray would wait for missing CPUs without a limit. Each rank has one thread.
        cpus = min(usable_cores() / config.replicas, _MOST_OF_A_CPU)
        print(
            f"{num_ranks} ranks share {usable_cores()} CPUs, which makes them slower",
            file=sys.stderr,
            flush=True,
        )
    elif cpus is None or (engine.device.startswith("cpu") and cpus >= 1):
        cpus = engine_threads(
            None if cpus is None else int(cpus), config.replicas, setting="engine_cpus (--threads)"
        )
    return AppConfig(
        engine=engine,
        gateway=config.gateway.model_copy(update={"served_model_name": config.model_name}),
        state=config.state,
        # All processes are on this machine.
        engine_host="127.0.0.1" if config.engine_host == "auto" else config.engine_host,
        engine_cpus=cpus,
        engine_drain_timeout_s=config.engine_drain_timeout_s,
        gateway_drain_timeout_s=config.gateway_drain_timeout_s,
    )


def _summary(config: CantataConfig, info: EngineInfo) -> str:
    return start_up_summary(
        info,
        model_name=config.model_name,
        longest_context=context_with_enough_memory(config),
        fp8_cache=config.engine.kv_dtype == "fp8_e4m3",
        num_replicas=config.replicas,
        reach=Reach(
            http=(config.listen.host, config.listen.http_port),
            grpc=(config.listen.host, config.listen.grpc_port),
            needs_key=bool(config.gateway.api_keys),
            has_page=config.gateway.page,
            exposure=[
                "Ray Serve also opens ports on all interfaces: HAProxy's statistics and metrics (8404, 9101) "
                "and the gateways' own gRPC "
                "(40000 upwards, 9500); close them to others with a firewall, or serve with --standalone",
            ],
        ),
        state=location(config.state, several_hosts=False).sentence,
    )


def _on_stop_signals(handler: "Callable[[int, FrameType | None], None] | signal.Handlers") -> None:
    # SIGINT too: a process that a script starts in the background inherits it as ignored.
    for number in _STOP_SIGNALS:
        signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(config: CantataConfig) -> int:
    import ray  # imported late: Ray reads its variables on import

    previous = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    _on_stop_signals(_interrupt)
    try:
        print("Starting Ray on this machine", file=sys.stderr, flush=True)
        ray.init(
            address="local",
            namespace="serve",
            include_dashboard=False,
            # the engines' threads are counted against it; Ray's own count ignores affinity
            num_cpus=usable_cores(),
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
        )
        _on_stop_signals(_interrupt)  # Ray has installed its own handlers
        _check_room(config)
        _serve_application(config)
    except KeyboardInterrupt:
        print(
            f"stopping: running requests have {min(config.gateway_drain_timeout_s, DRAIN_S):g} s to finish, "
            f"then they end with an error; a second signal stops immediately",
            file=sys.stderr,
            flush=True,
        )
    except Exception as error:
        # Process edge: Ray may raise any exception when it or the application cannot start, with
        # the reason in the text.
        print(f"{error}\ncantata: serving on Ray did not start; the reason is printed above", file=sys.stderr)
        return 1
    finally:
        _on_stop_signals(signal.SIG_IGN)
        if ray.is_initialized():
            _shut_serve_down()
            ray.shutdown()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def _serve_application(config: CantataConfig) -> None:
    """Run the application until KeyboardInterrupt."""
    # Set for this process alone, after Ray's processes have started: RAY_SERVE_THROUGHPUT_OPTIMIZED
    # removes the event loop that a handle needs where none runs.
    os.environ["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] = "1"
    from ray import serve
    from ray.serve.config import HTTPOptions, gRPCOptions

    from cluster.serve.app import GRPC_SERVICERS, application

    serve.start(
        http_options=HTTPOptions(
            host=config.listen.host,
            port=config.listen.http_port,
            keep_alive_timeout_s=math.ceil(config.gateway.keep_alive_timeout_s),
        ),
        grpc_options=gRPCOptions(port=config.listen.grpc_port, grpc_servicer_functions=list(GRPC_SERVICERS)),
    )
    application_of_config = application(
        _application(config), replicas=config.replicas, gateways=config.gateways
    )
    try:
        gateway = serve.run(application_of_config, name=APPLICATION, route_prefix="/")
    except RuntimeError:  # names the deployments that failed, but not the reason
        failed = serve.status().applications.get(APPLICATION)
        for name, deployment in failed.deployments.items() if failed else ():
            if deployment.status == "DEPLOY_FAILED":
                print(f"{name}: {reason(deployment.message)}", file=sys.stderr)
        raise
    call = gateway.engine_info
    info = call.remote().result(timeout_s=_INFO_TIMEOUT_S)
    # Its router, started for this request, would keep running at half a per cent of a core.
    call.shutdown()  # type: ignore[no-untyped-call]
    print(_summary(config, info), flush=True)
    threading.Event().wait()


def reason(message: str) -> str:
    """Shorten Serve's message about a failed deployment: reduce a traceback to its last line, the
    error."""
    return (
        message.strip().rpartition("\n")[2]
        if "Traceback (most recent call last)" in message
        else message.strip()
    )


def _check_room(config: CantataConfig) -> None:
    """Check that the cluster has room now: it is this machine alone and will not grow.

    Raises:
        ConfigError: names the resources that are free and those that are needed.
    """
    from cluster.serve.room import replica_bundles, shortage

    lack = shortage(replica_bundles(_application(config)), config.replicas)
    if lack is not None:
        raise ConfigError(
            f"{lack} on this machine: lower engine.parallel.tensor or replicas, or serve on a cluster"
        )


def _shut_serve_down() -> None:
    """End the application, then Serve, whose own shutdown would kill the proxies first and cut
    running requests. A signal during this skips the wait."""
    from ray import serve

    from cluster.serve.cluster_view import end_serve

    _on_stop_signals(_interrupt)
    try:
        found = serve.status().applications.get(APPLICATION)
        if found is not None and found.status == "RUNNING":
            serve.delete(APPLICATION)
    # Ray may raise any exception; continue with the rest of the shutdown
    except (KeyboardInterrupt, Exception) as error:
        print(f"stopping immediately ({type(error).__name__})", file=sys.stderr, flush=True)
    _on_stop_signals(signal.SIG_IGN)
    end_serve()
