"""Tensors of the KV cache."""

import torch

from kernels.attention.fp8 import FP8
from workers.config import BLOCK_SIZE, Dtype, KVDtype, ModelConfig
from workers.errors import ConfigError
from workers.kv_cache.memory import KVCachePlan, readable

TORCH_DTYPES: dict[Dtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
KV_TORCH_DTYPES: dict[KVDtype, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "fp8_e4m3": FP8,
}


def allocate_kv_caches(
    model: ModelConfig, plan: KVCachePlan, *, dtype: KVDtype, device: torch.device
) -> list[torch.Tensor]:
    """Allocate each layer's cache, [2, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim],
    uninitialised: [0] is K, [1] is V.

    On a CPU a page costs memory only once it is written, so a cache larger than needed costs
    nothing.

    Raises:
        ConfigError: the device has too little memory.
    """
    caches = []
    for window in model.layer_windows:
        num_blocks = plan.num_full_blocks if window is None else plan.num_sliding_blocks
        try:
            caches.append(
                torch.empty(
                    2,
                    num_blocks,
                    BLOCK_SIZE,
                    model.num_kv_heads,
                    model.head_dim,
                    dtype=KV_TORCH_DTYPES[dtype],
                    device=device,
                )
            )
        except RuntimeError as error:
            caches.clear()
            raise ConfigError(
                f"a KV cache of {readable(plan.total_bytes)} cannot be allocated on {device}: lower "
                f"cache.memory_bytes"
            ) from error
    return caches
