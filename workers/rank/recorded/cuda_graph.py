"""CUDA graphs of the decode step: the model's kernels are recorded once for each padded batch size
and launched as one.

Only the model is recorded. The layers' all-reduces are NCCL calls, which a graph can hold. Logits
and sampling, whose work depends on the batch, run after it. Sizes follow vLLM's (`vllm/config`,
cudagraph_capture_sizes).

This module has not run on a GPU yet.
"""

import bisect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels.backend import has_triton
from workers.model.step_batch import StepBatch
from workers.rank.slots import DeviceSlots, SequenceSlots, StepRows, padded, padding
from workers.rank.step_arrays import EdgeArrays, ModelArrays, upload_model_arrays, upload_step
from workers.rank.step_inputs import InputBuffers, packed_layout

MAX_GRAPH_SIZE = 512
"""Maximum number of sequences in a graph; larger batches keep the GPU busy without graphs."""
_TORCH_STREAMS = 32
"""Number of streams of a device at one priority (c10/cuda/CUDAStream.cpp)."""
_ROOM_BYTES = 64 * 1024
"""Bytes reserved beyond the batch, for sampled rows and new blocks; a step that needs more runs
without a graph."""


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Return the padded batch sizes, ascending: 1, 2, 4, multiples of 8 to 256, multiples of 16 to
    MAX_GRAPH_SIZE, and max_num_seqs itself below that."""
    largest = min(max_num_seqs, MAX_GRAPH_SIZE)
    steps = (1, 2, 4, *range(8, 256, 8), *range(256, MAX_GRAPH_SIZE + 1, 16))
    return tuple(sorted({size for size in steps if size < largest} | {largest}))


def graph_size(sizes: tuple[int, ...], num_seqs: int) -> int | None:
    """Return the smallest size that holds the batch; None if there is none."""
    index = bisect.bisect_left(sizes, num_seqs)
    return sizes[index] if index < len(sizes) else None


@dataclass(frozen=True, slots=True)
class GraphReport:
    """Bytes of GPU memory that each graph keeps, in the order of capture, the largest graph first.

    Attributes:
        pool_bytes: growth of the graphs' own pool, in whole segments of torch's allocator. Exact:
            it contains neither tensors of other threads nor memory of other processes.
        driver_bytes: memory that the driver took outside torch for the graph itself. The driver
            reports free memory only for the whole GPU, so this is wrong, in either direction, if
            another process took or freed memory during the capture.
    """

    pool_bytes: tuple[int, ...]
    driver_bytes: tuple[int, ...]

    @property
    def num_graphs(self) -> int:
        return len(self.pool_bytes)

    @property
    def memory_bytes(self) -> int:
        return sum(self.pool_bytes) + max(sum(self.driver_bytes), 0)


class DecodeGraphs:
    """The graphs of one runner, and the memory from which they read their inputs.

    Args:
        forward: the model, a function from a batch to [T, hidden].
    """

    def __init__(
        self, slots: SequenceSlots, device_slots: DeviceSlots, forward: Callable[[StepBatch], Tensor]
    ) -> None:
        self.sizes = graph_sizes(slots.max_num_seqs)
        self._max_blocks = slots.max_blocks
        self._device_slots = device_slots
        self._forward = forward
        self._inputs = torch.zeros(
            packed_layout(padding(self.sizes[-1], device_slots.padding_slot).in_order())[1] + _ROOM_BYTES,
            dtype=torch.uint8,
            device=device_slots.tables.device,
        )
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.inference_mode()
    def capture(self, progress: Callable[[str, int, int], None], *, limit: int | None = None) -> GraphReport:
        """Record all sizes, or the `limit` largest. The largest is recorded first: smaller ones
        then fit into its memory, which they share. May be called once.

        Raises:
            RuntimeError: a kernel was loaded while a graph was being captured.
        """
        device = self._inputs.device
        buffers = InputBuffers(device)
        stream = _streams.take(device)
        weakref.finalize(self, _let_go, self._graphs, _streams, device, stream)
        pool = torch.cuda.graph_pool_handle()
        sizes = self.sizes[::-1][:limit]
        pool_bytes, driver_bytes = [], []
        for done, size in enumerate(sizes):
            progress("capture graphs", done, len(sizes))
            arrays = padding(size, self._device_slots.padding_slot)
            inputs = upload_model_arrays(buffers, arrays, self._inputs)
            self._warm_up(inputs, stream)
            in_pool, beside_torch = _pool_bytes(pool), _bytes_beside_torch(device)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads of the process (NCCL's watchdog, the plan channel) may
            # call CUDA meanwhile.
            with (
                no_kernel_loads(f"a CUDA graph of {size} sequences"),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                hidden = self._run(inputs)
            self._graphs[size] = graph, hidden
            pool_bytes.append(_pool_bytes(pool) - in_pool)
            driver_bytes.append(_bytes_beside_torch(device) - beside_torch)
        progress("capture graphs", len(sizes), len(sizes))
        return GraphReport(tuple(pool_bytes), tuple(driver_bytes))

    def size_for(self, rows: StepRows) -> int | None:
        """Return the size of the graph that can run this batch; None if it is no decode batch, is
        too large, or brings too many new blocks."""
        if not rows.is_decode or packed_layout(rows.edges.in_order())[1] > _ROOM_BYTES:
            return None
        return graph_size(self.sizes, rows.num_rows)

    def replay(self, rows: StepRows, size: int, buffers: InputBuffers) -> tuple[Tensor, EdgeArrays[Tensor]]:
        """Queue a decode batch.

        Returns:
            ([size, hidden], valid until the next replay, as graphs share memory; the arrays around
            the model).
        """
        arrays = padded(rows.model, size, self._device_slots.padding_slot)
        _, edges = upload_step(buffers, arrays, rows.edges, self._inputs)
        self._device_slots.set_blocks(edges)
        graph, hidden = self._graphs[size]
        graph.replay()
        return hidden, edges

    def _warm_up(self, inputs: ModelArrays[Tensor], stream: torch.cuda.Stream) -> None:
        """Run once outside the graph, so that kernels are compiled and libraries allocate their
        workspaces."""
        stream.wait_stream(torch.cuda.current_stream(self._inputs.device))
        with torch.cuda.stream(stream):
            self._run(inputs)
        torch.cuda.current_stream(self._inputs.device).wait_stream(stream)

    def _run(self, inputs: ModelArrays[Tensor]) -> Tensor:
        # The sampled rows are selected outside the graph; any tensor can stand in for them here.
        return self._forward(self._device_slots.batch(inputs, inputs.token_ids, self._max_blocks, 1))


class CaptureStreams:
    """The streams of this process on which graphs are captured: one for each living set of graphs,
    reused by the next set once that set is gone.

    For each stream cuBLAS works in memory that it gets from torch (32 MiB on sm_90), and a graph
    holds its address. Versions of torch after 2.11 free the memory of a stream with any graph that
    was captured on it (pytorch issue 193402), even if other graphs hold it, so two sets must not
    share a stream. With a new stream for every set, an older torch would keep the memory of all of
    them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[torch.device, list[torch.cuda.Stream]] = {}
        self._known: set[tuple[torch.device, int]] = set()

    def take(self, device: torch.device) -> torch.cuda.Stream:
        """Return a stream that no living set of graphs uses.

        Raises:
            RuntimeError: all of torch's streams are in use.
        """
        with self._lock:
            free = self._free.setdefault(device, [])
            return free.pop() if free else self._new(device)

    def give_back(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        """Return a stream to the free ones, once the graphs captured on it are gone."""
        with self._lock:
            self._free[device].append(stream)

    def _new(self, device: torch.device) -> torch.cuda.Stream:
        # torch has a fixed number of streams for a device and hands them out in turn.
        for _ in range(_TORCH_STREAMS):
            stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if (device, stream.cuda_stream) not in self._known:
                self._known.add((device, stream.cuda_stream))
                return stream
        raise RuntimeError(
            f"{_TORCH_STREAMS} engines of this process hold CUDA graphs: no stream is left to capture more on"
        )


_streams = CaptureStreams()


def _let_go(
    graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]],
    streams: CaptureStreams,
    device: torch.device,
    stream: torch.cuda.Stream,
) -> None:
    """Destroy the graphs, and only then release their stream for other captures."""
    graphs.clear()
    streams.give_back(device, stream)


