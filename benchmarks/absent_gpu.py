"""A GPU that is absent: Triton compiles kernels for it, in the same way as on such a GPU, and their
launches do nothing.

Tensors without memory (device "meta") stand for those of the GPU: shapes, strides and alignments
are right, which is all that the choice of a kernel's variant reads. What runs inside sees no
values, so it must not need any.
"""

import gc
import importlib
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.nn import functional
from triton.runtime import build, driver
from triton.runtime.jit import JITFunction

from benchmarks.gpu_machine import has_python_h
from kernels import backend
from kernels.linear import reference as linear_reference
from workers.rank import pending, step_inputs

META = torch.device("meta")
PROCESSORS = 132
"""Number of multiprocessors of an H100 or H200."""
_MAX_SHARED_BYTES = 227 * 1024
_MAX_THREADS = 1024
_KERNELS = (
    *(
        "attention.paged",
        "attention.rope_store",
        "moe.on_triton",
        "linear.narrow",
        "pointwise.norm",
        "pointwise.yarn",
    ),
    *("embedding.lookup", "slots.read", "sampling.device", "moe.grouped", "moe.routing", "mxfp4.layouts"),
)
"""Modules that are imported before the names in them are replaced."""


class Launches:
    """The record of a `FakeDriver`.

    Attributes:
        count: number of launches.
        loaded: names of the kernels that were loaded, in order.
    """

    def __init__(self) -> None:
        self.count = 0
        self.loaded: list[str] = []

    def launch(self, *args: object) -> None:
        self.count += 1

    def load_binary(
        self, name: str, binary: bytes, shared_bytes: int, device: int
    ) -> tuple[int, int, int, int, int]:
        """Return (module, function, registers, spills, most threads of a block)."""
        self.loaded.append(name)
        return 1, 1, 0, 0, _MAX_THREADS


def can_build_launchers() -> bool:
    """Return whether there are a C compiler and Python's headers."""
    return shutil.which("gcc") is not None and has_python_h()


@contextmanager
def fake_driver(target: str, *, build_launchers: bool = False) -> Iterator[Launches]:
    """Set Triton's driver for CUDA, as if it had found a GPU of that target.

    Args:
        target: such as "sm_90".
        build_launchers: also compile, into Triton's cache, the C modules by which the driver loads
            and launches kernels.
    """
    from triton.backends.nvidia import driver as cuda

    capability, launches = divmod(int(target.removeprefix("sm_")), 10), Launches()
    module = mock.MagicMock(name="a C module of Triton's driver")
    module.launch, module.load_binary = launches.launch, launches.load_binary
    module.get_device_properties = lambda device: {
        "max_shared_mem": _MAX_SHARED_BYTES,
        "multiprocessor_count": PROCESSORS,
    }
    used: weakref.WeakSet[Any] = weakref.WeakSet()
    run = JITFunction.run

    def noted_run(kernel: Any, *args: Any, **options: Any) -> Any:
        used.add(kernel)
        return run(kernel, *args, **options)

    with ExitStack() as stack:
        if build_launchers:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            # Modules name the library that they need; the functions that they call are looked up
            # when they are loaded.
            stub = [
                "gcc",
                "-shared",
                "-nostdlib",
                "-Wl,-soname,libcuda.so.1",
                "-x",
                "c",
                "/dev/null",
                "-o",
                str(folder / "libcuda.so.1"),
            ]
            subprocess.run(stub, check=True, timeout=60)
            stack.enter_context(
                mock.patch.object(cuda, "library_dirs", return_value=[cuda.libdevice_dir, str(folder)])
            )
            stack.enter_context(mock.patch.object(build, "_load_module_from_path", return_value=module))
        else:
            stack.enter_context(mock.patch.object(cuda, "library_dirs", return_value=[]))
            for name in ("compile_module_from_src", "compile_module_from_file"):
                if hasattr(cuda, name):
                    stack.enter_context(mock.patch.object(cuda, name, return_value=module))
        fake = cuda.CudaDriver()
        fake.get_current_device = lambda: 0
        fake.set_current_device = lambda device: None
        fake.get_current_stream = lambda device: 0
        fake.get_device_capability = lambda device: capability
        stack.enter_context(mock.patch.object(JITFunction, "run", noted_run))
        before = driver._active
        driver.set_active(fake)
        try:
            yield launches
        finally:
            # While this driver is there: kernels that nothing holds any more are unloaded by it.
            for kernel in used:
                kernel.device_caches.clear()
            gc.collect()
            _forget_shared_memory()
            driver._active = before


def _forget_shared_memory() -> None:
    """Clear Triton's record of shared memory, which it keeps by the device's number."""
    from triton.compiler import compiler

    compiler.max_shared_mem.cache_clear()


@contextmanager
def meta_as(target: str) -> Iterator[None]:
    """Treat tensors without memory as those of a GPU of that target: kernels are selected for it;
    graphs, events and copies to the host do nothing."""
    for module in _KERNELS:
        importlib.import_module(f"kernels.{module}")
    everywhere: dict[str, Callable[..., object]] = {
        "triton_runs_on": lambda device: True,
        "architecture": lambda device: target,
        "_num_processors": lambda device: PROCESSORS,
        "checks_indices": lambda: False,
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(linear_reference, "linear", functional.linear))
        for name, found in list(sys.modules.items()):
            for function, replacement in everywhere.items():
                if (name.startswith(("kernels.", "benchmarks.", "workers.")) or found is backend) and hasattr(
                    found, function
                ):
                    stack.enter_context(mock.patch.object(found, function, replacement))
        for function, replacement in _FAKE_CUDA.items():
            stack.enter_context(mock.patch.object(torch.cuda, function, replacement))
        stack.enter_context(
            mock.patch.object(
                pending, "_to_pinned", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype)
            )
        )
        stack.enter_context(mock.patch.object(step_inputs.InputBuffers, "_allocate", _allocate))
        yield


class _Nothing:
    """A stream, event or graph that only has to exist."""

    def __init__(self, *args: object, **options: object) -> None:
        self.cuda_stream = 0

    def nothing(self, *args: object, **options: object) -> None: ...

    record = synchronize = wait_stream = wait_event = replay = capture_begin = capture_end = reset = nothing

    def query(self) -> bool:
        return True


_FAKE_CUDA: dict[str, Callable[..., object]] = {
    "Event": _Nothing,
    "Stream": _Nothing,
    "CUDAGraph": _Nothing,
    "graph": lambda *args, **options: nullcontext(),
    "stream": lambda stream: nullcontext(),
    "current_stream": lambda device=None: _Nothing(),
    "graph_pool_handle": lambda: (0, 0),
    "synchronize": lambda device=None: None,
    "mem_get_info": lambda device=None: (79 << 30, 79 << 30),
    "memory_snapshot": lambda *args, **options: [],
    "memory_reserved": lambda device=None: 0,
    "memory_allocated": lambda device=None: 0,
    "empty_cache": lambda: None,
    "get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=PROCESSORS),
}


def _allocate(buffers: object, num_bytes: int) -> step_inputs._HostBuffer:
    """Allocate a buffer that is not pinned."""
    tensor = torch.empty(num_bytes, dtype=torch.uint8)
    return step_inputs._HostBuffer(tensor, tensor.numpy())
