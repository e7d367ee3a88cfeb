"""The Serve files for the published models: read by Cantata and by Ray Serve, plans that the models allow, and sizes that fit the GPUs."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.config import AppConfig, parse_config
from workers.config import ModelConfig
from workers.model.make_checkpoint import preset_config
from workers.model.safetensors_writer import stored_bytes
from workers.model.tensor_specs import tensor_specs
from workers.parallel.shard import RankShard, plan_shards

DEPLOY = Path(__file__).parents[2] / "deploy"
FILES = sorted(DEPLOY.glob("*20b*.yaml"))
# (replicas, ranks of each) by the end of the file's name.
PLANS = {"": (8, 1), "-1gpu": (1, 1), "-tp8": (1, 8), "120b-2gpu": (1, 2), "20b-2gpu": (2, 1)}

GIB = 2**30
H100_BYTES = 79 * GIB
"""What PyTorch sees of an H100 of 80 GB, rounded down."""
RESERVE_BYTES = 3 * GIB
"""Activations of the largest step, CUDA graphs and what NCCL takes; generous."""


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def app_config(path: Path) -> AppConfig:
    return parse_config(AppConfig, read(path)["applications"][0]["args"], {})


def model_of(path: Path) -> ModelConfig:
    return preset_config(path.stem.split("-")[0])


def rank_weight_bytes(model: ModelConfig, shard: RankShard) -> int:
    """Bytes of MXFP4 experts (4 bits, and 8 a group of 32) and bf16 rest, padding included."""
    hidden, columns = model.hidden_size, shard.intermediate.size
    expert = 3 * hidden * columns * 17 // 32 + 2 * (2 * columns + hidden)
    rows = (shard.heads.size + 2 * shard.kv_heads.size) * model.head_dim
    attention = rows * (hidden + 1) + shard.heads.size * (model.head_dim * hidden + 1) + hidden
    router_and_norms = model.num_experts * (hidden + 1) + 2 * hidden
    layer = shard.experts.size * expert + 2 * (attention + router_and_norms)
    return model.num_layers * layer + 2 * (2 * shard.vocab.size * hidden + hidden)


def kv_bytes_of_one_sequence(model: ModelConfig, shard: RankShard, length: int) -> int:
    tokens = sum(length if window is None else min(length, window) for window in model.layer_windows)
    return tokens * 2 * shard.kv_heads.size * model.head_dim * 2


@pytest.mark.parametrize(("preset", "published"), [("20b", 13_761_264_768), ("120b", 65_248_815_744)])
def test_the_arithmetic_gives_the_published_size(preset: str, published: int) -> None:
    # total_size in model.safetensors.index.json of openai/gpt-oss-20b and openai/gpt-oss-120b.
    from workers.config import ParallelConfig

    model = preset_config(preset)
    (alone,) = plan_shards(model, ParallelConfig())
    assert rank_weight_bytes(model, alone) == sum(map(stored_bytes, tensor_specs(model))) == published


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_cantata_and_serve_read_the_file(path: Path) -> None:
    content, local = read(path), read(DEPLOY / "local.yaml")
    ServeDeploySchema.model_validate(content)
    config = app_config(path)
    name = f"gpt-oss-{path.stem.split('-')[0]}"
    assert (config.engine.model_path, config.model_name, config.engine.device) == (Path("/models") / name, name, "cuda")
    assert config.engine_host == "auto", "engines must be reachable from other nodes"
    suffix = path.stem.removeprefix(path.stem.split("-")[0])
    assert (config.replicas, config.engine.parallel.tensor) == PLANS.get(path.stem, PLANS.get(suffix))
    assert content["grpc_options"] == local["grpc_options"]
    for key in ("name", "route_prefix", "import_path"):
        assert content["applications"][0][key] == local["applications"][0][key]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_weights_and_one_full_context_fit_each_gpu(path: Path) -> None:
    config, model = app_config(path), model_of(path)
    assert config.engine.max_model_len is not None
    usable = H100_BYTES * config.engine.cache.gpu_memory_utilization - RESERVE_BYTES
    for shard in plan_shards(model, config.engine.parallel):
        left = usable - rank_weight_bytes(model, shard)
        assert left >= kv_bytes_of_one_sequence(model, shard, config.engine.max_model_len)


def test_a_gpu_too_small_would_be_noticed() -> None:
    path = DEPLOY / "120b.yaml"
    (shard,) = plan_shards(model_of(path), app_config(path).engine.parallel)
    assert rank_weight_bytes(model_of(path), shard) > 48 * GIB


def test_the_plans_are_there() -> None:
    assert {path.stem for path in FILES} == {f"{size}{plan}" for size in ("20b", "120b") for plan in ("", "-1gpu", "-2gpu", "-tp8")}
