"""The size of the KV cache and the context that it holds: arithmetic, without torch.

Both groups share the memory. A block of a group is BLOCK_SIZE positions of K and V of all layers of
that group.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kernels.formats import fp8_refusal
from workers.config import (
    BLOCK_SIZE,
    CacheConfig,
    Dtype,
    EngineConfig,
    KVDtype,
    ModelConfig,
    SchedulerConfig,
    longest_context,
)
from workers.errors import ConfigError
from workers.kv_cache.manager import num_blocks_for, sliding_blocks_per_sequence
from workers.parallel.shard import RankShard

logger = logging.getLogger(__name__)

DTYPE_BYTES: dict[Dtype | KVDtype, int] = {"bfloat16": 2, "float32": 4, "fp8_e4m3": 1}

CPU_MEMORY_SHARE = 0.25
CPU_MEMORY_BYTES = 4 * 1024**3
"""Maximum bytes of the cache on a CPU unless one sequence needs more: the host is usually
shared."""
SHORTEST_CONTEXT = 2048
"""Shortest context in tokens that is chosen if max_model_len is not set: a cache too small for it
is more likely a mistake."""


@dataclass(frozen=True, slots=True)
class KVCachePlan:
    """The sizes of both groups.

    Attributes:
        num_full_blocks, num_sliding_blocks: including NULL_BLOCK; 0 if the group has no layers.
        total_bytes: size of all tensors.
        kv_capacity_tokens: tokens, over all sequences, that the full group holds (the sliding
            group, if no layer is full).
        max_model_len: maximum tokens of one sequence, resolved.
    """

    num_full_blocks: int
    num_sliding_blocks: int
    total_bytes: int
    kv_capacity_tokens: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Sizes of one group: bytes of a block, blocks for one sequence of max_model_len, blocks for
    all tokens of a step, and the maximum number of useful blocks."""

    block_bytes: int
    minimum: int
    step: int
    useful: int


