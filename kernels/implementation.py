"""The implementation of an operation: selected once for the weights and the device, by the `select`
of the operation's package. Decisions that depend on the shape of an input are left to the
implementation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from kernels.backend import architecture, triton_runs_on
from kernels.cpu import native

REFERENCE = "torch reference"
"""Name of implementations that run everywhere but are slow."""

Run = TypeVar("Run", covariant=True)
_Run = TypeVar("_Run")


@dataclass(frozen=True, slots=True)
class Implementation(Generic[Run]):
    """An implementation of an operation.

    Attributes:
        run: the function to call, as the operation's package defines.
        name: name for the user: `Triton sm_90`, `C++ avx512`, `cuBLAS`, REFERENCE.
        why: the reason for selecting it, a clause for the user.
        layout: layout of the weights; empty if there is only one.
        is_slow: whether the user should be warned, since a faster implementation exists.
        is_capturable: whether a CUDA graph can hold it; others read sizes back to the host.
    """

    run: Run
    name: str
    why: str
    layout: str = ""
    is_slow: bool = False
    is_capturable: bool = True

    def __str__(self) -> str:
        return f"{self.name}{', ' + self.layout if self.layout else ''} ({self.why})"


def by_device(
    device: torch.device,
    dtype: torch.dtype,
    *,
    triton: Callable[[], _Run],
    cpp: _Run,
    reference: _Run,
    is_capturable: bool = True,
) -> Implementation[_Run]:
    """Return the implementation that most operations select: Triton's where it runs, on a CPU the
    C++ one for its dtypes, else the reference.

    Args:
        triton: returns Triton's implementation; called only if Triton is installed.
        is_capturable: value for the reference.
    """
    if triton_runs_on(device):
        where = "in Triton's interpreter" if device.type == "cpu" else "on a GPU"
        return Implementation(triton(), triton_name(device), where)
    if device.type == "cpu" and dtype in native.DATA_TYPES and native.shared_library() is not None:
        return Implementation(cpp, cpp_name(), _why_this_isa())
    return slow_reference(reference, why_not_compiled(device, dtype), is_capturable=is_capturable)


def slow_reference(run: _Run, why: str, layout: str = "", *, is_capturable: bool) -> Implementation[_Run]:
    """Return the reference as an implementation that is slow."""
    return Implementation(run, REFERENCE, why, layout, is_slow=True, is_capturable=is_capturable)


def triton_name(device: torch.device) -> str:
    """Return the name of a Triton kernel."""
    return f"Triton {architecture(device)}"


def cpp_name() -> str:
    """Return the name of a C++ kernel, with the instruction set in use."""
    return f"C++ {native.isa()}"


def why_not_compiled(device: torch.device, dtype: torch.dtype) -> str:
    """Return why the reference runs on a device without Triton."""
    if device.type == "cuda":
        return "Triton is not installed"
    if native.shared_library() is None:
        return native.why_missing()
    return f"the C++ kernels do not take {dtype} or these weights"


def _why_this_isa() -> str:
    setting = native.chosen_by()
    return "the widest instructions of this processor" if setting is None else f"as {setting} says"
