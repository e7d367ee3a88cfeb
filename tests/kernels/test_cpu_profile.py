"""Bytes and operations that a profile states, against values worked out by hand."""

import pytest
import torch

from kernels.attention import paged_attention, rope_and_store_kv
from kernels.cpu import native
from kernels.cpu.pointwise import converted
from kernels.cpu.profile import Profile, Work, difference
from kernels.embedding import embed
from kernels.moe import ExpertWeights, fused_experts, gate_topk
from kernels.mxfp4 import ROWS16, pack
from kernels.pointwise import add_rms_norm, rms_norm, yarn_cos_sin
from kernels.sampling import SamplingBatch, sample

ROPE = {
    "theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


def recorded(*operations: object) -> dict[str, Work]:
    profile = Profile()
    with profile.recording():
        for operation in operations:
            operation()  # type: ignore[operator]
    return profile.snapshot()


def only(work: dict[str, Work]) -> Work:
    [found] = work.values()
    return found


@pytest.mark.parametrize(
    ("window", "keys", "seen"), [(None, 5 + 20, 4 + 5 + 20), (8, 5 + 8, 4 + 5 + 8), (3, 4 + 3, 3 + 3 + 3)]
)
def test_attention_counts_the_keys_that_are_seen(window: int | None, keys: int, seen: int) -> None:
    """Two queries at the end of 5 tokens, one at the end of 20; 4 query heads and 2 KV heads of
    8."""
    q, kv_cache = torch.zeros(3, 4, 8), torch.zeros(2, 4, 16, 2, 8)
    table = torch.tensor([[1, 0], [2, 3]], dtype=torch.int32)
    lengths, rows = torch.tensor([5, 20], dtype=torch.int32), torch.tensor([0, 2, 3], dtype=torch.int32)
    work = recorded(
        lambda: paged_attention(q, kv_cache, table, lengths, rows, torch.zeros(4), scale=1.0, window=window)
    )
    assert list(work) == ["attention, all keys" if window is None else f"attention, window {window}"]
    found = only(work)
    assert found.calls == 1
    assert found.seconds > 0
    assert found.num_bytes == 2 * keys * 2 * 8 * 4 + 2 * 3 * 4 * 8 * 4
    assert found.num_flops == 4 * seen * 4 * 8


def test_experts_count_those_that_are_hit_here() -> None:
    gate_up, down = pack(torch.randn(3, 128, 96), ROWS16), pack(torch.randn(3, 96, 64), ROWS16)
    ids = torch.tensor(
        [[0, 4], [5, 6], [9, 1]], dtype=torch.int32
    )  # of experts 4 to 6: 4, 5 and 6, one token each
    held = ExpertWeights(
        *(gate_up, torch.zeros(3, 128), down, torch.zeros(3, 96)),
        swiglu_limit=7.0,
        swiglu_alpha=1.7,
        num_experts=10,
        first_expert=4,
    )
    work = only(recorded(lambda: fused_experts(torch.randn(3, 96), ids, torch.rand(3, 2), held)))
    weights = 3 * 96 * 64
    assert work.num_bytes == 3 * weights * 17 / 32 + 4 * 3 * 96
    assert work.num_flops == 2 * 3 * weights


def test_operations_of_a_layer() -> None:
    x, weight = torch.randn(5, 40).bfloat16(), torch.ones(40)
    qkv, kv_cache, angles = torch.randn(5, 8, 4), torch.zeros(2, 1, 16, 2, 4), torch.rand(5, 2)
    work = recorded(
        lambda: rms_norm(x, weight, 1e-5),
        lambda: add_rms_norm(x.clone(), x, weight, 1e-5),
        lambda: rope_and_store_kv(qkv, 4, angles, angles, kv_cache, torch.arange(5)),
        lambda: gate_topk(torch.randn(5, 7), 2),
        lambda: sample(torch.randn(2, 30), SamplingBatch()),
        lambda: embed(torch.arange(3), torch.randn(7, 12).bfloat16()),
        lambda: yarn_cos_sin(torch.arange(5), 10, **ROPE),
        lambda: converted(torch.randn(3, 4), torch.bfloat16),
    )
    assert list(work) == [
        "norms",
        "RoPE and KV store",
        "gate top-k",
        "sampling",
        "embedding",
        "rotary angles",
        "conversions",
    ]
    assert work["embedding"].num_bytes == 2 * 3 * 12 * 2
    assert work["rotary angles"].num_bytes == 5 * 8 + 2 * 5 * 5 * 4
    assert work["conversions"].num_bytes == 12 * (4 + 2)
    assert work["norms"].calls == 2
    assert work["norms"].num_bytes == 5 * 40 * 2 * (2 + 4)
    assert work["RoPE and KV store"].num_bytes == 5 * (2 * 4 + 2 * 4) * 4 * 4
    assert work["gate top-k"].num_bytes == 5 * 7 * 4
    assert work["sampling"].num_bytes == 2 * 30 * 4


def test_nothing_is_recorded_before_and_after() -> None:
    profile = Profile()
    logits = torch.randn(2, 30)
    sample(logits, SamplingBatch())
    with profile.recording():
        sample(logits, SamplingBatch())
        first = profile.snapshot()
        sample(logits, SamplingBatch())
    sample(logits, SamplingBatch())
    assert profile.snapshot()["sampling"].calls == 2
    between = difference(profile.snapshot(), first)["sampling"]
    assert between.calls == 1
    assert between.num_bytes == first["sampling"].num_bytes


def test_an_operation_that_fails_leaves_nothing_behind() -> None:
    def broken(name: str, arguments: object, seconds: float) -> None:
        raise RuntimeError(name)

    with pytest.raises(RuntimeError, match="sample"), native.observing(broken):
        sample(torch.randn(2, 30), SamplingBatch())
    assert sample(torch.eye(3), SamplingBatch()).token_ids.tolist() == [0, 1, 2]
