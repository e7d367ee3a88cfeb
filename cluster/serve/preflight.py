"""Checks of a Serve application before any of it starts. Everything that needs no GPU is checked
here: Serve keeps the running version when the next one cannot be built, but not when its engines
fail."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from cluster.assembly import load_encoding
from cluster.commands.gpus import GIB, GPUS, Gpu
from cluster.config import AppConfig, check_no_settings
from cluster.run_time_settings import reconfigured
from cluster.serve.cluster_view import SERVE_LOGGER, ServeOptions
from cluster.serve.room import accelerators
from cluster.ways_of_serving import check_serve_application
from workers.config import EngineConfig, ModelConfig, check_max_model_len
from workers.errors import ConfigError
from workers.kv_cache.memory import GpuMemory, cache_shape, check_kv_dtype, gpu_kv_memory, split_memory
from workers.model.sizes import rank_bytes
from workers.model.stored_model import check_tensors
from workers.model_config import checkpoint_folder, checkpoint_warnings, load_model_config
from workers.parallel.shard import RankShard, plan_shards

logger = logging.getLogger(SERVE_LOGGER)

_BY_RAYS_NAME: Mapping[str, Gpu] = {
    # The NVL card, which has the most memory: Ray has one name for all variants of the H100.
    "H100": replace(GPUS["h100"], memory_bytes=95_830 * 2**20),
    "H200": GPUS["h200"],
    "B200": GPUS["b200"],
    "AMD-Instinct-MI300X-OAM": GPUS["mi300x"],
}


def check_application(config: AppConfig) -> None:
    """Check that the checkpoint is complete, that it can be split as configured, and that each
    rank's share fits its memory.

    Raises:
        CheckpointError: config, tokenizer or the header of a weight file is missing or invalid.
        ConfigError: the settings cannot work with this model or on the cluster's GPUs.
    """
    engine = config.engine
    check_no_settings(os.environ)
    check_serve_application(config)
    if config.engine_cpus is not None and config.engine_cpus < 1:
        logger.warning("engine_cpus is %g: engines share CPUs, which makes them slower", config.engine_cpus)
    load_encoding(config)
    model = load_model_config(engine.model_path)
    shards = plan_shards(model, engine.parallel)
    check_max_model_len(engine, model)
    if any(checkpoint_folder(engine.model_path).glob("*.safetensors")):
        check_tensors(engine.model_path, model)
    else:
        logger.warning(
            "%s has no weights on the node that builds the application; each engine checks its own copy",
            engine.model_path,
        )
    for sentence in checkpoint_warnings(engine.model_path):
        logger.warning("%s", sentence)
    check_memory(config, model, shards, accelerators())


def check_options(config: AppConfig, options: ServeOptions) -> None:
    """Check the application's settings in the Serve YAML outside `args`.

    Serve rebuilds an application only when `args`, `import_path` or `runtime_env` change. A later
    change under `deployments` is not seen here; with external_scaler_enabled Serve itself refuses
    autoscaling there.

    Raises:
        ConfigError: a setting cannot work.
    """
    reason = "Serve's autoscaling does not see the requests, which go to engines directly"
    for name, said in options.deployments.items():
        if said.get("autoscaling_config") is not None or said.get("num_replicas") == "auto":
            raise ConfigError(
                f"deployment {name}: {reason}, so it would stop all but min_replicas; set num_replicas to "
                f"a number instead of autoscaling_config or auto"
            )
    if options.has_autoscaling_policy:
        raise ConfigError(f"autoscaling_policy: {reason}; leave it out")
    if not options.external_scaler_enabled:
        raise ConfigError(
            f"external_scaler_enabled: set it to true for this application. {reason}, and with true "
            "it refuses autoscaling also where it is added to an application that runs"
        )
    reconfigured(config.gateway, options.deployments.get("gateway", {}).get("user_config"))
    if options.deployments.get("engine", {}).get("user_config"):
        raise ConfigError(
            "deployment engine: it has no run-time settings; use args.engine instead of user_config"
        )


def check_memory(
    config: AppConfig, model: ModelConfig, shards: Sequence[RankShard], kinds: Iterable[str] | None
) -> None:
    """Check by arithmetic that a rank's weights and one sequence fit, without what only an engine
    can measure (activations, libraries).

    Args:
        kinds: GPU types of the cluster by Ray's names; None if not known.
    Raises:
        ConfigError: they fit none of these GPUs, or the KV cache of engine.cache.memory_bytes
            cannot hold one sequence.
    """
    engine = config.engine
    packed = True if engine.quantize == "mxfp4" else None
    sizes = [
        rank_bytes(model, shard, engine.dtype, packed_experts=packed, cpu_dense_dtype=engine.cpu_dense_dtype)
        for shard in shards
    ]
    weight_bytes, shard = max(
        ((size.total, shard) for size, shard in zip(sizes, shards, strict=True)), key=lambda pair: pair[0]
    )
    shape = cache_shape(model, shard)
    if engine.cache.memory_bytes is not None:
        _check_kv(engine, shape, engine.cache.memory_bytes, "engine.cache.memory_bytes")
    refusals = []
    for kind in kinds or () if not engine.device.startswith("cpu") else ():
        if kind not in _BY_RAYS_NAME:
            return
        try:
            _check_gpu(engine, shape, _BY_RAYS_NAME[kind], weight_bytes)
            return
        except ConfigError as error:
            refusals.append(f"on {kind}: {error}")
    if refusals:
        raise ConfigError(f"the cluster has no GPU that can hold a rank; {'; '.join(refusals)}")


def _check_gpu(engine: EngineConfig, shape: ModelConfig, gpu: Gpu, weight_bytes: int) -> None:
    check_kv_dtype(engine.kv_dtype, gpu.target)
    memory = gpu_kv_memory(
        shape,
        engine.cache,
        engine.scheduler,
        dtype=engine.kv_dtype,
        max_model_len=engine.max_model_len,
        gpu=GpuMemory(total_bytes=gpu.memory_bytes, used_bytes=weight_bytes),
    )
    if weight_bytes + memory.num_bytes > gpu.memory_bytes:
        raise ConfigError(
            f"{weight_bytes / GIB:.2f} GiB of weights and {memory.num_bytes / GIB:.2f} GiB of KV cache "
            f"exceed its {gpu.memory_bytes / GIB:.2f} GiB; lower engine.cache.memory_bytes or raise "
            f"engine.parallel.tensor"
        )
    _check_kv(engine, shape, memory.num_bytes, memory.source)


def _check_kv(engine: EngineConfig, shape: ModelConfig, num_bytes: int, source: str) -> None:
    split_memory(
        shape,
        engine.scheduler,
        dtype=engine.kv_dtype,
        max_model_len=engine.max_model_len,
        memory_bytes=num_bytes,
        source=source,
    )
