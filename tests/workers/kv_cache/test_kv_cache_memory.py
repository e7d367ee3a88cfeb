"""The split of memory between the groups, and the resulting tensors."""

import os
import re
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from workers.config import CacheConfig, Dtype, ModelConfig, SchedulerConfig
from workers.errors import ConfigError
from workers.kv_cache import memory as kv_memory
from workers.kv_cache.manager import KVCacheManager, num_blocks_for, sliding_blocks_per_sequence
from workers.kv_cache.memory import GpuMemory, KVCachePlan, cpu_kv_memory, gpu_kv_memory, split_memory
from workers.kv_cache.tensors import allocate_kv_caches

GIB = 1024**3
CPU = torch.device("cpu")


def model(
    num_full: int, num_sliding: int, *, kv_heads: int = 3, head_dim: int = 20, window: int = 40
) -> ModelConfig:
    return ModelConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_layers=num_full + num_sliding,
        num_heads=6,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_experts=4,
        num_experts_per_token=2,
        layer_windows=(window,) * num_sliding + (None,) * num_full,
        max_context_len=4096,
    )


BIG = model(18, 18, kv_heads=8, head_dim=64, window=128)


def test_gpt_oss_120b_in_40_gib() -> None:
    plan = split_memory(
        BIG, SchedulerConfig(256, 2048), dtype="bfloat16", max_model_len=131072, memory_bytes=40 * GIB
    )
    block = 18 * 2 * 16 * 8 * 64 * 2
    assert plan.num_sliding_blocks == 2 * 256 * 9 + 128 + 1
    assert plan.num_full_blocks == (40 * GIB - plan.num_sliding_blocks * block) // block
    assert plan.total_bytes == (plan.num_full_blocks + plan.num_sliding_blocks) * block
    assert plan.kv_capacity_tokens == (plan.num_full_blocks - 1) * 16


def test_scarce_memory_is_shared_beyond_one_sequence() -> None:
    """120 blocks of equal size: 65 and 5 are the least for a sequence of 1024 and its window, half
    of the other 50 go to each group."""
    memory_bytes = 120 * 2 * 16 * 3 * 20 * 4
    plan = split_memory(
        model(1, 1), SchedulerConfig(64, 512), dtype="float32", max_model_len=1024, memory_bytes=memory_bytes
    )
    assert (plan.num_full_blocks, plan.num_sliding_blocks) == (65 + 25, 5 + 25)


@settings(deadline=None)
@given(
    layers=st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any),
    window=st.sampled_from([1, 16, 17, 40, 128]),
    max_model_len=st.integers(1, 500),
    max_num_seqs=st.integers(1, 20),
    memory_bytes=st.integers(0, 4_000_000),
)
def test_a_plan_fits_the_memory_and_a_sequence_or_says_what_would(
    layers: tuple[int, int], window: int, max_model_len: int, max_num_seqs: int, memory_bytes: int
) -> None:
    config = model(*layers, window=window)
    layer_block = 2 * 16 * 3 * 20 * 4

    def plan(length: int) -> kv_memory.KVCachePlan:
        return split_memory(
            config,
            SchedulerConfig(max_num_seqs, 64),
            dtype="float32",
            max_model_len=length,
            memory_bytes=memory_bytes,
        )

    minimum = num_blocks_for(max_model_len) + 1
    num_needed = layers[0] * minimum + layers[1] * (sliding_blocks_per_sequence(window, max_model_len) + 1)
    if num_needed * layer_block > memory_bytes:
        with pytest.raises(ConfigError, match=f"max_model_len {max_model_len},") as raised:
            plan(max_model_len)
        fitting = re.search(r"set engine.max_model_len to at most (\d+) or", str(raised.value))
        if fitting is not None:
            assert 0 < int(fitting[1]) < max_model_len
            plan(int(fitting[1]))
        with pytest.raises(ConfigError):
            plan(min(int(fitting[1]) + 1 if fitting else 1, max_model_len))
        return
    result = plan(max_model_len)
    assert (result.num_full_blocks > 0, result.num_sliding_blocks > 0) == (layers[0] > 0, layers[1] > 0)
    assert result.total_bytes == layer_block * (
        layers[0] * result.num_full_blocks + layers[1] * result.num_sliding_blocks
    )
    assert memory_bytes - layer_block * sum(layers) < result.total_bytes <= memory_bytes
    kv = KVCacheManager(
        num_full_blocks=result.num_full_blocks,
        num_sliding_blocks=result.num_sliding_blocks,
        window=config.sliding_window,
    )
    assert kv.fits(max_model_len)


