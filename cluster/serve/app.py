"""The Ray Serve application: `import_path: cluster.serve.app:build` in a Serve YAML, with `args` as
in `cluster.config.AppConfig`.

Serve starts every replica of both deployments anew when `args` change, since it makes them part of
the code's version. What may change without that stands in the YAML's `deployments`: how many
replicas there are, and a gateway's run-time settings in its `user_config`.
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
"""For Serve's `grpc_options.grpc_servicer_functions`; its gRPC server adds reflection itself."""

_NO_LIMIT = 1_000_000
"""The gateway has its own admission control, which answers in OpenAI's form; Serve's would come
first and answer in its own."""
_STOP_S = 10.0
"""Seconds that a replica has to end after its running requests have ended or used up their time."""


def build(args: dict[str, Any]) -> serve.Application:
    """Check the arguments and all else that needs no GPU, then return the application. Serve's
    entry: while this fails, the version that runs goes on.

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
        # Of all exceptions, Serve passes on the text of this one alone, and does not try again.
        raise RayServeException(str(error)) from None


def application(config: AppConfig, *, replicas: int = 1, gateways: int = 1) -> serve.Application:
    """Return engines and the gateways before them.

    Args:
        replicas, gateways: how many, unless the YAML's `deployments` say it.
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
        # A gateway takes what CPU is left: on a small machine it must not wait for an engine to
        # give one back.
        ray_actor_options={"num_cpus": 0},
        # It needs no GPU either, so there is always room to start the new ones before the old ones
        # stop.
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
    """What Ray reserves for a replica, and its threads. Ray shows a process only the GPUs it
    has."""
    bundles = replica_bundles(args)
    if len(bundles) == 1:
        options: dict[str, Any] = {"num_cpus": bundles[0]["CPU"], "num_gpus": bundles[0].get("GPU", 0)}
        return {"ray_actor_options": options | _threads(max(1, int(bundles[0]["CPU"])))}
    return {
        # The engine's process only plans and answers; it runs beside rank 0.
        "ray_actor_options": {"num_cpus": 0} | _threads(1),
        "placement_group_bundles": bundles,
        "placement_group_strategy": bundle_strategy(bundles),
    }


def _threads(num_threads: int) -> dict[str, Any]:
    # Ray sets OMP_NUM_THREADS itself, but not where a node was started with one, as `ray up` does,
    # and says nothing of how threads wait.
    return {"runtime_env": {"env_vars": thread_environment(num_threads)}}
