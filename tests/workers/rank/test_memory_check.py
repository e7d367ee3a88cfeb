"""Weights for which there is no room are refused before any of them is read, with the numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.hollow_checkpoint import write_hollow_checkpoint
from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.config import EngineConfig, ParallelConfig
from workers.engine.llm import LLM
from workers.errors import ConfigError
from workers.model.checkpoint import load_model
from workers.parallel.shard import plan_shards
from workers.rank import device
from workers.rank.device import check_memory

CPU = torch.device("cpu")
TOO_LARGE = replace(TINY, num_experts=100_000_000)
"""About a terabyte."""


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_model_larger_than_memory_is_refused_with_the_numbers(tmp_path: Path, num_ranks: int) -> None:
    path = write_hollow_checkpoint(tmp_path / "model", TOO_LARGE)
    place = "on this host" if num_ranks == 1 else "for each of 3 ranks on this host"
    with pytest.raises(
        ConfigError,
        match=rf"the weights of rank \d take \d+\.\d\d GiB, and \d+\.\d\d GiB of memory are free {place}: ",
    ):
        LLM(path, max_model_len=64, tensor_parallel_size=num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_what_is_wanted_is_what_a_rank_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    config = EngineConfig(
        write_tiny_checkpoint(tmp_path), dtype="float32", parallel=ParallelConfig(num_ranks)
    )
    for shard in plan_shards(TINY, config.parallel):
        held = load_model(config.model_path, TINY, dtype=torch.float32, device=CPU, shard=shard).weight_bytes
        monkeypatch.setattr(device, "host_free_bytes", lambda free=num_ranks * held: free)
        check_memory(config, TINY, shard, CPU, ranks_on_host=num_ranks)
        monkeypatch.setattr(device, "host_free_bytes", lambda free=num_ranks * held - 1: free)
        with pytest.raises(ConfigError, match=rf"^the weights of rank {shard.tp_rank} take"):
            check_memory(config, TINY, shard, CPU, ranks_on_host=num_ranks)
