"""The C++ library: found, checked and called. Tensors go in as pointers; the caller has checked shapes and dtypes and keeps them alive."""

import ctypes
import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_VERSION = 6
"""Of the functions and structures; src/dispatch.cpp says the same."""
DATA_TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""src/ops.h `DataType`."""

ISAS = ("neon", "portable") if platform.machine() in ("aarch64", "arm64") else ("amx", "avx512_bf16", "avx512", "avx2", "portable")
"""Instruction sets of this architecture, the best first."""


class LinearArgs(ctypes.Structure):
    """src/ops.h"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("num_rows", "width", "num_outputs")),
        ("weight_type", ctypes.c_int32),
    )


class DenseArgs(ctypes.Structure):
    """src/ops.h"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scales", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("num_rows", "width", "num_outputs")),
    )


class PackDenseArgs(ctypes.Structure):
    """src/ops.h"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "packed", "scales")),
        *((name, ctypes.c_int64) for name in ("first_row", "num_rows", "width", "packed_width")),
    )


class ReadArgs(ctypes.Structure):
    """src/ops.h"""

    _fields_ = (("memory", ctypes.c_void_p), ("num_bytes", ctypes.c_int64))


class ExpertsArgs(ctypes.Structure):
    """src/ops.h"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "topk_ids", "topk_weights")),
        *((name, ctypes.c_void_p) for name in ("gate_up_blocks", "gate_up_scales", "down_blocks", "down_scales")),
        *((name, ctypes.c_void_p) for name in ("gate_up_bias", "down_bias", "out")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "top_k", "hidden", "intermediate", "first_expert", "num_experts")),
        ("limit", ctypes.c_float),
        ("alpha", ctypes.c_float),
        ("type", ctypes.c_int32),
        ("bias_type", ctypes.c_int32),
    )


class PackArgs(ctypes.Structure):
    """src/ops.h"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("blocks", "scales", "packed_blocks", "packed_scales")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_groups", "blocks_stride", "scales_stride", "packed_groups")),
    )


@cache
def shared_library() -> ctypes.CDLL | None:
    """The library; None where there is none, or one of another version."""
    files = sorted(Path(__file__).parent.glob("_native*.so"))
    if not files:
        return None
    try:
        loaded = ctypes.CDLL(str(files[0]))
        version = loaded.cantata_version()
    except (OSError, AttributeError) as error:
        logger.warning("the CPU kernels in %s cannot be loaded, the slow references run instead: %s", files[0].name, error)
        return None
    if version != _VERSION:
        logger.warning(
            "the CPU kernels in %s are of version %d, not %d: install again; the slow references run", files[0].name, version, _VERSION
        )
        return None
    loaded.cantata_isa.restype = ctypes.c_char_p
    loaded.cantata_run_program.restype = ctypes.c_int64
    for name, arguments, result in (
        ("linear", LinearArgs, None),
        ("dense", DenseArgs, None),
        ("experts", ExpertsArgs, None),
        ("pack_rows16", PackArgs, ctypes.c_int),
        ("pack_dense", PackDenseArgs, None),
        ("read_through", ReadArgs, ctypes.c_uint64),
    ):
        function = getattr(loaded, f"cantata_{name}")
        function.restype, function.argtypes = result, (ctypes.POINTER(arguments),)
    return loaded


def isa() -> str | None:
    """The instruction set in use, one of ISAS; None without the library."""
    loaded = shared_library()
    return None if loaded is None else str(loaded.cantata_isa().decode())


@contextmanager
def using_isa(name: str) -> Iterator[bool]:
    """Run on another instruction set, for tests and comparisons; yields False, and changes nothing, where the processor lacks it."""
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
"""Called after each operation with its name, its arguments (a structure of src/ops.h) and the seconds it took."""


class _Observed:
    """The library with observers of its operations."""

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
    """Report every operation of this process to `observer`, on the thread that runs it, until the context ends."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def observed() -> bool:
    """Whether anybody observes."""
    return bool(_observers)


def report(name: str, arguments: Any, seconds: float) -> None:
    """Tell the observers of an operation."""
    for observer in list(_observers):
        observer(name, arguments, seconds)


@cache
def _observed_library() -> _Observed:
    loaded = shared_library()
    assert loaded is not None
    return _Observed(loaded)


def ready() -> Any:
    """The library, set to as many threads as torch uses. Its operations are `cantata_NAME(byref(arguments))`."""
    loaded = shared_library()
    assert loaded is not None, "called without the library"
    threads = torch.get_num_threads()
    if threads != loaded.cantata_num_threads():
        loaded.cantata_set_threads(threads)
    return _observed_library() if _observers else loaded


def pointer(tensor: Tensor | None) -> int:
    """Where a contiguous CPU tensor begins; 0 for None."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    assert tensor.is_cpu
    return tensor.data_ptr()


def address_of(name: str) -> int:
    """Of the function of an operation."""
    loaded = shared_library()
    assert loaded is not None
    address = ctypes.cast(getattr(loaded, f"cantata_{name}"), ctypes.c_void_p).value
    assert address is not None
    return address


def run_program(calls: int, count: int) -> int:
    """Run `count` calls at that address (src/ops.h `Call`); returns how many were done before one refused its arguments."""
    ready()
    loaded = shared_library()
    assert loaded is not None
    return int(loaded.cantata_run_program(ctypes.c_void_p(calls), ctypes.c_int64(count)))


def read_through(memory: Tensor) -> int:
    """Read a tensor's bytes once with all threads; the XOR of its 32-bit words, of whole vectors. For measuring memory."""
    arguments = ReadArgs(pointer(memory), memory.nbytes)
    return int(ready().cantata_read_through(ctypes.byref(arguments)))
