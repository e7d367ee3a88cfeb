"""Tensors of checkpoint files without copies: each file is mapped, a tensor is a view, and the
kernel is told what is needed next and what is no longer needed."""

import ctypes
import errno
import mmap
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workers.errors import CheckpointError
from workers.model.safetensors_files import StoredTensor

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}
_PAGE = mmap.PAGESIZE
_POPULATE_READ = 22
"""Value of MADV_POPULATE_READ (Linux 5.14), for which `mmap` has no name."""
_ADVICE_BYTES = 256 << 10
"""Bytes per read-ahead request: the kernel reads no more ahead at a time than its device's limit,
which is 128 or 256 KiB on some."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True, slots=True)
class Extent:
    """A contiguous range of a stored tensor's bytes, counted from the start of the file."""

    tensor: StoredTensor
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


class MappedTensors:
    """Views of a checkpoint's tensors; any thread may use them. The pages belong to the file cache,
    which all processes share."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._files: dict[Path, Tensor] = {}
        self._lock = threading.Lock()

    def extent(self, name: str, first: int, last: int, dims: int = 1) -> Extent:
        """Return the extent of the rows first:last, with the first `dims` dimensions taken as
        one."""
        stored = self._tensors[name]
        num_rows = 1
        for size in stored.shape[:dims]:
            num_rows *= size
        row_bytes = stored.num_bytes // max(num_rows, 1)
        return Extent(stored, stored.offset + first * row_bytes, stored.offset + last * row_bytes)

    def view(self, name: str, first: int, last: int) -> Tensor:
        """Return [last - first, …]: rows of the tensor as stored. Only what is read of them is
        fetched; they must not be written to.

        Raises:
            CheckpointError: the file cannot be mapped.
        """
        extent = self.extent(name, first, last)
        dtype = _DTYPES[extent.tensor.dtype]
        shape = (last - first, *extent.tensor.shape[1:])
        if extent.num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        raw = self._file(extent.tensor)[extent.start : extent.stop]
        if raw.data_ptr() % dtype.itemsize:
            # The format does not guarantee alignment; misaligned tensors are copied.
            raw = raw.clone()
        return raw.view(dtype).view(shape)

    def read_ahead(self, extent: Extent) -> None:
        """Start reading the pages into the file cache; return before they are there."""
        for start in range(extent.start, extent.stop, _ADVICE_BYTES):
            self._advise(extent.tensor, start, min(start + _ADVICE_BYTES, extent.stop), mmap.MADV_WILLNEED)

    def fetch(self, extent: Extent) -> None:
        """Wait for the pages and map them, at a fraction of the cost of a page fault each.

        Raises:
            CheckpointError: they cannot be read; touching them would have killed the process.
        """
        error = self._advise(extent.tensor, extent.start, extent.stop, _POPULATE_READ)
        if error in (errno.EFAULT, errno.EIO):
            reason = "its disk failed, or it was cut off while it was being loaded"
            raise CheckpointError(
                f"{extent.tensor.file}: tensor {extent.tensor.name} cannot be read: {reason}"
            )

    def release(self, extent: Extent) -> None:
        """Release the pages except those shared with a neighbour; they stay in the file cache."""
        first, last = -(-extent.start // _PAGE) * _PAGE, extent.stop // _PAGE * _PAGE
        if last > first:
            self._advise(extent.tensor, first, last, mmap.MADV_DONTNEED)

    def _advise(self, tensor: StoredTensor, start: int, stop: int, advice: int) -> int:
        """Advise the kernel; return the error number, 0 for none."""
        first = start // _PAGE * _PAGE
        if stop <= first:
            return 0
        ctypes.set_errno(0)
        _libc.madvise(self._file(tensor).data_ptr() + first, stop - first, advice)
        return ctypes.get_errno()

    def _file(self, stored: StoredTensor) -> Tensor:
        """Return all bytes of a tensor's file."""
        with self._lock:
            if stored.file not in self._files:
                try:
                    with stored.file.open("rb") as file:
                        # Private and writable, because torch warns about read-only buffers; it is
                        # never written to.
                        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                except (OSError, ValueError) as error:
                    raise CheckpointError(
                        f"{stored.file}: tensor {stored.name} cannot be read: {error}"
                    ) from error
                self._files[stored.file] = torch.frombuffer(mapped, dtype=torch.uint8)
            return self._files[stored.file]
