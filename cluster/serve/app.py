"""The Ray Serve application: `import_path: cluster.serve.app:build` in a Serve YAML, with `args` as in `cluster.config.AppConfig`."""

from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from cluster.config import AppConfig
from cluster.serve.gateway import GatewayReplica
from cluster.serve.replica import DRAIN_S, EngineReplica
from cluster.serve.room import bundle_strategy, replica_bundles
from workers.config import load_model_config
from workers.cores import thread_environment
from workers.parallel.shard import plan_shards

ENGINE_DEPLOYMENT = "engine"
GATEWAY_DEPLOYMENT = "gateway"
GRPC_SERVICERS = (
    "cluster.frontend.grpc_handlers.add_InferenceServicer_to_server",
    "cluster.frontend.grpc_handlers.add_HealthServicer_to_server",
)
"""For Serve's `grpc_options.grpc_servicer_functions`; its gRPC server adds reflection itself."""

_NO_LIMIT = 1_000_000
"""The gateway has its own admission control, which answers in OpenAI's form; Serve's would come first and answer in its own."""


def build(args: AppConfig) -> serve.Application:
    """Engines and the gateways before them.

    Raises:
        CheckpointError: the model's folder, config or tokenizer is missing or foreign.
        ConfigError: the model cannot be split as `engine.parallel` says.
    """
    from cluster.assembly import load_encoding

    # Relative paths mean the folder Ray was started in; the error should name the full path.
    load_encoding(args)
    plan_shards(load_model_config(args.engine.model_path), args.engine.parallel)
    engine: Any = serve.deployment(
        EngineReplica,
        name=ENGINE_DEPLOYMENT,
        num_replicas=args.replicas,
        **_resources(args),
        max_ongoing_requests=_NO_LIMIT,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=DRAIN_S + 10,
        max_constructor_retry_count=3,
        request_router_config=RequestRouterConfig.model_validate({"request_routing_stats_period_s": 2.0}),
    )
    ingress: Any = serve.ingress()(GatewayReplica)
    gateway: Any = serve.deployment(
        ingress,
        name=GATEWAY_DEPLOYMENT,
        num_replicas=args.gateways,
        # A gateway takes what CPU is left: on a small machine it must not wait for an engine to give one back.
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_NO_LIMIT,
        max_queued_requests=-1,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=DRAIN_S + 10,
        max_constructor_retry_count=3,
        logging_config=LoggingConfig(enable_access_log=False),
    )
    application: serve.Application = gateway.bind(engine.bind(args.engine, args.engine_host), args)
    return application


def _resources(args: AppConfig) -> dict[str, Any]:
    """What Ray reserves for a replica, and its threads. Ray shows a process only the GPUs it has."""
    bundles = replica_bundles(args)
    if len(bundles) == 1:
        options: dict[str, Any] = {"num_cpus": bundles[0]["CPU"], "num_gpus": bundles[0].get("GPU", 0)}
        return {"ray_actor_options": options | _threads(int(bundles[0]["CPU"]))}
    return {
        # The engine's process only plans and answers; it runs beside rank 0.
        "ray_actor_options": {"num_cpus": 0} | _threads(1),
        "placement_group_bundles": bundles,
        "placement_group_strategy": bundle_strategy(bundles),
    }


def _threads(num_threads: int) -> dict[str, Any]:
    # Ray sets OMP_NUM_THREADS itself, but not where a node was started with one, as `ray up` does, and says nothing of how threads wait.
    return {"runtime_env": {"env_vars": thread_environment(num_threads)}}
