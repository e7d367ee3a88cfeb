"""CUDA graphs of the decode step: the model's kernels recorded once for each padded batch size and launched as one.

Only the model is recorded; the layers' all-reduces are NCCL calls, which can be. Logits and sampling, whose work depends on the batch, run
after it. Sizes follow vLLM's (`vllm/config`, cudagraph_capture_sizes).
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from workers.executor.slots import DeviceSlots, SequenceSlots, StepRows
from workers.executor.step_inputs import InputBuffers, packed_layout
from workers.model.step_batch import StepBatch

MAX_GRAPH_SIZE = 512
"""Sequences; larger batches keep the GPU busy without graphs."""
_ROOM_BYTES = 64 * 1024
"""Beyond the batch, for sampled rows and new blocks; a step that needs more runs without a graph."""


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Padded batch sizes, ascending: 1, 2, 4, by eights to 256, by sixteens to MAX_GRAPH_SIZE, and max_num_seqs itself below that."""
    largest = min(max_num_seqs, MAX_GRAPH_SIZE)
    steps = (1, 2, 4, *range(8, 256, 8), *range(256, MAX_GRAPH_SIZE + 1, 16))
    return tuple(sorted({size for size in steps if size < largest} | {largest}))


def graph_size(sizes: tuple[int, ...], num_seqs: int) -> int | None:
    """The smallest size that holds the batch; None if none does."""
    index = bisect.bisect_left(sizes, num_seqs)
    return sizes[index] if index < len(sizes) else None


@dataclass(frozen=True, slots=True)
class GraphReport:
    """What capturing took: bytes of GPU memory that each graph keeps, in the order of capture, the largest graph first."""

    graph_bytes: tuple[int, ...]

    @property
    def num_graphs(self) -> int:
        return len(self.graph_bytes)

    @property
    def memory_bytes(self) -> int:
        return sum(self.graph_bytes)


class DecodeGraphs:
    """The graphs of one runner, and the memory that they read their inputs from.

    Args:
        forward: the model: a batch → [T, hidden].
    """

    def __init__(self, slots: SequenceSlots, device_slots: DeviceSlots, forward: Callable[[StepBatch], Tensor]) -> None:
        self.sizes = graph_sizes(slots.max_num_seqs)
        self._max_blocks = slots.max_blocks
        self._device_slots = device_slots
        self._forward = forward
        self._inputs = torch.zeros(
            packed_layout(padding_rows(self.sizes[-1], device_slots.padding_slot).batch_arrays())[1] + _ROOM_BYTES,
            dtype=torch.uint8,
            device=device_slots.tables.device,
        )
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.inference_mode()
    def capture(self, progress: Callable[[str, int, int], None], *, limit: int | None = None) -> GraphReport:
        """Record all sizes, or so many, the largest first: the smaller ones then fit into its memory, which they share."""
        device = self._inputs.device
        buffers = InputBuffers(device)
        stream = _capture_stream(device)
        pool = torch.cuda.graph_pool_handle()
        sizes = self.sizes[::-1][:limit]
        free = _free_bytes(device)
        graph_bytes = []
        for done, size in enumerate(sizes):
            progress("capture graphs", done, len(sizes))
            arrays = padding_rows(size, self._device_slots.padding_slot).batch_arrays()
            tensors = buffers.upload(arrays, self._inputs)
            self._warm_up(tensors, stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads of the process (NCCL's watchdog, the plan channel) may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                hidden = self._run(tensors)
            self._graphs[size] = graph, hidden
            before, free = free, _free_bytes(device)
            graph_bytes.append(before - free)
        progress("capture graphs", len(sizes), len(sizes))
        return GraphReport(tuple(graph_bytes))

    def size_for(self, rows: StepRows) -> int | None:
        """The graph that can run this batch; None: it is no decode batch, too large, or brings too many new blocks."""
        if not rows.is_decode or packed_layout(rows.other_arrays())[1] > _ROOM_BYTES:
            return None
        return graph_size(self.sizes, len(rows.slots))

    def replay(self, rows: StepRows, size: int, buffers: InputBuffers) -> tuple[Tensor, Tensor, Tensor]:
        """Queue a decode batch.

        Returns:
            ([size, hidden], valid until the next replay, as graphs share memory; sample_indices and slots of the sampled rows.)
        """
        arrays = rows.padded(size, self._device_slots.padding_slot).batch_arrays()
        tensors = buffers.upload(arrays + rows.other_arrays(), self._inputs)
        sample_indices, sampled_slots, table_at, table_ids = tensors[len(arrays) :]
        self._device_slots.set_blocks(table_at, table_ids)
        graph, hidden = self._graphs[size]
        graph.replay()
        return hidden, sample_indices, sampled_slots

    def _warm_up(self, tensors: list[Tensor], stream: torch.cuda.Stream) -> None:
        """Run once outside the graph: kernels are compiled, libraries allocate their workspaces."""
        stream.wait_stream(torch.cuda.current_stream(self._inputs.device))
        with torch.cuda.stream(stream):
            self._run(tensors)
        torch.cuda.current_stream(self._inputs.device).wait_stream(stream)

    def _run(self, tensors: list[Tensor]) -> Tensor:
        # The sampled rows are taken outside; any tensor stands for them here.
        return self._forward(self._device_slots.batch(tensors, tensors[0], self._max_blocks, 1))


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a process: cuBLAS keeps a workspace, 32 MiB on sm_90, for each stream that it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _free_bytes(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def padding_rows(size: int, padding_slot: int) -> StepRows:
    """A decode batch of nothing but padding."""
    none = np.zeros(0, dtype=np.int64)
    ids = np.zeros(0, dtype=np.int32)
    empty = StepRows(none, none, none, none, none, none, none, ids, np.zeros(1, dtype=np.int32), none, none, ids, 1)
    return empty.padded(size, padding_slot)