def use_cublas_on_next_stream(device: torch.device) -> None:
    """Make cuBLAS allocate its memory for the stream of the next set of graphs, so that it counts
    as in use from now on."""
    stream = _streams.take(device)
    with torch.cuda.stream(stream):
        multiply(device)
    torch.cuda.synchronize(device)
    _streams.give_back(device, stream)


def multiply(device: torch.device) -> None:
    """Run both kinds of product that a model has, with and without a bias, so that cuBLAS and
    cuBLASLt allocate their memory."""
    square = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    functional.linear(square, square, square[0])
    square @ square


@contextmanager
def no_kernel_loads(what: str) -> Iterator[None]:
    """Raise RuntimeError if this thread makes Triton load a kernel within the context; the kernel
    is not loaded.

    Loading may call CUDA functions that break a capture; and a kernel that was not loaded in the
    run before the capture shows that the two runs differ. Other threads may load kernels. Kernels
    of libraries, such as cuBLAS's, are not watched.

    Args:
        what: name of what is being captured, for the error.
    """
    if not has_triton():
        yield
        return
    from triton import knobs

    thread, hook = threading.get_ident(), knobs.runtime.kernel_load_start_hook

    def refuse(module: object, function: object, name: str, metadata_group: object, key: str) -> None:
        if threading.get_ident() == thread:
            raise RuntimeError(
                f"Triton loads the kernel {name} while {what} is captured, though the same step ran just "
                f"before, "
                "with all its kernels: an error in Cantata. With engine.enforce_eager it runs without graphs"
            )

    hook.add(refuse)
    try:
        yield
    finally:
        hook.remove(refuse)


def _pool_bytes(pool: tuple[int, int]) -> int:
    """Return the bytes that torch's allocator holds for the graphs of this pool."""
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return sum(
        segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(pool)
    )


def _bytes_beside_torch(device: torch.device) -> int:
    """Return the bytes of GPU memory in use outside this process's torch allocator."""
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))
