"""Sizes by arithmetic are those of what is really loaded, and those of the model card."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from tests.support.thread_ranks import ThreadRank, on_ranks
from workers.config import Dtype, ModelConfig, ParallelConfig, SchedulerConfig
from workers.kv_cache.memory import cache_shape, split_memory
from workers.kv_cache.tensors import TORCH_DTYPES, allocate_kv_caches
from workers.model.checkpoint import LoadOptions, load_model
from workers.model.make_checkpoint import preset_config, write_checkpoint
from workers.model.safetensors_writer import stored_bytes
from workers.model.sizes import count_parameters, kv_bytes, rank_bytes
from workers.model.tensor_specs import tensor_specs
from workers.parallel.shard import plan_shards

MODEL = ModelConfig(
    vocab_size=113,
    hidden_size=96,
    intermediate_size=224,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=10,
    num_experts=11,
    num_experts_per_token=3,
    layer_windows=(40, None, 40),
    max_context_len=256,
)
WHOLE = ParallelConfig()


@pytest.mark.parametrize(("preset", "total", "active"), [("120b", 116.83, 5.13), ("20b", 20.91, 3.61)])
def test_parameters_are_those_of_the_model_card(preset: str, total: float, active: float) -> None:
    # arXiv 2508.10925, table 1.
    assert [round(count / 1e9, 2) for count in count_parameters(preset_config(preset))] == [total, active]


@pytest.mark.parametrize(("preset", "published"), [("20b", 13_761_264_768), ("120b", 65_248_815_744)])
def test_weights_are_the_published_files(preset: str, published: int) -> None:
    # total_size in model.safetensors.index.json of openai/gpt-oss-20b and openai/gpt-oss-120b.
    model = preset_config(preset)
    (shard,) = plan_shards(model, WHOLE)
    # A rank holds gates and sinks in fp32, which are stored in bf16.
    wider = 2 * model.num_layers * (model.num_experts * (model.hidden_size + 1) + model.num_heads)
    assert (
        rank_bytes(model, shard, "bfloat16").total - wider
        == sum(map(stored_bytes, tensor_specs(model)))
        == published
    )


def test_kv_of_the_large_model() -> None:
    model = preset_config("120b")
    (shard,) = plan_shards(model, WHOLE)
    kv = kv_bytes(model, shard, "bfloat16")
    assert kv.per_token == 36 * 1024
    assert kv.per_sequence == 18 * 2048 * 128
    split = plan_shards(model, ParallelConfig(8))[0]
    assert kv_bytes(model, split, "bfloat16").per_token == 36 * 1024 // 8


def test_one_card_of_80_gb_holds_the_large_model() -> None:
    model = preset_config("120b")
    (shard,) = plan_shards(model, WHOLE)
    sizes = rank_bytes(model, shard, "bfloat16")
    assert 60e9 < sizes.total < 66e9
    # 36 layers of 128 experts of 3 * 2880 * 2880 values in 4.25 bits, and biases.
    assert sizes.experts == 36 * 128 * (3 * 2880 * 2880 * 17 // 32 + (2 * 2880 + 2880) * 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("experts_format", ["mxfp4", "bf16"])
@pytest.mark.parametrize("plan", [(1, 1), (2, 2), (2, 1), (4, 2), (8, 8)], ids=str)
def test_each_rank_loads_what_was_predicted(
    tmp_path: Path, plan: tuple[int, int], experts_format: Literal["mxfp4", "bf16"], dtype: Dtype
) -> None:
    model = replace(MODEL, experts_format=experts_format)
    write_checkpoint(tmp_path / "model", model, seed=0)
    shards = plan_shards(model, ParallelConfig(*plan))

    def load(rank: ThreadRank) -> tuple[int, int | None]:
        def bytes_of(quantize: Literal["mxfp4"] | None) -> int:
            return load_model(
                tmp_path / "model",
                model,
                dtype=TORCH_DTYPES[dtype],
                device=torch.device("cpu"),
                shard=shards[rank.rank],
                collectives=rank,
                options=LoadOptions(quantize=quantize),
            ).weight_bytes

        return bytes_of(None), bytes_of("mxfp4") if experts_format == "bf16" else None

    for shard, (loaded, quantized) in zip(shards, on_ranks(plan[0], load), strict=True):
        assert rank_bytes(model, shard, dtype).total == loaded
        if quantized is not None:
            assert rank_bytes(model, shard, dtype, packed_experts=True).total == quantized
        assert 0 <= rank_bytes(model, shard, dtype).padding < loaded


@pytest.mark.parametrize("tensor", [1, 4])
def test_kv_bytes_are_those_of_the_tensors(tensor: int) -> None:
    shard = plan_shards(MODEL, ParallelConfig(tensor))[0]
    kv = kv_bytes(MODEL, shard, "bfloat16")
    shape = cache_shape(MODEL, shard)
    plan = split_memory(
        shape, SchedulerConfig(2, 64), dtype="bfloat16", max_model_len=256, memory_bytes=10**6
    )
    caches = allocate_kv_caches(shape, plan, dtype="bfloat16", device=torch.device("cpu"))
    full = [cache for cache, window in zip(caches, MODEL.layer_windows, strict=True) if window is None]
    assert sum(cache.nbytes for cache in full) == kv.per_token * 16 * plan.num_full_blocks
    sliding = [cache for cache, window in zip(caches, MODEL.layer_windows, strict=True) if window is not None]
    # A window of 40 keys is three blocks.
    assert sum(cache.nbytes for cache in sliding) * 3 == kv.per_sequence * plan.num_sliding_blocks
