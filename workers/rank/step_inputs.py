"""Transfer of a step's small arrays to the device: packed into one host buffer, pinned on a GPU,
and sent by one asynchronous copy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT = 16
"""Alignment in bytes, as the largest vector loads of kernels need it."""
NUM_BUFFERS = 10
"""Number of host buffers. A step has up to five uploads (inputs, prompts to score, sampling,
drafts, masks), and two steps are in flight: the next step is prepared while copies of the last may
still wait."""

Array = npt.NDArray[np.generic]
_TORCH_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.uint8): torch.uint8,
}


def packed_layout(arrays: Sequence[Array]) -> tuple[list[int], int]:
    """Return the offset of each array in bytes, and the total size. Both depend on sizes only, so
    equal shapes have equal addresses."""
    offsets, end = [], 0
    for array in arrays:
        offsets.append(end)
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def packed_views(packed: Tensor, arrays: Sequence[Array], offsets: Sequence[int]) -> list[Tensor]:
    """Return the arrays, by shape and dtype, as views of a packed [n] uint8 tensor."""
    # One view of the whole for each dtype, then one operation per array: this runs for a dozen
    # arrays in every step.
    typed = {dtype: packed.view(_TORCH_DTYPES[dtype]) for dtype in {array.dtype for array in arrays}}
    views = []
    for array, offset in zip(arrays, offsets, strict=True):
        view = typed[array.dtype].narrow(0, offset // array.itemsize, array.size)
        views.append(view if array.ndim == 1 else view.view(array.shape))
    return views


@dataclass(slots=True)
class _HostBuffer:
    """One host buffer. `copied` is None before the first copy, and always on a CPU."""

    tensor: Tensor
    array: npt.NDArray[np.uint8]
    copied: torch.cuda.Event | None = None


class InputBuffers:
    """Host buffers used in turn. On a CPU the returned tensors are views of the buffer and stay
    valid for NUM_BUFFERS - 1 further uploads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers = [self._allocate(4096) for _ in range(NUM_BUFFERS)]
        self._turn = 0

    def upload(self, arrays: Sequence[Array], into: Tensor | None = None) -> list[Tensor]:
        """Return copies of the arrays on the device, ordered before all work queued on its current
        stream after this call.

        Args:
            arrays: int64, int32, float32 or uint8.
            into: [n] uint8 on the device, where `packed_layout` places the arrays; None for new
                memory. Not supported on a CPU.
        """
        offsets, num_bytes = packed_layout(arrays)
        buffer = self._next_buffer(num_bytes)
        for array, offset in zip(arrays, offsets, strict=True):
            flat = (
                array
                if array.ndim == 1 and array.flags.c_contiguous
                else np.ascontiguousarray(array).reshape(-1)
            )
            buffer.array[offset : offset + array.nbytes] = flat.view(np.uint8)
        packed = buffer.tensor[:num_bytes]
        if self.device.type != "cpu":
            target = (
                torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
                if into is None
                else into[:num_bytes]
            )
            target.copy_(packed, non_blocking=True)
            packed = target
            buffer.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            buffer.copied.record()
        return packed_views(packed, arrays, offsets)

    def _next_buffer(self, num_bytes: int) -> _HostBuffer:
        index, self._turn = self._turn, (self._turn + 1) % NUM_BUFFERS
        buffer = self._buffers[index]
        if buffer.copied is not None:
            buffer.copied.synchronize()
        if len(buffer.array) < num_bytes:
            buffer = self._buffers[index] = self._allocate(1 << (num_bytes - 1).bit_length())
        return buffer

    def _allocate(self, num_bytes: int) -> _HostBuffer:
        tensor = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.device.type != "cpu")
        return _HostBuffer(tensor, tensor.numpy())
