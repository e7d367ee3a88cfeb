"""The Serve files for the published models: read by Cantata and by Ray Serve, plans that the models
allow, and sizes that fit the GPUs."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from benchmarks.parallel_model import BATCHES, best, points
from cluster.commands.gpus import GIB, GPUS, gpu_kv_cache
from cluster.config import AppConfig, parse_config
from cluster.serve.app import ENGINE_DEPLOYMENT, GATEWAY_DEPLOYMENT
from cluster.serve.cluster_view import ServeOptions
from cluster.serve.preflight import check_memory, check_options
from workers.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig
from workers.errors import ConfigError
from workers.model.make_checkpoint import preset_config
from workers.model.sizes import rank_bytes
from workers.parallel.shard import plan_shards

DEPLOY = Path(__file__).parents[2] / "deploy"
FILES = sorted(DEPLOY.glob("*20b*.yaml"))
# (replicas, ranks of each) by the end of the file's name.
PLANS = {
    "120b": (4, 2),
    "20b": (8, 1),
    "-1gpu": (1, 1),
    "-tp8": (1, 8),
    "120b-2gpu": (1, 2),
    "20b-2gpu": (2, 1),
}


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def app_config(path: Path) -> AppConfig:
    return parse_config(AppConfig, read(path)["applications"][0]["args"], {})


def model_of(path: Path) -> ModelConfig:
    return preset_config(path.stem.split("-")[0])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_cantata_and_serve_read_the_file(path: Path) -> None:
    content, local = read(path), read(DEPLOY / "local.yaml")
    ServeDeploySchema.model_validate(content)
    config = app_config(path)
    name = f"gpt-oss-{path.stem.split('-')[0]}"
    assert (config.engine.model_path, config.model_name, config.engine.device) == (
        Path("/models") / name,
        name,
        "cuda",
    )
    assert config.engine.max_model_len == model_of(path).max_context_len, "the whole context"
    assert config.engine_host == "auto", "engines must be reachable from other nodes"
    suffix = path.stem.removeprefix(path.stem.split("-")[0])
    application = content["applications"][0]
    options = {deployment["name"]: deployment for deployment in application["deployments"]}
    check_options(config, ServeOptions(application["external_scaler_enabled"], False, options))
    assert set(options) == {ENGINE_DEPLOYMENT, GATEWAY_DEPLOYMENT}
    assert (options[ENGINE_DEPLOYMENT]["num_replicas"], config.engine.parallel.tensor) == PLANS.get(
        path.stem, PLANS.get(suffix)
    )
    assert content["grpc_options"] == local["grpc_options"]
    assert content["http_options"]["keep_alive_timeout_s"] == config.gateway.keep_alive_timeout_s
    for key in ("name", "route_prefix", "import_path", "external_scaler_enabled"):
        assert content["applications"][0][key] == local["applications"][0][key]


@pytest.mark.parametrize("path", [*FILES, DEPLOY / "local.yaml"], ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "autoscaling",
    [{"num_replicas": "auto"}, {"autoscaling_config": {"min_replicas": 1}}],
    ids=["auto", "config"],
)
def test_serve_refuses_its_own_autoscaling(path: Path, autoscaling: dict[str, Any]) -> None:
    content = read(path)
    engine = content["applications"][0]["deployments"][0]
    del engine["num_replicas"]
    engine |= autoscaling
    with pytest.raises(ValidationError, match='autoscaling configured: "engine"'):
        ServeDeploySchema.model_validate(content)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_build_checks_without_a_gpu_holds(path: Path) -> None:
    config, model = app_config(path), model_of(path)
    shards = plan_shards(model, config.engine.parallel)
    check_memory(config, model, shards, ["H100"])
    check_memory(config, model, shards, None)


@pytest.mark.parametrize(
    ("experts", "cache", "kinds", "said"),
    [
        (256, CacheConfig(), ["H100"], "no GPU that can hold a rank; on H100: "),
        (256, CacheConfig(), ["H100", "H200"], None),
        (256, CacheConfig(), ["H100", "unheard of"], None),
        (256, CacheConfig(), None, None),
        (128, CacheConfig(memory_bytes=60 * GIB), ["H100"], "60.00 GiB of KV cache exceed its 93.58 GiB"),
        (128, CacheConfig(memory_bytes=GIB), None, "cannot hold one sequence"),
        (128, CacheConfig(dtype="fp8"), ["H100"], None),
    ],
)
def test_what_cannot_fit_is_refused_before_it_starts(
    experts: int, cache: CacheConfig, kinds: list[str] | None, said: str | None
) -> None:
    config = app_config(DEPLOY / "120b-1gpu.yaml")
    config = config.model_copy(update={"engine": replace(config.engine, cache=cache)})
    model = replace(preset_config("120b"), num_experts=experts)
    with nullcontext() if said is None else pytest.raises(ConfigError, match=said):
        check_memory(config, model, plan_shards(model, config.engine.parallel), kinds)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_weights_and_one_full_context_fit_each_h100(path: Path) -> None:
    config, model = app_config(path), model_of(path)
    engine = config.engine
    assert engine.max_model_len is not None
    assert (engine.cache, engine.dtype) == (CacheConfig(), "bfloat16")
    for shard in plan_shards(model, engine.parallel):
        weights = rank_bytes(model, shard, engine.dtype).total
        plan = gpu_kv_cache(
            GPUS["h100"],
            model,
            shard,
            engine.scheduler,
            weight_bytes=weights,
            max_model_len=engine.max_model_len,
        )
        assert plan.kv_capacity_tokens >= engine.max_model_len


@pytest.mark.parametrize("size", ["120b", "20b"])
def test_the_file_for_eight_gpus_has_the_plan_of_most_tokens(size: str) -> None:
    # docs/performance.md, of the plans for up to two ranks: prompts of 8192 tokens, answers of
    # 1024, 20 tokens a second for each user.
    model, gpu = preset_config(size), GPUS["h100"]
    plans = [ParallelConfig(ranks) for ranks in (1, 2)]
    every = [
        point
        for parallel in plans
        for point in points(model, parallel, gpu, BATCHES, context=8192, output=1024)
    ]
    winner = best(every, 20)
    assert winner is not None
    config = app_config(DEPLOY / f"{size}.yaml")
    assert config.engine.parallel.tensor == winner.parallel.tensor
    assert config.engine.scheduler.max_num_seqs >= winner.batch


def test_a_gpu_too_small_would_be_noticed() -> None:
    model = model_of(DEPLOY / "120b.yaml")
    (shard,) = plan_shards(model, ParallelConfig())
    weights = rank_bytes(model, shard, "bfloat16").total
    gpu = replace(GPUS["h100"], memory_bytes=74 * GIB)
    with pytest.raises(ConfigError, match="cannot hold one sequence"):
        gpu_kv_cache(gpu, model, shard, SchedulerConfig(), weight_bytes=weights, max_model_len=131_072)


def test_the_plans_are_there() -> None:
    assert {path.stem for path in FILES} == {
        f"{size}{plan}" for size in ("20b", "120b") for plan in ("", "-1gpu", "-2gpu", "-tp8")
    }
