"""The arithmetic of the GPU report."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import Decoder, decode_step_bytes
from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.config import BLOCK_SIZE, ParallelConfig
from workers.executor.runner import Runner
from workers.model.checkpoint import load_model
from workers.model.sizes import rank_bytes
from workers.parallel.shard import plan_shards


def test_bytes_of_a_decode_step() -> None:
    model = replace(TINY, num_experts=10, num_experts_per_token=2, layer_windows=(24, None, 24), num_layers=3)
    (shard,) = plan_shards(model, ParallelConfig())
    sizes = rank_bytes(model, shard, "bfloat16")
    dense = sizes.total - sizes.experts - sizes.embedding
    kv_of_a_sequence = 2 * (24 + 100 + 24) * 3 * 8 * 2
    assert decode_step_bytes(model, shard, "bfloat16", 1, 100) == pytest.approx(dense + 0.2 * sizes.experts + kv_of_a_sequence)
    assert decode_step_bytes(model, shard, "bfloat16", 2, 100) == pytest.approx(dense + 0.36 * sizes.experts + 2 * kv_of_a_sequence)
    assert decode_step_bytes(model, shard, "bfloat16", 1, 10) == pytest.approx(dense + 0.2 * sizes.experts + 2 * 3 * 10 * 3 * 8 * 2)


def test_batches_of_a_real_model(tmp_path: Path) -> None:
    model = load_model(write_tiny_checkpoint(tmp_path), TINY, dtype=torch.float32, device=torch.device("cpu"))
    every_expert = decode_step_bytes(TINY, model.shard, "float32", 10**6, 0)
    assert every_expert == pytest.approx(model.weight_bytes - model.embedding.nbytes)
    caches = [torch.zeros(2, 40, BLOCK_SIZE, TINY.num_kv_heads, TINY.head_dim) for _ in TINY.layer_windows]
    decoder = Decoder(Runner(model, caches, max_num_seqs=4, max_model_len=120))
    assert decoder.seconds(4, 100, 3) > 0
    assert decoder.seconds(3, 90, 2) > 0, "the first batch has left its slots"