@settings(deadline=None)
@given(
    layers=st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any),
    window=st.sampled_from([1, 16, 17, 40, 128]),
    model_context=st.sampled_from([100, 2048, 2050, 5000, 9000]),
    max_num_seqs=st.integers(1, 20),
    num_layer_blocks=st.integers(0, 3000),
)
def test_without_a_setting_the_context_is_as_long_as_fits(
    layers: tuple[int, int], window: int, model_context: int, max_num_seqs: int, num_layer_blocks: int
) -> None:
    config = replace(model(*layers, window=window), max_context_len=model_context)
    num_bytes = num_layer_blocks * 2 * 16 * 3 * 20 * 4
    scheduler = SchedulerConfig(max_num_seqs, 64)

    def plan(length: int | None) -> KVCachePlan:
        return split_memory(config, scheduler, dtype="float32", max_model_len=length, memory_bytes=num_bytes)

    def fits(length: int) -> bool:
        num_full, num_sliding = num_blocks_for(length) + 1, sliding_blocks_per_sequence(window, length) + 1
        return layers[0] * num_full + layers[1] * num_sliding <= num_layer_blocks

    shortest = min(kv_memory.SHORTEST_CONTEXT, model_context)
    if not fits(shortest):
        with pytest.raises(
            ConfigError,
            match=rf"cannot hold one sequence of {shortest} tokens, .* give the cache more memory$",
        ):
            plan(None)
        return
    result = plan(None)
    assert result == plan(result.max_model_len), "as if it had been set"
    if fits(model_context):
        assert result.max_model_len == model_context
        return
    assert shortest <= result.max_model_len < model_context
    assert result.max_model_len % 16 == 0 or result.max_model_len == shortest
    # What one more block could not have had beside it: the 4 blocks of a step of 64 tokens, in both
    # groups.
    step = 4 * sum(layers) if layers[1] else 0
    longer = result.max_model_len + 16
    assert (
        layers[0] * num_blocks_for(longer)
        + layers[1] * sliding_blocks_per_sequence(window, longer)
        + sum(layers)
        + step
        > num_layer_blocks
    )


LAPTOP = replace(model(12, 12, kv_heads=8, head_dim=64, window=128), max_context_len=131072)
"""gpt-oss-20b: 384 KiB a block of either group."""


def test_the_context_of_gpt_oss_20b_in_little_memory() -> None:
    """2730 blocks: of the full group 1 + the context's, of the sliding one 1 + 9 of a window, and a
    step's 128 in both."""
    plan = split_memory(LAPTOP, SchedulerConfig(), dtype="bfloat16", max_model_len=None, memory_bytes=GIB)
    assert plan.max_model_len == (2730 - 1 - 10 - 2 * 128) * 16 == 39408
    assert plan.num_sliding_blocks == 10 + 128, "prompts are computed by whole steps"
    assert plan.num_full_blocks == 2730 - 138
    halves = split_memory(LAPTOP, SchedulerConfig(), dtype="fp8_e4m3", max_model_len=None, memory_bytes=GIB)
    assert halves.max_model_len > 2 * plan.max_model_len


def test_the_model_s_context_is_kept_where_it_just_fits() -> None:
    block = 12 * 2 * 16 * 8 * 64 * 2
    just = (8192 + 1 + 10) * block
    contexts = [
        split_memory(
            LAPTOP, SchedulerConfig(), dtype="bfloat16", max_model_len=None, memory_bytes=num_bytes
        ).max_model_len
        for num_bytes in (just, just - 1)
    ]
    assert contexts == [131072, 131072 - 16 - 2 * 128 * 16]


def test_a_context_that_was_set_is_not_shortened() -> None:
    with pytest.raises(
        ConfigError,
        match=r"of engine.max_model_len 131072, .*: set engine.max_model_len to at most 43504 or",
    ):
        split_memory(LAPTOP, SchedulerConfig(), dtype="bfloat16", max_model_len=131072, memory_bytes=GIB)


@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [
        (
            40 << 20,
            "a KV cache of 40.00 MiB (here) {}: set engine.max_model_len to at most 1520 or give the cache "
            "more memory",
        ),
        (0, "a KV cache of 0 bytes (here) {}: give the cache more memory"),
    ],
)
def test_a_cache_for_next_to_nothing_is_refused_by_default_too(num_bytes: int, said: str) -> None:
    why = (
        "cannot hold one sequence of 2048 tokens, the shortest context chosen without "
        "engine.max_model_len, which needs 52.12 MiB"
    )
    with pytest.raises(ConfigError) as raised:
        split_memory(
            LAPTOP,
            SchedulerConfig(),
            dtype="bfloat16",
            max_model_len=None,
            memory_bytes=num_bytes,
            source="here",
        )
    assert str(raised.value) == said.format(why)


