"""The tensors of a checkpoint folder and their locations: the index and the safetensors headers,
checked before any weight is read."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from workers.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ORIGINAL_FILES = "model--*.safetensors"
"""Glob of the weight files in OpenAI's own layout, which has no index."""
ADAPTER_FILE = "adapter_model.safetensors"
"""Name under which the PEFT library stores an adapter's weights."""
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""Maximum bytes of a header, as the format defines."""
_ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
}
_ITEM_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The location of a stored tensor.

    Attributes:
        dtype: as safetensors spells it: BF16, U8, ….
        offset: position of its first byte in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, sorted by name.

    Raises:
        CheckpointError: there are none, one is missing, or beside a single file there is an index
            of others.
    """
    index = folder / INDEX_FILE
    single = folder / SINGLE_FILE
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; give the path of a gpt-oss checkpoint in Hugging Face layout"
        )
    if index.is_file() and single.is_file() and {*_read_weight_map(index).values()} != {SINGLE_FILE}:
        raise CheckpointError(
            f"{folder} has both {SINGLE_FILE} and an {INDEX_FILE} that names other files; remove the stale "
            f"one"
        )
    if index.is_file():
        return sorted({_shard_path(folder, tensor, name) for tensor, name in _read_weight_map(index).items()})
    if single.is_file():
        return [single]
    original = sorted(folder.glob(ORIGINAL_FILES))
    if original:
        return original
    adapter = f": {ADAPTER_FILE} holds those of an adapter" if (folder / ADAPTER_FILE).is_file() else ""
    raise CheckpointError(
        f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; its weights are missing{adapter}"
    )


def stored_names(folder: Path) -> frozenset[str]:
    """Return the names of a checkpoint's tensors: those in the index if there is one, whose files
    are not looked at. The empty set if there is neither an index nor a weight file.

    Raises:
        CheckpointError: the index or a file's header is broken.
    """
    if (folder / INDEX_FILE).is_file():
        return frozenset(_read_weight_map(folder / INDEX_FILE))
    if not (folder / SINGLE_FILE).is_file() and not any(folder.glob(ORIGINAL_FILES)):
        return frozenset()
    return frozenset(tensor.name for file in weight_files(folder) for tensor in read_header(file))


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a checkpoint by name.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors, or the index and the files
            disagree.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for tensor in read_header(file):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{file}: tensor {tensor.name} is also in {tensors[tensor.name].file.name}"
                )
            tensors[tensor.name] = tensor
    if (folder / INDEX_FILE).is_file():
        _check_against_index(folder / INDEX_FILE, tensors)
    return tensors


def read_header(file: Path) -> list[StoredTensor]:
    """Return the tensors of one safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: the file is truncated, has surplus bytes, or is not safetensors.
    """
    header_bytes = read_header_bytes(file)
    start = _LENGTH_BYTES + len(header_bytes)
    data_bytes = file.stat().st_size - start
    try:
        header = json.loads(header_bytes)
        tensors = sorted(_parse_entries(file, header, start), key=lambda tensor: tensor.offset)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} has a broken safetensors header; download the file again") from error
    expected = start
    for tensor in tensors:
        if tensor.offset != expected:
            raise CheckpointError(
                f"{file}: tensor {tensor.name} begins at byte {tensor.offset}, expected {expected}; the "
                f"header is broken"
            )
        if tensor.dtype in _ITEM_BYTES and tensor.num_bytes != prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]:
            raise CheckpointError(
                f"{file}: tensor {tensor.name} has {tensor.num_bytes} bytes, expected "
                f"{prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]} "
                f"for shape {list(tensor.shape)} of {tensor.dtype}; the header is broken"
            )
        expected = tensor.offset + tensor.num_bytes
        if expected > start + data_bytes:
            raise CheckpointError(
                f"{file} is truncated: tensor {tensor.name} ends at byte {expected}, the file has "
                f"{start + data_bytes}; download the file again"
            )
    if expected != start + data_bytes:
        raise CheckpointError(
            f"{file} has {start + data_bytes - expected} bytes after its last tensor; download the file again"
        )
    return tensors


def read_header_bytes(file: Path) -> bytes:
    """Return the JSON header of a safetensors file, as stored.

    Raises:
        CheckpointError: the file cannot be read, is truncated inside the header, or is not
            safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(_LENGTH_BYTES)
            if prefix == b"version ":
                raise CheckpointError(
                    f"{file} is a Git LFS pointer, not the weights; fetch the file itself (git lfs pull)"
                )
            length = int.from_bytes(prefix, "little")
            if len(prefix) < _LENGTH_BYTES or not 0 < length <= min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file} ({size} bytes) is truncated or not a safetensors file; download the file again"
                )
            return stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


def _parse_entries(file: Path, header: dict[str, dict[str, object]], start: int) -> Iterator[StoredTensor]:
    # Wrong JSON types surface as ValueError, TypeError, KeyError or AttributeError; the caller
    # turns them into one sentence.
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
            raise TypeError(name)
        begin, end = offsets
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or end < begin:
            raise ValueError(name)
        yield StoredTensor(name, file, dtype, tuple(shape), start + begin, end - begin)


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        raw = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read as JSON: {error}") from error
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointError(f"{index}: weight_map must map each tensor's name to a file name")
    return weight_map


def _shard_path(folder: Path, tensor: str, name: str) -> Path:
    if not name or Path(name).name != name:
        raise CheckpointError(
            f"{folder / INDEX_FILE}: tensor {tensor} is placed in {name!r}, which is not the name of a file "
            f"in this folder"
        )
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder / name} is missing; {INDEX_FILE} places tensor {tensor} in it")
    return folder / name


def _check_against_index(index: Path, tensors: dict[str, StoredTensor]) -> None:
    weight_map = _read_weight_map(index)
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{index.parent / file} does not hold tensor {name}, which {INDEX_FILE} places in it"
            )
        if tensors[name].file.name != file:
            raise CheckpointError(
                f"{index} places tensor {name} in {file}, but it is in {tensors[name].file.name}"
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{tensor.file} holds tensor {name}, which {INDEX_FILE} does not list")