@dataclass(frozen=True, slots=True)
class KVMemory:
    """Memory that a rank has for its KV cache.

    Attributes:
        source: where num_bytes comes from, for errors.
    """

    num_bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Memory of one GPU, and its uses besides the KV cache.

    Attributes:
        used_bytes: used by this rank's weights and by everything else on the GPU.
        activation_bytes: additional bytes at the peak of the largest step.
        graph_bytes: bytes of CUDA graphs that are still to be captured.
    """

    total_bytes: int
    used_bytes: int
    activation_bytes: int = 0
    graph_bytes: int = 0


def check_kv_dtype(dtype: KVDtype, target: str, *, way_out: str = "set engine.cache.dtype to auto") -> None:
    """Refuse a cache for which a device has no kernel.

    Args:
        target: the device's architecture, as `kernels.backend.architecture` names it.
        way_out: advice in the error.
    Raises:
        ConfigError: the device has no kernel for such a cache.
    """
    if dtype == "fp8_e4m3" and (reason := fp8_refusal(target)) is not None:
        raise ConfigError(f"{reason}; {way_out}")


def cpu_kv_memory(
    model: ModelConfig,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    *,
    dtype: KVDtype,
    max_model_len: int | None,
    ranks_on_host: int = 1,
    weight_bytes: int = 0,
) -> KVMemory:
    """Return `cache.memory_bytes`, or memory chosen from what is free on this host, which its ranks
    share; never more than is useful.

    Args:
        model: with the key-value heads of the rank.
        max_model_len: as in EngineConfig.
        weight_bytes: bytes that each rank has still to load.
    Raises:
        ConfigError: the weights alone exceed the host's memory.
    """
    if cache.memory_bytes is not None:
        return KVMemory(cache.memory_bytes, "engine.cache.memory_bytes")
    minimum, useful = _bounds(model, scheduler, dtype, max_model_len)
    available = host_free_bytes() // ranks_on_host
    free = available - weight_bytes
    if free <= 0:
        raise ConfigError(
            f"the model does not fit: {readable(weight_bytes)} of weights exceed the {readable(available)} "
            f"of free memory on this host{' for each of its ranks' if ranks_on_host > 1 else ''}"
        )
    num_bytes = min(int(free * CPU_MEMORY_SHARE), max(CPU_MEMORY_BYTES // ranks_on_host, minimum), useful)
    return KVMemory(
        num_bytes, f"chosen from {readable(free)} free on cpu; override with engine.cache.memory_bytes"
    )


def gpu_kv_memory(
    model: ModelConfig,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    *,
    dtype: KVDtype,
    max_model_len: int | None,
    gpu: GpuMemory,
) -> KVMemory:
    """Return `cache.memory_bytes`, or what `cache.gpu_memory_utilization` leaves of a GPU; never
    more than is useful.

    Args:
        model: with the key-value heads of the rank.
        max_model_len: as in EngineConfig.
    Raises:
        ConfigError: the GPU has too little memory even without a KV cache.
    """
    if cache.memory_bytes is not None:
        return KVMemory(cache.memory_bytes, "engine.cache.memory_bytes")
    _, useful = _bounds(model, scheduler, dtype, max_model_len)
    left = (
        int(gpu.total_bytes * cache.gpu_memory_utilization)
        - gpu.used_bytes
        - gpu.activation_bytes
        - gpu.graph_bytes
    )
    if left <= 0:
        raise ConfigError(
            f"the model does not fit: {readable(gpu.used_bytes)} in use, "
            f"{readable(gpu.activation_bytes)} for activations and {readable(gpu.graph_bytes)} for "
            f"graphs leave nothing of {cache.gpu_memory_utilization:.0%} of the GPU's "
            f"{readable(gpu.total_bytes)}; split it over more ranks (engine.parallel.tensor), take a GPU "
            f"with more memory, or raise engine.cache.gpu_memory_utilization"
        )
    source = (
        f"{cache.gpu_memory_utilization:.0%} of the GPU's {readable(gpu.total_bytes)} less "
        f"{readable(gpu.used_bytes)} in use, "
        f"{readable(gpu.activation_bytes)} for activations and {readable(gpu.graph_bytes)} for graphs; "
        "adjust with engine.cache.gpu_memory_utilization"
    )
    return KVMemory(min(left, useful), source)


def _bounds(
    model: ModelConfig, scheduler: SchedulerConfig, dtype: KVDtype, max_model_len: int | None
) -> tuple[int, int]:
    """Return the bytes that one sequence of the longest context needs to be computed in whole
    steps, and the most bytes that can be useful."""
    length = longest_context(model, max_model_len)
    useful = sum(group.useful * group.block_bytes for group in _groups(model, scheduler, dtype, length))
    return _needed(model, scheduler, dtype, length, whole_steps=True), useful


def split_memory(
    model: ModelConfig,
    scheduler: SchedulerConfig,
    *,
    dtype: KVDtype,
    max_model_len: int | None,
    memory_bytes: int,
    source: str = "engine.cache.memory_bytes",
) -> KVCachePlan:
    """Choose the context and the number of blocks of each group.

    First each group gets what one sequence of max_model_len needs. Half of the rest goes to the
    sliding group, until it holds the windows of max_num_seqs running sequences, as many again for
    the prefix cache, and the blocks of one step; everything else goes to the full group.

    Args:
        model: with the key-value heads of the rank.
        max_model_len: None for the longest that fits, at most the model's.
        source: where memory_bytes comes from, for errors.
    Raises:
        ConfigError: one sequence of max_model_len does not fit; if that is None, not even one of
            SHORTEST_CONTEXT.
    """
    if max_model_len is None:
        max_model_len = _fitting_context(model, scheduler, dtype, memory_bytes, source)
    full, sliding = _groups(model, scheduler, dtype, max_model_len)
    rest = memory_bytes - full.minimum * full.block_bytes - sliding.minimum * sliding.block_bytes
    if rest < 0:
        raise ConfigError(_does_not_fit(model, scheduler, dtype, max_model_len, memory_bytes, source))
    num_full, num_sliding = full.minimum, sliding.minimum
    if sliding.block_bytes:
        share = rest // 2 if full.block_bytes else rest
        extra = share // sliding.block_bytes
        if full.block_bytes:
            extra = min(extra, max(sliding.useful - sliding.minimum, 0))
        num_sliding += extra
        rest -= extra * sliding.block_bytes
    if full.block_bytes:
        num_full += rest // full.block_bytes
    return KVCachePlan(
        num_full_blocks=num_full,
        num_sliding_blocks=num_sliding,
        total_bytes=num_full * full.block_bytes + num_sliding * sliding.block_bytes,
        kv_capacity_tokens=((num_full or num_sliding) - 1) * BLOCK_SIZE,
        max_model_len=max_model_len,
    )


def cache_shape(model: ModelConfig, shard: RankShard) -> ModelConfig:
    """Return the model as a rank's KV cache sees it: with this rank's key-value heads."""
    return replace(model, num_kv_heads=shard.kv_heads.length)


def plan_kv_cache(
    config: EngineConfig, model: ModelConfig, shard: RankShard, memories: Sequence[KVMemory]
) -> KVCachePlan:
    """Return the one cache size and context that all ranks use, from the rank with the least
    memory.

    Raises:
        ConfigError: as `split_memory`.
    """
    least = min(memories, key=lambda memory: memory.num_bytes)
    plan = split_memory(
        cache_shape(model, shard),
        config.scheduler,
        dtype=config.kv_dtype,
        max_model_len=config.max_model_len,
        memory_bytes=least.num_bytes,
        source=least.source,
    )
    if plan.max_model_len < longest_context(model, config.max_model_len):
        logger.warning("%s", shorter_context(model, plan, config.kv_dtype, least))
    return plan


def host_free_bytes() -> int:
    """Return the memory that can be allocated on this host now, by the system and the process's
    control group."""
    return min(_system_free_bytes(), _cgroup_free_bytes())


def _system_free_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        # Not Linux: half of the installed memory, leaving the rest to the system.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _cgroup_free_bytes(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory left in a version 2 control group, as containers see it; the largest
    integer without a limit."""
    unlimited = 2**63 - 1
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
    except (OSError, ValueError):
        return unlimited
    return unlimited if limit == "max" else max(int(limit) - used, 0)