def test_the_context_follows_from_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_memory, "host_free_bytes", lambda: 4 * GIB)
    assert on_cpu(LAPTOP, max_model_len=None).max_model_len == 39408
    monkeypatch.setattr(kv_memory, "host_free_bytes", lambda: 64 * GIB)
    assert on_cpu(LAPTOP, max_model_len=None).max_model_len == 131072
    memory = gpu_kv_memory(
        LAPTOP,
        CacheConfig(),
        SchedulerConfig(),
        dtype="bfloat16",
        max_model_len=None,
        gpu=GpuMemory(total_bytes=20 * GIB, used_bytes=16 * GIB, activation_bytes=GIB),
    )
    plan = split_memory(
        LAPTOP, SchedulerConfig(), dtype="bfloat16", max_model_len=None, memory_bytes=memory.num_bytes
    )
    assert plan.max_model_len == 39408  # 90 % of 20 GiB, less 17


def on_cpu(
    shape: ModelConfig,
    cache: CacheConfig | None = None,
    scheduler: SchedulerConfig | None = None,
    *,
    dtype: Dtype = "bfloat16",
    max_model_len: int | None,
    ranks_on_host: int = 1,
) -> KVCachePlan:
    cache, scheduler = cache or CacheConfig(), scheduler or SchedulerConfig()
    memory = cpu_kv_memory(
        shape, cache, scheduler, dtype=dtype, max_model_len=max_model_len, ranks_on_host=ranks_on_host
    )
    return split_memory(
        shape,
        scheduler,
        dtype=dtype,
        max_model_len=max_model_len,
        memory_bytes=memory.num_bytes,
        source=memory.source,
    )


def test_the_ranks_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_memory, "host_free_bytes", lambda: 64 * GIB)
    assert on_cpu(BIG, max_model_len=4096, ranks_on_host=4).total_bytes == pytest.approx(GIB, rel=5e-3)
    monkeypatch.setattr(kv_memory, "host_free_bytes", lambda: 8 * GIB)
    assert on_cpu(BIG, max_model_len=4096, ranks_on_host=4).total_bytes == pytest.approx(0.5 * GIB, rel=1e-2)


@pytest.mark.parametrize(
    ("utilization", "used", "activations", "graphs", "expected"),
    [
        (0.9, 60 * GIB, 2 * GIB, 0, 10 * GIB),
        (0.9, 60 * GIB, 2 * GIB, 3 * GIB, 7 * GIB),
        (0.5, 30 * GIB, GIB, 0, 9 * GIB),
        (1.0, 79 * GIB, 0, 0, GIB),
    ],
)
def test_a_gpu_gives_what_its_share_leaves(
    utilization: float, used: int, activations: int, graphs: int, expected: int
) -> None:
    memory = gpu_kv_memory(
        BIG,
        CacheConfig(gpu_memory_utilization=utilization),
        SchedulerConfig(),
        dtype="bfloat16",
        max_model_len=131072,
        gpu=GpuMemory(
            total_bytes=80 * GIB, used_bytes=used, activation_bytes=activations, graph_bytes=graphs
        ),
    )
    assert memory.num_bytes == pytest.approx(expected, abs=2)
    assert f"{utilization:.0%} of the GPU's 80.00 GiB" in memory.source


def test_a_model_that_leaves_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as raised:
        gpu_kv_memory(
            BIG,
            CacheConfig(),
            SchedulerConfig(),
            dtype="bfloat16",
            max_model_len=None,
            gpu=GpuMemory(total_bytes=80 * GIB, used_bytes=72 * GIB, activation_bytes=GIB),
        )
    assert str(raised.value) == (
        "the model does not fit: 72.00 GiB in use, 1.00 GiB for activations and 0 bytes for graphs leave "
        "nothing of 90% of the GPU's "
        "80.00 GiB; split it over more ranks (engine.parallel.tensor), take a GPU with more memory, or raise "
        "engine.cache.gpu_memory_utilization"
    )
    monkeypatch.setattr(kv_memory, "host_free_bytes", lambda: 20 * GIB)
    with pytest.raises(
        ConfigError,
        match=r"^the model does not fit: 11.00 GiB .* the 10.00 GiB of free memory .* for each of its ranks$",
    ):
        cpu_kv_memory(
            BIG,
            CacheConfig(),
            SchedulerConfig(),
            dtype="bfloat16",
            max_model_len=None,
            ranks_on_host=2,
            weight_bytes=11 * GIB,
        )


def test_the_operator_decides_on_a_gpu_too() -> None:
    memory = gpu_kv_memory(
        BIG,
        CacheConfig(3 * GIB),
        SchedulerConfig(),
        dtype="bfloat16",
        max_model_len=131072,
        gpu=GpuMemory(total_bytes=GIB, used_bytes=GIB),
    )
    assert memory.num_bytes == 3 * GIB


