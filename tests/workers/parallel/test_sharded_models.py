"""A model over several ranks gives what it gives on one: greedy tokens and logits, for every kind
of plan."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from tests.support.model_steps import PagedSequences, random_tokens
from tests.support.thread_ranks import ThreadRank, on_ranks
from workers.config import ModelConfig, ParallelConfig
from workers.model.checkpoint import load_model
from workers.model.make_checkpoint import write_checkpoint
from workers.parallel.shard import plan_shards

# Eight query heads on 2 key-value heads (repeated from 4 ranks on), 11 experts that 2, 4 and 8
# groups share unevenly, 7 groups of 32 columns that 2 and 4 ranks share unevenly, 113 rows of
# vocabulary. All dimensions differ.
MODEL = ModelConfig(
    vocab_size=113,
    hidden_size=96,
    intermediate_size=224,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=10,
    num_experts=11,
    num_experts_per_token=3,
    layer_windows=(24, None),
    max_context_len=256,
)
PLANS = [(2, 2), (2, 1), (4, 4), (4, 2), (4, 1), (8, 8)]
PROMPTS = {
    0: random_tokens(MODEL, 70, seed=1),
    1: random_tokens(MODEL, 3, seed=2),
    2: random_tokens(MODEL, 33, seed=3),
}
NUM_TOKENS = 12
Format = Literal["mxfp4", "bf16"]


def model_of(experts_format: Format) -> ModelConfig:
    return replace(MODEL, experts_format=experts_format)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Format, Path]:
    folder = tmp_path_factory.mktemp("sharded")
    formats: tuple[Format, ...] = ("mxfp4", "bf16")
    for experts_format in formats:
        write_checkpoint(folder / experts_format, model_of(experts_format), seed=5)
    return {experts_format: folder / experts_format for experts_format in formats}


def run_rank(
    path: Path, model: ModelConfig, plan: tuple[int, int], rank: ThreadRank
) -> tuple[torch.Tensor, dict[int, list[int]]]:
    """Return the logits of one prompt in two chunks, then greedy tokens of all prompts together."""
    shard = plan_shards(model, ParallelConfig(*plan))[rank.rank]
    loaded = load_model(
        path, model, dtype=torch.float32, device=torch.device("cpu"), shard=shard, collectives=rank
    )
    alone = PagedSequences(loaded, num_blocks=12, seed=rank.rank)
    logits = torch.cat([alone.step({0: PROMPTS[0][:41]})[0], alone.step({0: PROMPTS[0][41:]})[0]])
    tokens = PagedSequences(loaded, num_blocks=24, seed=rank.rank).generate(PROMPTS, NUM_TOKENS)
    return logits, tokens


@pytest.fixture(scope="module")
def expected(checkpoints: dict[Format, Path]) -> dict[Format, tuple[torch.Tensor, dict[int, list[int]]]]:
    return {
        name: on_ranks(1, lambda rank, name=name: run_rank(checkpoints[name], model_of(name), (1, 1), rank))[
            0
        ]
        for name in checkpoints
    }


@pytest.mark.parametrize("experts_format", ["mxfp4", "bf16"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_sharded_is_whole(
    checkpoints: dict[Format, Path],
    expected: dict[Format, tuple[torch.Tensor, dict[int, list[int]]]],
    plan: tuple[int, int],
    experts_format: Format,
) -> None:
    ranks = on_ranks(
        plan[0], lambda rank: run_rank(checkpoints[experts_format], model_of(experts_format), plan, rank)
    )
    logits, tokens = expected[experts_format]
    # fp32 sums in another order.
    torch.testing.assert_close(ranks[0][0], logits, atol=1e-4, rtol=0)
    for rank in ranks:
        assert rank[1] == tokens


def test_a_step_takes_two_all_reduces_a_layer_and_one_for_the_embedding(
    checkpoints: dict[Format, Path],
) -> None:
    def count(rank: ThreadRank) -> int:
        run_rank(checkpoints["mxfp4"], MODEL, (2, 2), rank)
        return rank.num_all_reduces

    num_steps = 2 + NUM_TOKENS
    assert on_ranks(2, count) == [num_steps * (2 * MODEL.num_layers + 1)] * 2


def test_a_shard_holds_its_part_only(checkpoints: dict[Format, Path]) -> None:
    def load(rank: ThreadRank) -> int:
        shard = plan_shards(MODEL, ParallelConfig(4, 2))[rank.rank]
        model = load_model(
            checkpoints["mxfp4"],
            MODEL,
            dtype=torch.float32,
            device=torch.device("cpu"),
            shard=shard,
            collectives=rank,
        )
        experts = model.layers[0].experts
        assert experts.weights.gate_up.shape == (shard.experts.length, 2 * 4 * 32, 96)
        assert experts.weights.down.shape == (shard.experts.length, 96, 4 * 32)
        assert model.layers[0].attention.qkv.weight.shape == (4 * 10, 96)
        assert model.layers[0].attention.output.weight.shape == (96, 2 * 10)
        return model.weight_bytes

    whole = load_model(
        checkpoints["mxfp4"], MODEL, dtype=torch.float32, device=torch.device("cpu")
    ).weight_bytes
    assert max(on_ranks(4, load)) < whole / 2


def test_a_rank_that_fails_ends_the_others() -> None:
    def work(rank: ThreadRank) -> None:
        if rank.rank == 1:
            raise KeyError("broken")
        rank.all_reduce(torch.zeros(1))

    with pytest.raises(KeyError, match="broken"):
        on_ranks(3, work)
