"""The model of parallel plans: its bytes against hand computation and real loads, its expectations
against enumeration, its tables."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import parallel_model
from benchmarks.parallel_model import (
    Point,
    all_reduce,
    best,
    busiest_experts,
    main,
    model_step,
    most_sequences,
    plan_name,
    points,
)
from cluster.commands.gpus import GPUS, gpu_kv_cache
from tests.support.thread_ranks import ThreadRank, on_ranks
from workers.config import ModelConfig, ParallelConfig, SchedulerConfig
from workers.kv_cache.manager import KVCacheManager, SequenceBlocks
from workers.model.checkpoint import load_model
from workers.model.make_checkpoint import preset_config, write_checkpoint
from workers.model.sizes import expected_experts_hit, rank_bytes, sequence_kv_bytes
from workers.parallel.shard import plan_shards

LARGE = preset_config("120b")
H100 = GPUS["h100"]
ALONE = ParallelConfig()
SMALL = ModelConfig(
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
PERFORMANCE = Path(__file__).parents[2] / "docs" / "performance" / "parallel-plans.md"


def test_one_token_of_the_large_model_reads_five_gigabytes() -> None:
    step = model_step(LARGE, ALONE, H100, batch=1, context=1)
    # By hand: q, k, v [5120, 2880] and o [2880, 4096] with biases and 64 sinks; 4 experts in 4.25
    # bits with biases; lm_head [201088, 2880].
    assert step.attention.num_bytes == 36 * (2 * (5120 * 2881 + 2880 * 4097) + 4 * 64)
    assert step.experts.num_bytes == 36 * 4 * (3 * 2880 * 2880 * 17 // 32 + 2 * 3 * 2880)
    assert step.lm_head.num_bytes == 2 * 201_088 * 2880 + 2 * 4 * 201_088
    assert step.keys.num_bytes == 36 * 2 * 8 * 64 * 2
    assert step.read_bytes == pytest.approx(5.0e9, rel=0.015)
    # Of the 5.1 B active parameters all are multiplied once but the biases: two operations each.
    assert step.flops == pytest.approx(2 * 5.13e9, rel=0.005)
    ceiling = H100.memory_bandwidth / step.read_bytes
    assert 650 < ceiling < 680
    assert 1 / step.seconds < ceiling


def test_keys_grow_with_the_context_in_full_layers_only() -> None:
    (shard,) = plan_shards(LARGE, ALONE)
    per_token = 18 * 2 * 8 * 64 * 2
    assert per_token == 36 * 1024
    assert [sequence_kv_bytes(LARGE, shard, "bfloat16", length) for length in (1, 127, 128, 129, 8192)] == [
        2 * per_token,
        127 * 2 * per_token,
        128 * 2 * per_token,
        (128 + 129) * per_token,
        (128 + 8192) * per_token,
    ]
    step = model_step(LARGE, ALONE, H100, batch=5, context=8192)
    assert step.keys.num_bytes == 5 * 8320 * per_token
    # Two products of 64 values for each of 64 heads and each visible key.
    assert step.keys.flops == 5 * 18 * 8320 * 64 * 64 * 4


@pytest.mark.parametrize("plan", [(1, 1), (2, 2), (2, 1), (4, 2), (8, 8)], ids=str)
def test_a_batch_that_hits_every_expert_reads_what_is_really_loaded(
    tmp_path: Path, plan: tuple[int, int]
) -> None:
    write_checkpoint(tmp_path / "model", SMALL, seed=0)
    parallel = ParallelConfig(*plan)
    shards = plan_shards(SMALL, parallel)

    def load(rank: ThreadRank) -> tuple[int, int]:
        model = load_model(
            tmp_path / "model",
            SMALL,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            shard=shards[rank.rank],
            collectives=rank,
        )
        return model.weight_bytes, model.embedding.nbytes

    largest, embedding = max(on_ranks(plan[0], load))
    batch, hidden = 4000, SMALL.hidden_size
    step = model_step(SMALL, parallel, H100, batch=batch, context=1)
    read = step.read_bytes - step.keys.num_bytes - batch * hidden * 2 - 2 * batch * SMALL.vocab_size * 4
    assert read == pytest.approx(largest - embedding, rel=1e-9)


def test_experts_hit_is_the_mean_over_all_choices() -> None:
    model = replace(SMALL, num_experts=6, num_experts_per_token=2)
    choices = list(itertools.combinations(range(6), 2))
    for num_tokens in (1, 2, 3):
        drawn = list(itertools.product(choices, repeat=num_tokens))
        mean = sum(len(set().union(*tokens)) for tokens in drawn) / len(drawn)
        assert expected_experts_hit(model, num_tokens) == pytest.approx(mean)
    assert expected_experts_hit(model, 10**4) == pytest.approx(6)


@pytest.mark.parametrize("groups", [((0, 3), (3, 6)), ((0, 2), (2, 4), (4, 6)), ((0, 4), (4, 6))], ids=str)
def test_the_busiest_group_is_that_of_all_choices(groups: tuple[tuple[int, int], ...]) -> None:
    model = replace(SMALL, num_experts=6, num_experts_per_token=2)
    choices = list(itertools.combinations(range(6), 2))
    for num_tokens in (1, 2):
        drawn = list(itertools.product(choices, repeat=num_tokens))
        hit = [
            max(len({e for token in tokens for e in token if start <= e < stop}) for start, stop in groups)
            for tokens in drawn
        ]
        load = [
            max(sum(start <= e < stop for token in tokens for e in token) for start, stop in groups)
            for tokens in drawn
        ]
        found = busiest_experts(model, groups, num_tokens)
        # 4096 or 2048 draws, whose own spread is below 1: four standard errors.
        assert found[0] == pytest.approx(sum(hit) / len(hit), abs=0.09)
        assert found[1] == pytest.approx(sum(load) / len(load), abs=0.09)
    assert busiest_experts(model, groups, 3) == busiest_experts(model, groups, 3)


@given(st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 700))
@settings(max_examples=40, deadline=None)
def test_the_busiest_group_has_at_least_its_share(num_groups: int, num_tokens: int) -> None:
    size = 128 // num_groups
    groups = tuple((start, start + size) for start in range(0, 128, size))
    hit, pairs = busiest_experts(LARGE, groups, num_tokens)
    assert expected_experts_hit(LARGE, num_tokens) / num_groups * 0.99 <= hit <= min(size, 4 * num_tokens)
    assert 4 * num_tokens / num_groups <= pairs <= 4 * num_tokens


def test_all_reduce_by_hand() -> None:
    fixed = parallel_model.COLLECTIVE_S
    small = all_reduce(5760, 8, 400e9)
    assert (small.num_bytes, small.seconds) == (7 * 5760, pytest.approx(fixed + 7 * 5760 / 400e9))
    large = all_reduce(8e6, 8, 400e9)
    assert (large.num_bytes, large.seconds) == (
        14e6,
        pytest.approx(fixed + 13 * parallel_model.HOP_S + 14e6 / 400e9),
    )
    two = all_reduce(8e6, 2, 400e9)
    assert two.seconds == pytest.approx(fixed + 8e6 / 400e9), (
        "with two ranks both send the same, and one-shot has one hop less"
    )
    assert all_reduce(8e6, 1, 400e9).seconds == 0


def test_collectives_of_a_step_are_those_of_the_model() -> None:
    alone, two = (model_step(LARGE, ParallelConfig(size), H100, batch=3, context=100) for size in (1, 2))
    assert (alone.collectives.num_bytes, alone.collectives.seconds) == (0, 0)
    # Two all-reduces a layer and one of the embedding, each [3, 2880] in bf16; half of the logits
    # in fp32.
    assert two.collectives.num_bytes == 73 * 3 * 2880 * 2 + 3 * 100_544 * 4


def test_each_rank_of_two_does_half() -> None:
    alone, split, inside = (
        model_step(LARGE, ParallelConfig(*plan), H100, batch=64, context=1000)
        for plan in ((1, 1), (2, 2), (2, 1))
    )
    assert split.keys.num_bytes * 2 == alone.keys.num_bytes
    assert inside.experts.flops * 2 == alone.experts.flops
    # One rank has all gates, norms and output biases, and the busier half of the experts.
    assert 0.5 < split.attention.num_bytes / alone.attention.num_bytes < 0.501
    assert 0.5 < split.experts.num_bytes / alone.experts.num_bytes < 0.53
    assert inside.experts.num_bytes < split.experts.num_bytes


def test_a_prompt_costs_as_many_operations_as_its_tokens() -> None:
    chunk = model_step(LARGE, ALONE, H100, batch=1, context=0, query_len=512)
    token = model_step(LARGE, ALONE, H100, batch=1, context=0)
    assert chunk.experts.flops == 512 * token.experts.flops
    assert chunk.lm_head.flops == token.lm_head.flops
    # On average 256 keys in 18 layers, the window's 128 in the others: 2 products of 64 heads.
    assert chunk.keys.flops == 512 * 18 * (256 + 128) * 64 * 64 * 4
    assert chunk.keys.num_bytes == 18 * (511 + 128) * 2 * 8 * 64 * 2


@pytest.mark.parametrize("context", [1, 39, 40, 41, 100, 256])
def test_as_many_sequences_fit_as_the_cache_takes(context: int) -> None:
    gpu = replace(H100, memory_bytes=int((3 * 2**30 + 4_000_000) / 0.9))
    most = most_sequences(SMALL, ALONE, gpu, context)
    assert 1 < most < parallel_model.MAX_BATCH

    def admitted(count: int) -> int:
        (shard,) = plan_shards(SMALL, ALONE)
        weights = rank_bytes(SMALL, shard, "bfloat16").total
        plan = gpu_kv_cache(
            gpu, SMALL, shard, SchedulerConfig(max_num_seqs=count), weight_bytes=weights, max_model_len=256
        )
        manager = KVCacheManager(
            num_full_blocks=plan.num_full_blocks,
            num_sliding_blocks=plan.num_sliding_blocks,
            window=40,
            prefix_caching=False,
        )
        for number in range(count):
            blocks = SequenceBlocks()
            if manager.admit(blocks, range(context)) is None or _computed(manager, blocks, context) < context:
                return number
        return count

    assert admitted(most) == most
    assert admitted(most + 1) <= most


def _computed(manager: KVCacheManager, blocks: SequenceBlocks, length: int) -> int:
    """Return the number of tokens that get blocks, one after the other."""
    return next((done for done in range(length) if manager.grow(blocks, done, 1) == 0), length)


def test_nothing_fits_a_gpu_smaller_than_the_weights() -> None:
    gpu = replace(H100, memory_bytes=48 * 2**30)
    assert most_sequences(LARGE, ALONE, gpu, 100) == parallel_model.kv_capacity(LARGE, ALONE, gpu) == 0
    assert points(LARGE, ALONE, gpu, [1], context=100, output=10) == []
    assert most_sequences(LARGE, ParallelConfig(2), gpu, 100) > 0


def test_rates_and_the_best_plan() -> None:
    step = model_step(LARGE, ParallelConfig(2), H100, batch=8, context=100)
    point = Point(ParallelConfig(2), 8, step, prompt_s=0.25, output=1000)
    # 1000 tokens of an answer take 1000 steps and eight prompts.
    assert 1000 / point.user_rate == pytest.approx(1000 * step.seconds + 8 * 0.25)
    assert point.gpu_rate == pytest.approx(8 * point.user_rate / 2)
    lonely = replace(point, batch=1)
    assert lonely.user_rate > point.user_rate
    assert best([lonely, point], 1) == point
    assert best([lonely, point], (lonely.user_rate + point.user_rate) / 2) == lonely
    assert best([lonely, point], 1e6) is None


def test_the_tables_of_the_documentation_are_what_the_program_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    section = PERFORMANCE.read_text().split("## Parallel plans")[1].split("\n## ")[0]
    assert main(["--batch", "1", "16", "64", "256", "1024"]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    assert all(row in printed.splitlines() for row in rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--plan", "3"], "64 query heads cannot be split evenly over 3 ranks"),
        (["--plan", "16"], "more than one server"),
        (["--plan", "4,3"], "engine.parallel.expert must divide engine.parallel.tensor"),
        (["--plan", "two"], "is no plan"),
        (["--batch", "0"], "is no positive number"),
        (["--context", "131072"], "together are at most 131072"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_wrong_flags_are_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    try:
        code = main(arguments)
    except SystemExit as stopped:  # argparse's own
        code = int(stopped.code or 0)
    assert code != 0
    assert said in capsys.readouterr().err


def test_the_plot_has_a_curve_for_each_plan(tmp_path: Path) -> None:
    for file in (tmp_path / "once.svg", tmp_path / "again.svg"):
        assert (
            main(
                ["--model", "20b", "--gpu", "h100", "--plan", "1", "4,2", "--batch", "1", "--plot", str(file)]
            )
            == 0
        )
    once, again = ((tmp_path / name).read_text() for name in ("once.svg", "again.svg"))
    assert once == again
    for text in ("TP1, to 256", "TP4 EP2, to 1024", "H100", "a model, not a measurement"):
        assert f">{text}" in once or text in once
    assert plan_name(ParallelConfig(4, 2)) == "TP4 EP2"