def test_the_error_has_the_numbers() -> None:
    with pytest.raises(ConfigError) as raised:
        on_cpu(BIG, CacheConfig(GIB), max_model_len=131072)
    # 1 GiB = 1820 blocks of 589,824 bytes; 10 for the window, 1 for block 0, so 1809 * 16 tokens.
    assert str(raised.value) == (
        "a KV cache of 1.00 GiB (engine.cache.memory_bytes) cannot hold one sequence of "
        "engine.max_model_len 131072, which needs 4.51 GiB: "
        "set engine.max_model_len to at most 28944 or give the cache more memory"
    )


@pytest.mark.parametrize(
    ("free", "max_model_len", "expected"),
    [
        (
            64 * GIB,
            131072,
            4.646 * GIB,
        ),  # more than 4 GiB: 4.51 for one sequence, the rest to compute it by whole steps
        (64 * GIB, 4096, 4 * GIB),
        (8 * GIB, 4096, 2 * GIB),
    ],
)
def test_on_a_cpu_the_choice_is_modest(
    monkeypatch: pytest.MonkeyPatch, free: int, max_model_len: int, expected: float
) -> None:
    monkeypatch.setattr(kv_memory, "host_free_bytes", lambda: free)
    plan = on_cpu(BIG, max_model_len=max_model_len)
    assert plan.total_bytes == pytest.approx(expected, rel=2e-3)
    # A window and the 2048 tokens of a step.
    assert plan.num_sliding_blocks >= 10 + 2048 // 16


def test_what_was_chosen_is_said_when_it_is_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_memory, "host_free_bytes", lambda: GIB)
    with pytest.raises(
        ConfigError,
        match=r"256\.00 MiB \(chosen from 1\.00 GiB free on cpu; override with engine\.cache\.memory_bytes\)",
    ):
        on_cpu(BIG, max_model_len=131072)


def test_no_more_is_chosen_than_all_sequences_could_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_memory, "host_free_bytes", lambda: 64 * GIB)
    plan = on_cpu(model(1, 1), scheduler=SchedulerConfig(4, 64), dtype="float32", max_model_len=100)
    # Four sequences of 7 full blocks; twice four windows of 4 sliding blocks, and the 4 of a step;
    # block 0 in each.
    assert plan.num_full_blocks + plan.num_sliding_blocks == (4 * 7 + 1) + (2 * 4 * 4 + 4 + 1)
    assert plan.num_full_blocks > 4 * 7
    assert plan.num_sliding_blocks > 4 * 4


def test_free_memory_is_that_of_the_machine_or_the_control_group(tmp_path: Path) -> None:
    free = kv_memory.host_free_bytes()
    assert 0 < free < 2**50
    assert kv_memory._cgroup_free_bytes(tmp_path) == 2**63 - 1
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert kv_memory._cgroup_free_bytes(tmp_path) == 2**63 - 1
    (tmp_path / "memory.max").write_text("1000\n")
    assert kv_memory._cgroup_free_bytes(tmp_path) == 700


def test_tensors_have_the_shapes_of_their_layers() -> None:
    config = replace(model(2, 3), layer_windows=(40, None, 40, None, 40))
    plan = split_memory(
        config, SchedulerConfig(2, 64), dtype="bfloat16", max_model_len=100, memory_bytes=1_000_000
    )
    caches = allocate_kv_caches(config, plan, dtype="bfloat16", device=CPU)
    sizes = [plan.num_sliding_blocks, plan.num_full_blocks] * 2 + [plan.num_sliding_blocks]
    assert plan.num_sliding_blocks != plan.num_full_blocks
    assert [tuple(cache.shape) for cache in caches] == [(2, size, 16, 3, 20) for size in sizes]
    assert {cache.dtype for cache in caches} == {torch.bfloat16}
    assert sum(cache.nbytes for cache in caches) == plan.total_bytes


def test_a_cache_costs_no_memory_before_it_is_written() -> None:
    config = replace(model(2, 3), layer_windows=(40, None))
    plan = split_memory(
        config, SchedulerConfig(2, 64), dtype="bfloat16", max_model_len=100, memory_bytes=500_000_000
    )
    before = _resident_bytes()
    caches = allocate_kv_caches(config, plan, dtype="bfloat16", device=CPU)
    assert sum(cache.nbytes for cache in caches) > 400_000_000
    assert _resident_bytes() - before < 50_000_000


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_too_little_memory_is_a_config_error() -> None:
    plan = split_memory(BIG, SchedulerConfig(), dtype="bfloat16", max_model_len=1000, memory_bytes=2**55)
    with pytest.raises(ConfigError, match=r"cannot be allocated on cpu: lower cache\.memory_bytes"):
        allocate_kv_caches(BIG, plan, dtype="bfloat16", device=CPU)
