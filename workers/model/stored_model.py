"""Comparison of a checkpoint folder with its config, by headers alone: nothing is loaded, and torch
is not needed."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from workers.config import ModelConfig
from workers.errors import CheckpointError
from workers.model.safetensors_files import (
    INDEX_FILE,
    StoredTensor,
    read_header,
    read_header_bytes,
    stored_tensors,
    weight_files,
)
from workers.model.tensor_specs import TensorSpec, kv_scale_names, tensor_specs
from workers.model_config import checkpoint_folder

_STORED_DTYPES = {"dense": ("BF16", "F16", "F32"), "mxfp4_blocks": ("U8",), "mxfp4_scales": ("U8",)}
_SAMPLE_BYTES = 4096
_RECOMPUTED = "rotary_emb.inv_freq"
"""End of the names of tensors that old tools store and that follow from the config."""


def check_tensors(path: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Check and return the tensors of a checkpoint by name: exactly those that `config` describes,
    and scales of an fp8 KV cache if present. Stored frequencies of the rotary embedding are left
    out. Only headers are read.

    Raises:
        CheckpointError: as in `load_model`.
    """
    path = checkpoint_folder(path)
    tensors = {
        name: tensor for name, tensor in stored_tensors(path).items() if not name.endswith(_RECOMPUTED)
    }
    unknown = dict(tensors)
    for spec in tensor_specs(config):
        if spec.name not in tensors:
            files = weight_files(path)
            raise CheckpointError(
                f"{files[0] if len(files) == 1 else path}: tensor {spec.name} of shape {list(spec.shape)} "
                f"is missing"
            )
        _check_tensor(spec, unknown.pop(spec.name))
    for name in check_kv_scales(tensors, config, path):
        del unknown[name]
    for name, tensor in unknown.items():
        raise CheckpointError(
            f"{tensor.file}: tensor {name} of shape {list(tensor.shape)} is not part of the model that "
            f"config.json describes"
        )
    return tensors


def _check_tensor(spec: TensorSpec, tensor: StoredTensor) -> None:
    if tensor.shape != spec.shape:
        raise CheckpointError(
            f"{tensor.file}: tensor {spec.name} has shape {list(tensor.shape)}, expected {list(spec.shape)}"
        )
    wanted = _STORED_DTYPES[spec.kind]
    if tensor.dtype not in wanted:
        raise CheckpointError(
            f"{tensor.file}: tensor {spec.name} has dtype {tensor.dtype}, expected {' or '.join(wanted)}"
        )


def check_kv_scales(tensors: Mapping[str, StoredTensor], config: ModelConfig, path: Path) -> frozenset[str]:
    """Check and return the names of the KV scales present.

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
                    f"{tensor.file}: tensor {name} is {tensor.dtype} of shape {list(tensor.shape)}, "
                    f"expected floats of shape [], [1] or "
                    f"[{config.num_kv_heads}]"
                )
            found.append(name)
    return frozenset(found)


def _present(
    spellings: list[tuple[str, str]], tensors: Mapping[str, StoredTensor], path: Path
) -> tuple[str, str] | None:
    """Return the names under which a layer has KV scales."""
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


def fingerprint(path: Path) -> str:
    """Return a hex digest that identifies a checkpoint without reading all of it: over config.json,
    the index, and each weight file's name, size, header and the first 4 KiB of each of its tensors
    (a fine-tune may differ from its base model only in these).

    Raises:
        CheckpointError: a file is missing or truncated.
    """
    path = checkpoint_folder(path)
    digest = hashlib.sha256()
    for name in ("config.json", INDEX_FILE):
        if (path / name).is_file():
            _add(digest, name.encode(), (path / name).read_bytes())
    for file in weight_files(path):
        _add(digest, file.name.encode(), str(file.stat().st_size).encode(), read_header_bytes(file))
        with file.open("rb") as stream:
            for tensor in read_header(file):
                stream.seek(tensor.offset)
                _add(digest, stream.read(min(tensor.num_bytes, _SAMPLE_BYTES)))
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", *parts: bytes) -> None:
    # Length prefixes keep ("ab", "c") apart from ("a", "bc").
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
