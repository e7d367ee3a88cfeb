"""Scales of an fp8 KV cache from a checkpoint: for each layer one number, or one for each KV head,
under one of the names that quantisers use (`tensor_specs.kv_scale_names`). The cache holds each
value divided by its head's scale."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from workers.config import ModelConfig
from workers.errors import CheckpointError
from workers.model.safetensors_files import StoredTensor
from workers.model.tensor_specs import kv_scale_names
from workers.parallel.shard import Span


def read_kv_scales(
    tensors: Mapping[str, StoredTensor], config: ModelConfig, kv_heads: Span, device: torch.device
) -> list[Tensor | None]:
    """Return [2, kv_heads.length] fp32 for each layer, for K and V, or None if the checkpoint has
    none.

    Args:
        tensors: as validated by `check_kv_scales`.
    Raises:
        CheckpointError: a scale is not a positive number.
    """
    all_scales: list[Tensor | None] = [None] * config.num_layers
    for layer, spellings in enumerate(kv_scale_names(config)):
        for names in spellings:
            if names[0] not in tensors:
                continue
            parts = [_read(name, tensors[name]).reshape(-1).expand(config.num_kv_heads) for name in names]
            all_scales[layer] = torch.stack(parts)[:, kv_heads.start : kv_heads.stop].contiguous().to(device)
    return all_scales


def _read(name: str, tensor: StoredTensor) -> Tensor:
    raw = np.fromfile(tensor.file, dtype=np.uint8, count=tensor.num_bytes, offset=tensor.offset)
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[tensor.dtype]
    values = torch.from_numpy(raw).view(dtype).float()
    if not bool((values.isfinite() & (values > 0)).all()):
        raise CheckpointError(
            f"{tensor.file}: tensor {name} must hold positive numbers, found {values.tolist()}"
        )
    return values
