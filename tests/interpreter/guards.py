"""Memory with canaries: the interpreter does not notice a read or a write past the end of a tensor,
these do."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

GUARD_BYTES = 4096
"""Bytes on each side of an allocation; they hold NaN in every float type, -1 or the largest value
in the integers."""
_CANARY = 0xFF
_ALLOCATING = (torch.empty, torch.empty_like, Tensor.new_empty)


def guarded(tensor: Tensor) -> Tensor:
    """Return a copy with the same strides, NaN around it; what reads past its end gets NaN."""
    copy = _inside_guards(tensor)[1]
    return copy.copy_(tensor)


class GuardedAllocations(TorchFunctionMode):
    """A mode in which `torch.empty` and its kin return memory full of NaN between canaries, which
    are checked on leaving."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _ALLOCATING or result.device.type != "cpu" or result.numel() == 0:
            return result
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            buffer, inner = _inside_guards(result)
        self._buffers.append((buffer, buffer.numel() - 2 * GUARD_BYTES))
        return inner

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if exc_type is None:
            self.check()

    def check(self) -> None:
        """Fail if something was written around a tensor that was allocated since."""
        for buffer, num_bytes in self._buffers:
            before, after = buffer[:GUARD_BYTES], buffer[GUARD_BYTES + num_bytes :]
            assert bool((before == _CANARY).all()), (
                f"written before the beginning of an allocation of {num_bytes} bytes"
            )
            assert bool((after == _CANARY).all()), (
                f"written past the end of an allocation of {num_bytes} bytes"
            )
        self._buffers.clear()


def _inside_guards(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return (the whole as [n] uint8, a tensor of `like`'s shape, strides and dtype in its middle),
    all bytes canaries."""
    extent = (
        1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        if like.numel()
        else 0
    )
    num_bytes = extent * like.element_size()
    # The middle starts at a multiple of 16 bytes, as kernels may assume; the guard after it starts
    # where it ends.
    buffer = torch.full((2 * GUARD_BYTES + num_bytes,), _CANARY, dtype=torch.uint8)
    middle = buffer[GUARD_BYTES : GUARD_BYTES + num_bytes].view(like.dtype)
    return buffer, middle.as_strided(like.shape, like.stride(), middle.storage_offset())
