"""GPUs by name: what their makers say of them, and the memory that a rank's KV cache gets on one, by arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from workers.config import CacheConfig

GIB = 2**30
_MIB = 2**20
RESERVE_BYTES = 3 * GIB
"""For activations, CUDA graphs and libraries: an assumption, an engine measures it."""
UTILIZATION = CacheConfig().gpu_memory_utilization


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of a server with eight of them (SXM or OAM), by its data sheet.

    Attributes:
        memory_bytes: as the driver reports it.
        memory_bandwidth: bytes a second.
        bf16_flops: dense matrix products, a second.
        link_bandwidth: bytes a second to the other GPUs of its server, in one direction (NVLink, Infinity Fabric).
    """

    memory_bytes: int
    memory_bandwidth: float
    bf16_flops: float
    link_bandwidth: float


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "h100": Gpu(81_559 * _MIB, 3.35e12, 989e12, 450e9),
        "h200": Gpu(143_771 * _MIB, 4.8e12, 989e12, 450e9),
        "b200": Gpu(183_359 * _MIB, 8.0e12, 2250e12, 900e9),
        "mi300x": Gpu(192 * GIB, 5.3e12, 1307e12, 448e9),
    }
)


def left_for_kv(gpu: Gpu, weight_bytes: int) -> int:
    """Bytes of one GPU for the KV cache beside a rank's weights; 0 if the weights do not fit."""
    return max(int(gpu.memory_bytes * UTILIZATION) - weight_bytes - RESERVE_BYTES, 0)
