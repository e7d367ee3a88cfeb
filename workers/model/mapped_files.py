"""Tensors of checkpoint files without reading them: each file is mapped, a tensor is a view, and pages that were used are given back."""

import mmap
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from workers.errors import CheckpointError
from workers.model.safetensors_files import StoredTensor

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}
_PAGE = mmap.PAGESIZE


class MappedTensors:
    """Views of a checkpoint's tensors; any thread may use them. The pages belong to the file cache, which all processes share."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    def view(self, name: str) -> Tensor:
        """The whole tensor as stored. Only what is read of it is fetched; nobody may write to it.

        Raises:
            CheckpointError: the file cannot be mapped.
        """
        stored = self._tensors[name]
        if stored.num_bytes == 0:
            return torch.empty(stored.shape, dtype=_DTYPES[stored.dtype])
        raw = torch.frombuffer(self._map(stored), dtype=torch.uint8, count=stored.num_bytes, offset=stored.offset)
        if raw.data_ptr() % _DTYPES[stored.dtype].itemsize:
            # The format leaves alignment to the writer; what is misaligned is copied.
            raw = raw.clone()
        return raw.view(_DTYPES[stored.dtype]).view(stored.shape)

    def release(self, name: str, part: int = 0, num_parts: int = 1) -> None:
        """Give back the pages of a tensor, or of one of `num_parts` equal pieces along its first dimension; they stay in the file cache."""
        stored = self._tensors[name]
        with self._lock:
            mapped = self._maps.get(stored.file)
        if mapped is None:
            return
        piece = stored.num_bytes // num_parts
        begin = stored.offset + part * piece
        # Pages shared with a neighbour stay, unless the neighbour gives them back too.
        first, last = -(-begin // _PAGE) * _PAGE, (begin + piece) // _PAGE * _PAGE
        if last > first:
            mapped.madvise(mmap.MADV_DONTNEED, first, last - first)

    def _map(self, stored: StoredTensor) -> mmap.mmap:
        with self._lock:
            if stored.file not in self._maps:
                try:
                    with stored.file.open("rb") as file:
                        # Private and writable, because torch warns of buffers that are not; it is never written to.
                        self._maps[stored.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                except OSError as error:
                    raise CheckpointError(f"{stored.file}: tensor {stored.name} cannot be read: {error}") from error
            return self._maps[stored.file]
