"""The C++ library: finds, checks and calls it. Tensors are passed as pointers; the caller has
checked shapes and dtypes and keeps the tensors alive."""

import ctypes
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.cpu import structures

logger = logging.getLogger(__name__)

DATA_TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Codes of data types, as in src/ops.h `DataType`."""

Isa = Literal["amx", "avx512_bf16", "avx512", "avx2", "neon", "portable"]
ISAS: tuple[Isa, ...] = (
    ("neon", "portable")
    if platform.machine() in ("aarch64", "arm64")
    else ("amx", "avx512_bf16", "avx512", "avx2", "portable")
)
"""Instruction sets of this architecture, the best first."""
AUTO, REFERENCE = "auto", "reference"
"""Further values that `choose` accepts."""
ISA_VARIABLE = "CANTATA_CPU_ISA"
_TRIAL_TIMEOUT_S = 60.0


class _Choice:
    """The kernels selected for this process.

    Attributes:
        reference: whether the torch references are used although the library is present.
        setting: the setting that selected it; None if there was none.
    """

    reference = False
    setting: str | None = None


_choice = _Choice()


def shared_library() -> ctypes.CDLL | None:
    """Return the library; None if there is none that can be loaded, and after
    `choose(REFERENCE)`."""
    return None if _choice.reference else _library()


def why_missing() -> str:
    """Return why `shared_library` returns None, and the remedy, as a clause."""
    loaded = _loaded()
    if _choice.reference:
        return f"{_choice.setting} is {REFERENCE}"
    return loaded if isinstance(loaded, str) else "the C++ kernels are not in use"


def built_file() -> Path | None:
    """Return the path of the built library; None if it was not built."""
    return next(iter(sorted(Path(__file__).parent.glob("_native*.so"))), None)


@cache
def _loaded() -> ctypes.CDLL | str:
    """Return the library, or why it is not available."""
    file = built_file()
    if file is None:
        return "the C++ kernels were not built: install a C++ compiler, then Cantata again"
    try:
        loaded = ctypes.CDLL(str(file))
        version = loaded.cantata_version()
    except (OSError, AttributeError) as error:
        return f"the C++ kernels cannot be loaded ({error}): install Cantata again on this machine"
    if version != structures.INTERFACE_VERSION:
        return (
            f"the C++ kernels in {file.name} are of version {version}, not {structures.INTERFACE_VERSION}: "
            f"install Cantata again"
        )
    loaded.cantata_isa.restype = ctypes.c_char_p
    loaded.cantata_run_program.restype = ctypes.c_int64
    for name, operation in structures.OPERATIONS.items():
        function = getattr(loaded, f"cantata_{name}")
        function.restype, function.argtypes = operation.result, (ctypes.POINTER(operation.arguments),)
    return loaded


def _library() -> ctypes.CDLL | None:
    loaded = _loaded()
    return None if isinstance(loaded, str) else loaded


def isa() -> str | None:
    """Return the instruction set in use, one of ISAS; None without the library."""
    loaded = shared_library()
    return None if loaded is None else str(loaded.cantata_isa().decode())


def chosen_by() -> str | None:
    """Return the setting that selected the instruction set; None if `choose` took the best."""
    return _choice.setting


def choose(name: str) -> None:
    """Select an instruction set, or the torch references, for this whole process. An engine calls
    this before it loads its weights.

    Models that are already loaded continue with the same weights: their layout does not depend on
    the instruction set.

    Args:
        name: one of ISAS, REFERENCE, or AUTO, which is the value of CANTATA_CPU_ISA in the
            environment, else the best set of this processor.
    Raises:
        ValueError: in one sentence: the processor or this build lacks it, or the library cannot be
            loaded.
    """
    setting = "cpu_isa"
    if name == AUTO:
        setting, name = ISA_VARIABLE, os.environ.get(ISA_VARIABLE) or AUTO
    loaded = _library()
    if name not in (AUTO, REFERENCE):
        if loaded is None:
            raise ValueError(
                f"{setting} is {name}, and {_loaded()}; or set it to {AUTO} or {REFERENCE} and serve "
                f"slowly, on torch"
            )
        if not loaded.cantata_use_isa(name.encode()):
            names = ", ".join((AUTO, *available(), REFERENCE))
            raise ValueError(
                f"{setting} is {name}, which this processor or this build does not have: set it to one of "
                f"{names}"
            )
    elif loaded is not None:
        next(best for best in ISAS if loaded.cantata_use_isa(best.encode()))
    _choice.reference = name == REFERENCE
    _choice.setting = None if name == AUTO else setting


def available() -> list[Isa]:
    """Return the ISAS that this processor and this build have, the best first. The one in use is
    not changed."""
    loaded = _library()
    if loaded is None:
        return []
    before = loaded.cantata_isa()
    found = [name for name in ISAS if loaded.cantata_use_isa(name.encode())]
    loaded.cantata_use_isa(before)
    return found


def runs() -> bool:
    """Return whether a child process survived running kernels of the instruction set in use: if the
    processor, or its emulator, rejects one of their instructions, the child dies instead of this
    process. True if the references run."""
    name, loaded = isa(), shared_library()
    return name is None or loaded is None or _trial(str(loaded._name), name) != -signal.SIGILL


@cache
def _trial(file: str, name: str) -> int | None:
    """Return the exit code of `kernels.cpu.trial`; None if it is not available."""
    try:
        command = [sys.executable, "-m", "kernels.cpu.trial", file, name]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TRIAL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("the C++ kernels could not be tried in a process of their own: %s", error)
        return None
    if done.returncode not in (0, -signal.SIGILL):
        logger.warning(
            "the C++ kernels, tried in a process of their own, ended it with code %d", done.returncode
        )
    return done.returncode


@contextmanager
def using_isa(name: str) -> Iterator[bool]:
    """Run on another instruction set within the context, for tests and comparisons. Yields False,
    and changes nothing, if the processor lacks it."""
    loaded, before = shared_library(), isa()
    if loaded is None or before is None:
        yield False
        return
    has = bool(loaded.cantata_use_isa(name.encode()))
    try:
        yield has
    finally:
        loaded.cantata_use_isa(before.encode())


Observer = Callable[[str, Any, float], None]
"""Function called after each operation with its name, its arguments (a structure of src/ops.h) and
its duration in seconds."""


class _Observed:
    """Wrapper of the library that reports its operations to observers."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._loaded = loaded

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        function = getattr(self._loaded, name)

        def observed(reference: Any) -> Any:
            started = time.perf_counter()
            result = function(reference)
            report(name.removeprefix("cantata_"), reference._obj, time.perf_counter() - started)
            return result

        setattr(self, name, observed)
        return observed


