"""GPUs by name: their data sheets, and the KV cache of a rank on one, by arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from workers.config import CacheConfig, KVDtype, ModelConfig, SchedulerConfig
from workers.kv_cache.memory import (
    GpuMemory,
    KVCachePlan,
    cache_shape,
    check_kv_dtype,
    gpu_kv_memory,
    split_memory,
)
from workers.parallel.shard import RankShard

GIB = 2**30
_MIB = 2**20
RESERVE_BYTES = 3 * GIB
"""Bytes reserved for activations, CUDA graphs and libraries: an assumption here; an engine measures
it."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of a server with eight of them (SXM or OAM; the L40S on PCIe), as in its data sheet.

    Attributes:
        memory_bytes: as the driver reports it.
        memory_bandwidth: bytes per second.
        bf16_flops: dense matrix products, operations per second.
        link_bandwidth: bytes per second to the other GPUs of its server, in one direction (NVLink,
            Infinity Fabric, PCIe).
        target: its architecture, as compilers name it.
    """

    memory_bytes: int
    memory_bandwidth: float
    bf16_flops: float
    link_bandwidth: float
    target: str


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "a100": Gpu(81_920 * _MIB, 2.04e12, 312e12, 300e9, "sm_80"),
        "l40s": Gpu(46_068 * _MIB, 0.864e12, 362e12, 32e9, "sm_89"),
        "h100": Gpu(81_559 * _MIB, 3.35e12, 989e12, 450e9, "sm_90"),
        "h200": Gpu(143_771 * _MIB, 4.8e12, 989e12, 450e9, "sm_90"),
        "b200": Gpu(183_359 * _MIB, 8.0e12, 2250e12, 900e9, "sm_100"),
        "mi300x": Gpu(192 * GIB, 5.3e12, 1307e12, 448e9, "gfx942"),
        "mi355x": Gpu(288 * GIB, 8.0e12, 2500e12, 538e9, "gfx950"),
    }
)


def gpu_kv_cache(
    gpu: Gpu,
    model: ModelConfig,
    shard: RankShard,
    scheduler: SchedulerConfig,
    *,
    weight_bytes: int,
    max_model_len: int | None,
    kv_dtype: KVDtype = "bfloat16",
) -> KVCachePlan:
    """Compute the KV cache of a rank on such a GPU, as an engine with otherwise default cache
    settings would size it.

    Args:
        weight_bytes: weights of the rank that holds most.
        max_model_len: None for the longest context that fits beside the weights.
    Raises:
        ConfigError: one sequence of max_model_len, or of the shortest context, does not fit beside
            the weights, or the GPU has no fp8.
    """
    check_kv_dtype(kv_dtype, gpu.target)
    shape = cache_shape(model, shard)
    memory = gpu_kv_memory(
        shape,
        CacheConfig(),
        scheduler,
        dtype=kv_dtype,
        max_model_len=max_model_len,
        gpu=GpuMemory(total_bytes=gpu.memory_bytes, used_bytes=weight_bytes, activation_bytes=RESERVE_BYTES),
    )
    return split_memory(
        shape,
        scheduler,
        dtype=kv_dtype,
        max_model_len=max_model_len,
        memory_bytes=memory.num_bytes,
        source=memory.source,
    )
