"""A recorder of what a piece of the model launches on a GPU: Triton kernels, and torch operations
that compute or copy."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

_FREE = {
    *("empty", "empty_like", "new_empty"),
    *(
        "as_strided",
        "detach",
        "expand",
        "narrow",
        "select",
        "slice",
        "split",
        "t",
        "transpose",
        "unbind",
        "view",
    ),
}
"""Operations that only allocate, or look at memory in another way."""


@dataclass(frozen=True, slots=True)
class RecordedLaunch:
    """One launch.

    Attributes:
        tensors: those it was given, and those an operation of torch returned; not empty ones.
        again: launches it again, on the same tensors.
    """

    name: str
    tensors: tuple[Tensor, ...]
    again: Callable[[], object]


def storage_of(tensor: Tensor) -> int:
    """Return an id that two views of the same memory share."""
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def recording_launches(*, compute: bool) -> Iterator[list[RecordedLaunch]]:
    """Yield a list that grows by each launch inside.

    Args:
        compute: whether Triton kernels run; without, on tensors that have no memory, they do
            nothing.
    """
    recorded: list[RecordedLaunch] = []
    with ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "run", _recording_run(kind.run, recorded, compute)))
        stack.enter_context(_TorchOperations(recorded))
        yield recorded


def split_layers(
    recorded: Sequence[RecordedLaunch],
) -> tuple[list[RecordedLaunch], list[list[RecordedLaunch]], list[RecordedLaunch]]:
    """Return (launches before the first layer, each layer's launches, launches after the last) of a
    step of the model. A layer begins with its QKV projection, the launch before RoPE's, and ends
    with its experts' sum and the norm of the next one. For a rank alone."""
    starts = [index - 1 for index, launch in enumerate(recorded) if launch.name == "_rope_and_store"]
    end = 1 + max(index for index, launch in enumerate(recorded) if launch.name == "add_slots_rms_norm")
    layers = [list(recorded[start:stop]) for start, stop in zip(starts, [*starts[1:], end], strict=True)]
    return list(recorded[: starts[0]]), layers, list(recorded[end:])


def _recording_run(
    run: Callable[..., Any], recorded: list[RecordedLaunch], compute: bool
) -> Callable[..., Any]:
    def recording(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = tuple(
            value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.numel()
        )
        recorded.append(RecordedLaunch(kernel.fn.__name__, tensors, lambda: run(kernel, *args, **kwargs)))
        if not compute:
            return None
        # The interpreter's own torch operations are not the model's.
        with _disable_current_modes():
            return run(kernel, *args, **kwargs)

    return recording


class _TorchOperations(TorchDispatchMode):
    """A recorder of torch operations with the tensors that they read and write."""

    def __init__(self, recorded: list[RecordedLaunch]) -> None:
        super().__init__()
        self._recorded = recorded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = func.overloadpacket.__name__, kwargs or {}
        result = func(*args, **options)
        if name not in _FREE and not (name == "reshape" and storage_of(result) == storage_of(args[0])):
            tensors = tuple(value for value in (*args, result) if isinstance(value, Tensor))
            self._recorded.append(RecordedLaunch(name, tensors, lambda: func(*args, **options)))
        return result
