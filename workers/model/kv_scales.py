"""Scales of an fp8 KV cache that a checkpoint may bring: `self_attn.k_scale` and `self_attn.v_scale` of a layer, as vLLM reads them, one
number for all KV heads or one for each. The cache holds a value divided by its head's scale."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workers.config import ModelConfig
from workers.errors import CheckpointError
from workers.model.safetensors_files import StoredTensor
from workers.model.tensor_specs import kv_scale_names
from workers.parallel.shard import Span


def check_kv_scales(tensors: Mapping[str, StoredTensor], config: ModelConfig, path: Path) -> frozenset[str]:
    """The names of those that are there.

    Raises:
        CheckpointError: a layer has only one of the two, or one is of a wrong shape or dtype.
    """
    found = []
    for names in kv_scale_names(config):
        present = [name for name in names if name in tensors]
        if len(present) == 1:
            raise CheckpointError(f"{path}: tensor {present[0]} is there, but {names[1 - names.index(present[0])]} is missing")
        for name in present:
            tensor = tensors[name]
            if tensor.shape not in ((), (1,), (config.num_kv_heads,)) or tensor.dtype not in ("F32", "BF16", "F16"):
                raise CheckpointError(
                    f"{tensor.file}: tensor {name} is {tensor.dtype} of shape {list(tensor.shape)}, wanted floats of shape [], [1] or "
                    f"[{config.num_kv_heads}]"
                )
        found += present
    return frozenset(found)


def read_kv_scales(tensors: Mapping[str, StoredTensor], config: ModelConfig, kv_heads: Span, device: torch.device) -> list[Tensor | None]:
    """For each layer [2, kv_heads.length] fp32, of K and of V, or None where the checkpoint has none.

    Args:
        tensors: as `check_kv_scales` passed them.
    Raises:
        CheckpointError: a scale is not a positive number.
    """
    all_scales: list[Tensor | None] = [None] * config.num_layers
    for layer, names in enumerate(kv_scale_names(config)):
        if names[0] in tensors:
            parts = [_read(names[part], tensors[names[part]]).expand(config.num_kv_heads) for part in (0, 1)]
            all_scales[layer] = torch.stack(parts)[:, kv_heads.start : kv_heads.stop].contiguous().to(device)
    return all_scales


def _read(name: str, tensor: StoredTensor) -> Tensor:
    raw = np.fromfile(tensor.file, dtype=np.uint8, count=tensor.num_bytes, offset=tensor.offset)
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[tensor.dtype]
    values = torch.from_numpy(raw).view(dtype).float()
    if not bool((values.isfinite() & (values > 0)).all()):
        raise CheckpointError(f"{tensor.file}: tensor {name} must hold positive numbers, found {values.tolist()}")
    return values
