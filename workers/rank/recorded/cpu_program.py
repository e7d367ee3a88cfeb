"""The decode step on a CPU as one call: the model's operations are recorded once for each batch
size and run from C++ after that.

The counterpart of CUDA graphs. Only the model is recorded; logits and sampling, whose work depends
on the batch, run after it.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kernels.backend import triton_runs_on
from kernels.cpu import native
from kernels.cpu.program import Program, ProgramMemory, record
from workers.model.step_batch import StepBatch
from workers.rank.slots import FULL, SLIDING, DeviceSlots, SequenceSlots, StepRows, padding
from workers.rank.step_arrays import TOKEN_KNOWN, EdgeArrays, upload_edge_arrays
from workers.rank.step_inputs import Array, InputBuffers

logger = logging.getLogger(__name__)

MAX_PROGRAM_SIZE = 32
"""Maximum number of sequences in a program. In a larger step the overhead of Python is negligible,
but the activations of all layers, which a program keeps apart, are not."""


def programs_run() -> bool:
    """Return whether this installation can run programs on CPU tensors."""
    return native.shared_library() is not None and not triton_runs_on(torch.device("cpu"))


class DecodePrograms:
    """The programs of one runner, and the memory from which they read their inputs. A size is
    recorded at its first use.

    Args:
        forward: the model, a function from a batch to [T, hidden].
    """

    def __init__(
        self, slots: SequenceSlots, device_slots: DeviceSlots, forward: Callable[[StepBatch], Tensor]
    ) -> None:
        size = min(slots.max_num_seqs, MAX_PROGRAM_SIZE)
        self._max_size = size
        self._forward = forward
        self._newest = device_slots.newest.numpy()
        self._all_tables = device_slots.tables.numpy()
        self._device_slots = device_slots
        # Inputs, each at one address that all programs share.
        self._inputs = padding(size, device_slots.padding_slot)
        self._tables = np.zeros((2, size, slots.max_blocks), dtype=np.int32)
        self._memory = ProgramMemory()
        self._programs: dict[int, tuple[Program, Tensor]] = {}
        self._recordable = True

    def size_for(self, rows: StepRows) -> int | None:
        """Return the size of the program that can run this batch; None if it is no decode batch or
        too large."""
        size = rows.num_rows
        return size if self._recordable and rows.is_decode and size <= self._max_size else None

    def replay(self, rows: StepRows, size: int, buffers: InputBuffers) -> tuple[Tensor, EdgeArrays[Tensor]]:
        """Run a decode batch.

        Returns:
            ([size, hidden], valid until the next call; the arrays around the model).
        """
        edges = upload_edge_arrays(buffers, rows.edges)
        self._device_slots.set_blocks(edges)
        self._write_inputs(rows, size)
        return self._run(size), edges

    def _write_inputs(self, rows: StepRows, size: int) -> None:
        """Copy the step's arrays to the addresses that programs read, with the newest tokens filled
        in."""
        step, inputs = rows.model, self._inputs
        newest = self._newest[np.maximum(step.newest_of, 0)]
        inputs.token_ids[:size] = np.where(step.newest_of == TOKEN_KNOWN, step.token_ids, newest)
        inputs.positions[:size] = step.positions
        inputs.slot_mapping_full[:size] = step.slot_mapping_full
        inputs.slot_mapping_sliding[:size] = step.slot_mapping_sliding
        inputs.context_lens[:size] = step.context_lens
        for group in (FULL, SLIDING):
            self._tables[group, :size, : rows.num_blocks] = self._all_tables[
                group, step.slots, : rows.num_blocks
            ]

    def _run(self, size: int) -> Tensor:
        if size in self._programs:
            program, hidden = self._programs[size]
            program.run()
            return hidden
        batch = self._batch(size)
        program, hidden = record(self._memory, lambda: self._forward(batch))
        if program.computed_elsewhere:
            logger.info(
                "decode steps run operation by operation: %s have no kernel here",
                ", ".join(program.computed_elsewhere),
            )
            self._recordable = False
        else:
            self._programs[size] = program, hidden
        return hidden

    def _batch(self, size: int) -> StepBatch:
        def first(array: Array) -> Tensor:
            return torch.from_numpy(array[:size])

        inputs = self._inputs
        return StepBatch(
            token_ids=first(inputs.token_ids),
            positions=first(inputs.positions),
            slot_mapping_full=first(inputs.slot_mapping_full),
            slot_mapping_sliding=first(inputs.slot_mapping_sliding),
            block_table_full=first(self._tables[FULL]),
            block_table_sliding=first(self._tables[SLIDING]),
            context_lens=first(inputs.context_lens),
            cu_seqlens_q=torch.from_numpy(inputs.cu_seqlens_q[: size + 1]),
            max_query_len=1,
            # The sampled rows are selected outside the program.
            sample_indices=first(inputs.positions),
        )
