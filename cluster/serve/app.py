"""The Ray Serve application: `import_path: cluster.serve.app:build` in a Serve YAML, with `args` as
in `cluster.config.AppConfig`.

A change of `args` makes Serve restart every replica of both deployments, because `args` are part of
the code version. Settings that can change without a restart stand under the YAML's `deployments`:
the number of replicas, and a gateway's run-time settings in its `user_config`.
"""

from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from cluster.config import AppConfig, parse_config
from cluster.serve.cluster_view import serve_options
from cluster.serve.gateway import GatewayReplica
from cluster.serve.health import LONGEST_PERIOD_S, health_checks
from cluster.serve.preflight import check_application, check_options
from cluster.serve.replica import EngineReplica
from cluster.serve.room import bundle_strategy, replica_bundles
from workers.cores import thread_environment
from workers.errors import CheckpointError, ConfigError

ENGINE_DEPLOYMENT = "engine"
GATEWAY_DEPLOYMENT = "gateway"
GRPC_SERVICERS = (
    "cluster.frontend.grpc_handlers.add_InferenceServicer_to_server",
    "cluster.frontend.grpc_handlers.add_HealthServicer_to_server",
)
"""Servicers for Serve's `grpc_options.grpc_servicer_functions`. Serve's gRPC server adds reflection
itself."""

_NO_LIMIT = 1_000_000
"""Serve's own request limits, set too high to apply: the gateway has its own admission control,
which answers in OpenAI's error format."""
_STOP_S = 10.0
"""Seconds a replica gets to end after its running requests have ended or used up their time."""


def build(args: dict[str, Any]) -> serve.Application:
    """Check the arguments and everything else that needs no GPU, then return the application.

    This is Serve's entry point. When it fails, the running version stays in service.

    Raises:
        RayServeException: one sentence, which Serve shows as the application's status.
    """
    try:
        config = parse_config(AppConfig, args, {})
        for options in serve_options(args):
            check_options(config, options)
        check_application(config)
        return application(config)
    except (ConfigError, CheckpointError) as error:
        # RayServeException is the only exception whose text Serve shows, and it is not retried.
        raise RayServeException(str(error)) from None


def application(config: AppConfig, *, replicas: int = 1, gateways: int = 1) -> serve.Application:
    """Return the application: the engines and the gateways in front of them.

    Args:
        replicas, gateways: default counts; the YAML's `deployments` override them.
    """
    checks = health_checks(config.engine.heartbeat_timeout_s)
    engine: Any = serve.deployment(
        EngineReplica,
        name=ENGINE_DEPLOYMENT,
        num_replicas=replicas,
        **_resources(config),
        user_config={},
        max_ongoing_requests=_NO_LIMIT,
        health_check_period_s=checks.period_s,
        health_check_timeout_s=checks.timeout_s,
        graceful_shutdown_timeout_s=config.engine_drain_timeout_s + _STOP_S,
        max_constructor_retry_count=3,
        request_router_config=RequestRouterConfig.model_validate({"request_routing_stats_period_s": 2.0}),
    )
    ingress: Any = serve.ingress()(GatewayReplica)
    gateway: Any = serve.deployment(
        ingress,
        name=GATEWAY_DEPLOYMENT,
        num_replicas=gateways,
        # A gateway uses whatever CPU is left. On a small machine it must not wait for an engine to
        # release one.
        ray_actor_options={"num_cpus": 0},
        # It needs no GPU either, so there is always room to start the new gateways before the old
        # ones stop.
        max_surge_percent=100,
        user_config={},
        max_ongoing_requests=_NO_LIMIT,
        max_queued_requests=-1,
        health_check_period_s=LONGEST_PERIOD_S,
        graceful_shutdown_timeout_s=config.gateway_drain_timeout_s + _STOP_S,
        max_constructor_retry_count=3,
        logging_config=LoggingConfig(enable_access_log=False),
    )
    bound: serve.Application = gateway.bind(
        engine.bind(config.engine, config.engine_host, config.engine_drain_timeout_s), config
    )
    return bound


def _resources(args: AppConfig) -> dict[str, Any]:
    """Return the Ray resources and thread settings of one replica. Ray shows a process only the
    GPUs reserved for it."""
    bundles = replica_bundles(args)
    if len(bundles) == 1:
        options: dict[str, Any] = {"num_cpus": bundles[0]["CPU"], "num_gpus": bundles[0].get("GPU", 0)}
        return {"ray_actor_options": options | _threads(max(1, int(bundles[0]["CPU"])))}
    return {
        # The engine's process only schedules and streams; it runs beside rank 0.
        "ray_actor_options": {"num_cpus": 0} | _threads(1),
        "placement_group_bundles": bundles,
        "placement_group_strategy": bundle_strategy(bundles),
    }


def _threads(num_threads: int) -> dict[str, Any]:
    # Ray sets OMP_NUM_THREADS itself, except where a node was started with it set, as by `ray up`.
    # It does not set how threads wait.
    return {"runtime_env": {"env_vars": thread_environment(num_threads)}}
