"""The part of a model that a rank holds: every head, column, expert and row exactly once, or as
often as the plan says."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny_model import TINY
from workers.config import MAX_RANKS, ModelConfig, ParallelConfig
from workers.errors import ConfigError
from workers.model.make_checkpoint import preset_config
from workers.parallel.shard import Span, allowed_plans, plan_shards, vocab_lengths

PUBLISHED = [preset_config("20b"), preset_config("120b")]


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    kv_heads = draw(st.integers(1, 8))
    return replace(
        TINY,
        num_kv_heads=kv_heads,
        num_heads=kv_heads * draw(st.integers(1, 8)),
        num_experts=draw(st.integers(2, 20)),
        vocab_size=draw(st.integers(1, 300)),
        intermediate_size=32 * draw(st.integers(1, 12)),
    )


def covered(spans: list[Span]) -> list[int]:
    return sorted(index for span in spans for index in range(span.start, span.stop))


@given(model=models(), data=st.data())
def test_shards_cover_the_model(model: ModelConfig, data: st.DataObject) -> None:
    tensor, expert = data.draw(st.sampled_from(allowed_plans(model)))
    shards = plan_shards(model, ParallelConfig(tensor, expert))
    group = tensor // expert
    assert [shard.tp_rank for shard in shards] == list(range(tensor))
    assert covered([shard.heads for shard in shards]) == list(range(model.num_heads))
    assert covered([shard.vocab for shard in shards]) == list(range(model.vocab_size))
    assert tuple(shard.vocab.length for shard in shards) == vocab_lengths(model, tensor)
    copies = max(1, tensor // model.num_kv_heads)
    assert covered([shard.kv_heads for shard in shards]) == sorted([*range(model.num_kv_heads)] * copies)
    assert covered([shard.experts for shard in shards]) == sorted([*range(model.num_experts)] * group)
    for shard in shards:
        mates = [other for other in shards if other.ep_rank == shard.ep_rank]
        assert len(mates) == group
        assert {mate.experts for mate in mates} == {shard.experts}
        assert covered([mate.intermediate for mate in mates]) == list(range(model.intermediate_size))
        assert sum(mate.adds_down_bias for mate in mates) == 1
        # A rank's queries look at just the keys that it has.
        per_kv_head = model.num_heads // model.num_kv_heads
        assert {head // per_kv_head for head in range(shard.heads.start, shard.heads.stop)} == set(
            range(shard.kv_heads.start, shard.kv_heads.stop)
        )
    assert sum(shard.adds_output_bias for shard in shards) == 1
    for dimension in ("heads", "kv_heads", "vocab", "intermediate"):
        spans = [getattr(shard, dimension) for shard in shards]
        assert len({span.size for span in spans}) == 1, f"{dimension}: the ranks have different shapes"
        assert all(0 <= span.length <= span.size for span in spans)
    assert all(shard.intermediate.start % 32 == 0 for shard in shards)


def test_one_rank_holds_everything_without_padding() -> None:
    (shard,) = plan_shards(TINY, ParallelConfig())
    for span, size in (
        (shard.heads, 6),
        (shard.kv_heads, 3),
        (shard.vocab, 211),
        (shard.experts, 5),
        (shard.intermediate, 64),
    ):
        assert span == Span(0, size, size)


@pytest.mark.parametrize("model", PUBLISHED, ids=["20b", "120b"])
def test_plans_of_the_published_models(model: ModelConfig) -> None:
    powers = (1, 2, 4, 8, 16)
    assert allowed_plans(model) == [
        (tensor, expert) for tensor in powers for expert in powers if expert <= tensor
    ]
    # 90 groups of 32 columns over 4 ranks: two of 23 and two of 22, padded to 23.
    shards = plan_shards(model, ParallelConfig(4, 1))
    assert [shard.intermediate.length // 32 for shard in shards] == [23, 23, 22, 22]
    assert {shard.intermediate.size for shard in shards} == {23 * 32}


def test_the_default_splits_experts_over_all_ranks() -> None:
    assert [shard.experts.length for shard in plan_shards(PUBLISHED[1], ParallelConfig(8))] == [16] * 8


@pytest.mark.parametrize(
    ("model", "tensor", "expert", "said"),
    [
        (
            TINY,
            4,
            None,
            "6 query heads cannot be split evenly over 4 ranks; the nearest that can: tensor=3, expert=3",
        ),
        (
            replace(TINY, num_heads=12, num_kv_heads=6),
            4,
            2,
            "6 key-value heads can neither be split evenly over 4 ranks nor be repeated",
        ),
        (replace(TINY, num_experts=2), 6, 3, "2 experts cannot be split into 3 groups"),
        (TINY, 6, 1, "an expert has 2 groups of 32 intermediate columns, too few for 6 ranks"),
        (
            PUBLISHED[1],
            12,
            4,
            "64 query heads cannot be split evenly over 12 ranks; the nearest that can: tensor=8, expert=4;",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_what_can(
    model: ModelConfig, tensor: int, expert: int | None, said: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        plan_shards(model, ParallelConfig(tensor, expert))
    assert said in str(refusal.value)
    assert f"tensor={tensor}, expert={expert or tensor} cannot work" in str(refusal.value)


@given(model=models(), tensor=st.integers(1, MAX_RANKS), data=st.data())
def test_each_plan_is_allowed_or_refused(model: ModelConfig, tensor: int, data: st.DataObject) -> None:
    expert = data.draw(st.sampled_from([number for number in range(1, tensor + 1) if tensor % number == 0]))
    if (tensor, expert) in allowed_plans(model):
        assert len(plan_shards(model, ParallelConfig(tensor, expert))) == tensor
    else:
        with pytest.raises(ConfigError, match="the nearest that can: tensor="):
            plan_shards(model, ParallelConfig(tensor, expert))
