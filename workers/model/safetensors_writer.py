"""Writes a safetensors file front to back from pieces, so that its size is not bounded by memory.

Format (safetensors README, "Format"): an 8-byte little-endian header length, the JSON header, then
the tensors' bytes without gaps.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workers.model.tensor_specs import TensorSpec

DTYPE_NAMES: Mapping[str, str] = {"dense": "BF16", "mxfp4_blocks": "U8", "mxfp4_scales": "U8"}
ITEM_BYTES: Mapping[str, int] = {"dense": 2, "mxfp4_blocks": 1, "mxfp4_scales": 1}
_ALIGNMENT = 8


def stored_bytes(spec: TensorSpec) -> int:
    """Return the size of a tensor in a file, in bytes."""
    return spec.num_elements * ITEM_BYTES[spec.kind]


def safetensors_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Return everything before the first tensor's bytes, including the length field."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for spec in specs:
        end = offset + stored_bytes(spec)
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.kind],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded


def write_safetensors(
    path: Path,
    specs: Sequence[TensorSpec],
    metadata: Mapping[str, str],
    pieces: Callable[[TensorSpec], Iterable[NDArray[np.uint8]]],
    written: Callable[[int], None],
) -> None:
    """Write one file.

    Args:
        pieces: a tensor's bytes, row-major and little-endian, in pieces of any size.
        written: called with each piece's size once it is in the file.
    """
    with path.open("wb") as file:
        file.write(safetensors_header(specs, metadata))
        for spec in specs:
            start = file.tell()
            for piece in pieces(spec):
                written(file.write(piece.data))
            assert file.tell() - start == stored_bytes(spec), (
                f"{spec.name}: {file.tell() - start} bytes, not {stored_bytes(spec)}"
            )
