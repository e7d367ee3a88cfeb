"""A sequence of C++ operations, recorded once and run by one call.

A decode step is about two hundred operations, each of which costs more time in Python than in
computation for a small model. The operations, and the addresses that they read and write, are the
same in every step with the same number of sequences; only the contents of these addresses differ.
As with CUDA graphs, the first such step runs as usual and is recorded, and later steps run the
recording.
"""

import ctypes
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.cpu import native, structures

_CHUNK_BYTES = 1 << 24
_ALIGNMENT = 64


class ProgramMemory:
    """Memory for the tensors of programs. All programs begin at its start: only one runs at a time,
    and its results last until the next one."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._chunk = 0
        self._used = 0

    @property
    def num_bytes(self) -> int:
        return sum(chunk.nbytes for chunk in self._chunks)

    def rewind(self) -> None:
        """Make the next tensor start at the beginning."""
        self._chunk = self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory for a contiguous tensor; it is not initialised."""
        num_bytes = math.prod(shape) * dtype.itemsize
        while self._chunk < len(self._chunks) and self._used + num_bytes > self._chunks[self._chunk].nbytes:
            self._chunk, self._used = self._chunk + 1, 0
        if self._chunk == len(self._chunks):
            self._chunks.append(torch.empty(max(_CHUNK_BYTES, num_bytes), dtype=torch.uint8))
        part = self._chunks[self._chunk][self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return part.view(dtype).view(shape)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes the memory of new tensors from the program's, and notes the operations that torch
    computes itself, which no program repeats."""

    def __init__(self, memory: ProgramMemory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory
        self.computed: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: otherwise torch would import its compiler with the first operation, which
        takes two seconds, and nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format and kwargs.get("device") in (None, torch.device("cpu")):
            return self._memory.take(tuple(args[0]), kwargs.get("dtype") or torch.get_default_dtype())
        if func is torch.ops.aten.empty_like.default and args[0].is_contiguous() and args[0].is_cpu:
            return self._memory.take(tuple(args[0].shape), kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        # Not every operation called a view makes one: `to` and `contiguous` copy where necessary.
        if not func.is_view or not _memory_of(result) <= _memory_of((args, kwargs)):
            self.computed.append(str(func))
        return result


def _memory_of(values: Any) -> set[int]:
    """Return the addresses of the memory of the tensors among these values."""
    return {
        leaf.untyped_storage().data_ptr()
        for leaf in tree_leaves(values)
        if isinstance(leaf, Tensor) and leaf.numel()
    }


class Program:
    """Operations in order, with the addresses that they read and write. Weights, caches and inputs
    must stay at the addresses that they had during the recording; their values may change."""

    def __init__(self, memory: ProgramMemory) -> None:
        self._memory = memory
        self._names: list[str] = []
        self._arguments: list[Any] = []
        self._recorder = 0
        self._calls: ctypes.Array[structures.Call] | None = None
        self._seconds: ctypes.Array[ctypes.c_double] | None = None
        self.computed_elsewhere: tuple[str, ...] = ()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the operations of this thread. Afterwards `computed_elsewhere` names the
        operations that torch computed meanwhile; a program with any of these must not be run."""
        self._memory.rewind()
        watch = _Watch(self._memory)
        self._recorder = threading.get_ident()
        with native.observing(self._note), watch:
            yield
        self.computed_elsewhere = tuple(dict.fromkeys(watch.computed))
        self._build()

    def run(self) -> None:
        """Run all operations again.

        Raises:
            IndexError: an operation found a slot or block outside its cache.
        """
        assert self._calls is not None, "nothing was recorded"
        assert not self.computed_elsewhere, f"a program without {self.computed_elsewhere}"
        observed = native.observed()
        calls = self._timed_calls() if observed else self._calls
        done = native.run_program(ctypes.addressof(calls), len(calls))
        if observed:
            self._report(done)
        if done < len(calls):
            raise IndexError(
                f"{self._names[done]}, operation {done} of a program, found an index outside its cache"
            )

    def __len__(self) -> int:
        return len(self._names)

    def _note(self, name: str, arguments: Any, seconds: float) -> None:
        if threading.get_ident() != self._recorder:  # another engine of this process
            return
        self._names.append(name)
        self._arguments.append(arguments)

    def _build(self) -> None:
        self._calls = (structures.Call * len(self._names))(
            *(
                structures.Call(
                    native.address_of(name),
                    ctypes.addressof(arguments),
                    None,
                    structures.OPERATIONS[name].returns_status,
                )
                for name, arguments in zip(self._names, self._arguments, strict=True)
            )
        )

    def _timed_calls(self) -> "ctypes.Array[structures.Call]":
        assert self._calls is not None
        self._seconds = (ctypes.c_double * len(self._calls))()
        start = ctypes.addressof(self._seconds)
        timed = type(self._calls).from_buffer_copy(self._calls)
        for index, call in enumerate(timed):
            call.seconds = start + index * ctypes.sizeof(ctypes.c_double)
        return timed

    def _report(self, count: int) -> None:
        assert self._seconds is not None
        for name, arguments, seconds in zip(
            self._names[:count], self._arguments, self._seconds, strict=False
        ):
            native.report(name, arguments, seconds)


def record(memory: ProgramMemory, forward: Callable[[], Tensor]) -> tuple[Program, Tensor]:
    """Run `forward` and record it. Return the program and the result, which each `run` of the
    program writes again."""
    program = Program(memory)
    with program.recording():
        result = forward()
    return program, result