def _groups(
    model: ModelConfig, scheduler: SchedulerConfig, dtype: KVDtype, max_model_len: int
) -> tuple[_Group, _Group]:
    """Return the full and the sliding group, all zeros for a group without layers. Blocks include
    NULL_BLOCK."""
    layer_bytes = 2 * BLOCK_SIZE * model.num_kv_heads * model.head_dim * DTYPE_BYTES[dtype]
    num_full_layers = sum(window is None for window in model.layer_windows)
    num_sliding_layers = len(model.layer_windows) - num_full_layers
    longest = num_blocks_for(max_model_len)
    step = num_blocks_for(min(scheduler.max_num_batched_tokens, scheduler.max_num_seqs * max_model_len))
    full = sliding = _Group(0, 0, 0, 0)
    if num_full_layers:
        full = _Group(num_full_layers * layer_bytes, longest + 1, step, scheduler.max_num_seqs * longest + 1)
    if num_sliding_layers:
        window = model.sliding_window
        assert window is not None
        sequence = sliding_blocks_per_sequence(window, max_model_len)
        sliding = _Group(
            num_sliding_layers * layer_bytes,
            sequence + 1,
            step,
            2 * scheduler.max_num_seqs * sequence + step + 1,
        )
    return full, sliding


def _needed(
    model: ModelConfig, scheduler: SchedulerConfig, dtype: KVDtype, length: int, *, whole_steps: bool = False
) -> int:
    """Return the bytes that one sequence of `length` tokens needs.

    Args:
        whole_steps: advance by all tokens of a step. Otherwise it may advance one block at a time,
            which makes long prompts slow: `split_memory` gives the sliding group half of what is
            beyond the minimum, so that part is counted twice, once for each group.
    """
    groups = _groups(model, scheduler, dtype, length)
    return sum(
        (group.minimum + (group.step if whole_steps and groups[1].step else 0)) * group.block_bytes
        for group in groups
    )


def _longest_fitting(
    model: ModelConfig,
    scheduler: SchedulerConfig,
    dtype: KVDtype,
    limit: int,
    memory_bytes: int,
    *,
    whole_steps: bool = False,
) -> int:
    """Return the maximum number of tokens up to `limit`, in whole blocks, such that one sequence of
    them fits; 0 if not even one block does."""
    fits, too_long = 0, num_blocks_for(limit)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if _needed(model, scheduler, dtype, middle * BLOCK_SIZE, whole_steps=whole_steps) <= memory_bytes:
            fits = middle
        else:
            too_long = middle
    return fits * BLOCK_SIZE


def _fitting_context(
    model: ModelConfig, scheduler: SchedulerConfig, dtype: KVDtype, memory_bytes: int, source: str
) -> int:
    """Return the model's context, or the longest that fits, with room to compute prompts in whole
    steps if that leaves at least SHORTEST_CONTEXT."""
    longest = model.max_context_len
    if _needed(model, scheduler, dtype, longest) <= memory_bytes:
        return longest
    shortest = min(SHORTEST_CONTEXT, longest)
    if (needed := _needed(model, scheduler, dtype, shortest)) > memory_bytes:
        fits = _longest_fitting(model, scheduler, dtype, shortest, memory_bytes)
        raise ConfigError(
            f"a KV cache of {readable(memory_bytes)} ({source}) cannot hold one sequence of {shortest} "
            f"tokens, the shortest context chosen without engine.max_model_len, which needs "
            f"{readable(needed)}: {_advice(fits)}"
        )
    return max(_longest_fitting(model, scheduler, dtype, longest, memory_bytes, whole_steps=True), shortest)


def _does_not_fit(
    model: ModelConfig,
    scheduler: SchedulerConfig,
    dtype: KVDtype,
    max_model_len: int,
    memory_bytes: int,
    source: str,
) -> str:
    fits = _longest_fitting(model, scheduler, dtype, max_model_len, memory_bytes)
    return (
        f"a KV cache of {readable(memory_bytes)} ({source}) cannot hold one sequence of engine.max_model_len "
        f"{max_model_len}, "
        f"which needs {readable(_needed(model, scheduler, dtype, max_model_len))}: {_advice(fits)}"
    )


def _advice(fits: int) -> str:
    return (
        f"set engine.max_model_len to at most {fits} or give the cache more memory"
        if fits
        else "give the cache more memory"
    )


def shorter_context(model: ModelConfig, plan: KVCachePlan, dtype: KVDtype, memory: KVMemory) -> str:
    """Return the warning for a context shorter than the model's that was not requested."""
    fp8 = "" if dtype == "fp8_e4m3" else ", or set engine.cache.dtype to fp8 where the device has it"
    return (
        f"the context is {plan.max_model_len} tokens of the model's {model.max_context_len}: the most "
        f"that a KV cache of {readable(memory.num_bytes)} ({memory.source}) can hold of one sequence. "
        f"For more, give the cache more memory{fp8}"
    )


def readable(num_bytes: int) -> str:
    """Format bytes for users; exact below 1 MiB."""
    for unit, size in (("GiB", 1024**3), ("MiB", 1024**2)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} bytes"
