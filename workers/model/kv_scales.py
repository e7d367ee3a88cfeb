"""Scales of an fp8 KV cache that a checkpoint may bring, for each layer one number for all KV heads
or one for each, under one of the names that quantisers give them (`tensor_specs.kv_scale_names`).
The cache holds a value divided by its head's scale."""

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
        CheckpointError: a layer has only one of the two, or both under several names, or one is of
            a wrong shape or dtype.
    """
    found: list[str] = []
    for spellings in kv_scale_names(config):
        pair = _present(spellings, tensors, path)
        for name in pair or ():
            tensor = tensors[name]
            sizes = tuple(size for size in tensor.shape if size != 1)
            if sizes not in ((), (config.num_kv_heads,)) or tensor.dtype not in ("F32", "BF16", "F16"):
                raise CheckpointError(
                    f"{tensor.file}: tensor {name} is {tensor.dtype} of shape {list(tensor.shape)}, wanted "
                    f"floats of shape [], [1] or "
                    f"[{config.num_kv_heads}]"
                )
            found.append(name)
    return frozenset(found)


def _present(
    spellings: list[tuple[str, str]], tensors: Mapping[str, StoredTensor], path: Path
) -> tuple[str, str] | None:
    """The names under which a layer has them."""
    present = [pair for pair in spellings if pair[0] in tensors or pair[1] in tensors]
    if len(present) > 1:
        raise CheckpointError(
            f"{path}: tensors {present[0][0]} and {present[1][0]} both give a layer's scales; remove one pair"
        )
    for pair in present:
        missing = [name for name in pair if name not in tensors]
        if missing:
            raise CheckpointError(
                f"{path}: tensor {pair[1 - pair.index(missing[0])]} is there, but {missing[0]} is missing"
            )
    return present[0] if present else None


def read_kv_scales(
    tensors: Mapping[str, StoredTensor], config: ModelConfig, kv_heads: Span, device: torch.device
) -> list[Tensor | None]:
    """For each layer [2, kv_heads.length] fp32, of K and of V, or None where the checkpoint has
    none.

    Args:
        tensors: as `check_kv_scales` passed them.
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