_observers: list[Observer] = []


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Report every operation of this process to `observer`, on the thread that runs it, until the
    context ends."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def observed() -> bool:
    """Return whether an observer is set."""
    return bool(_observers)


def report(name: str, arguments: Any, seconds: float) -> None:
    """Call the observers with an operation."""
    for observer in list(_observers):
        observer(name, arguments, seconds)


@cache
def _observed_library() -> _Observed:
    loaded = _library()
    assert loaded is not None
    return _Observed(loaded)


def ready() -> Any:
    """Return the library, set to the number of threads that torch uses. Its operations are
    `cantata_NAME(byref(arguments))`."""
    loaded = _library()
    assert loaded is not None, "called without the library"
    threads = torch.get_num_threads()
    if threads != loaded.cantata_num_threads():
        loaded.cantata_set_threads(threads)
    return _observed_library() if _observers else loaded


def pointer(tensor: Tensor | None) -> int:
    """Return the address of a contiguous CPU tensor; 0 for None."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    assert tensor.is_cpu
    return tensor.data_ptr()


def address_of(name: str) -> int:
    """Return the address of an operation's function."""
    loaded = _library()
    assert loaded is not None
    address = ctypes.cast(getattr(loaded, f"cantata_{name}"), ctypes.c_void_p).value
    assert address is not None
    return address


def run_program(calls: int, count: int) -> int:
    """Run `count` calls at that address (src/ops.h `Call`). Return the number of calls done before
    one refused its arguments."""
    ready()
    loaded = _library()
    assert loaded is not None
    return int(loaded.cantata_run_program(ctypes.c_void_p(calls), ctypes.c_int64(count)))


def read_through(memory: Tensor) -> int:
    """Read a tensor's bytes once with all threads, to measure memory. Return the XOR of its 32-bit
    words, up to the last whole vector."""
    arguments = structures.ReadArgs(pointer(memory), memory.nbytes)
    return int(ready().cantata_read_through(ctypes.byref(arguments)))
