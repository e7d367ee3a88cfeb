"""The decode step on a CPU as one call: the model's operations recorded once for each batch size
and run from C++ after that.

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
from workers.rank.slots import FULL, SLIDING, DeviceSlots, SequenceSlots, StepRows
from workers.rank.step_inputs import InputBuffers

logger = logging.getLogger(__name__)

MAX_PROGRAM_SIZE = 32
"""Sequences; in a larger step what Python costs does not show, and the activations of all layers,
which a program keeps apart, would."""


def programs_run() -> bool:
    """Whether this installation has what runs programs, and CPU tensors go to it."""
    return native.shared_library() is not None and not triton_runs_on(torch.device("cpu"))


class DecodePrograms:
    """The programs of one runner, and the memory that they read their inputs from. A size is
    recorded when it is first met.

    Args:
        forward: the model: a batch → [T, hidden].
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
        # Inputs, each at one address for all programs.
        self._token_ids, self._positions, self._full, self._sliding = np.zeros((4, size), dtype=np.int64)
        self._context_lens = np.zeros(size, dtype=np.int32)
        self._cu_seqlens_q = torch.arange(size + 1, dtype=torch.int32)
        self._tables = np.zeros((2, size, slots.max_blocks), dtype=np.int32)
        self._memory = ProgramMemory()
        self._programs: dict[int, tuple[Program, Tensor]] = {}
        self._recordable = True

    def size_for(self, rows: StepRows) -> int | None:
        """The program that can run this batch; None: it is no decode batch, or too large."""
        size = len(rows.slots)
        return size if self._recordable and rows.is_decode and size <= self._max_size else None

    def replay(self, rows: StepRows, size: int, buffers: InputBuffers) -> tuple[Tensor, Tensor, Tensor]:
        """Run a decode batch.

        Returns:
            ([size, hidden], valid until the next call; sample_indices and slots of the sampled
            rows.)
        """
        sample_indices, sampled_slots, table_at, table_ids = buffers.upload(rows.other_arrays())
        self._device_slots.set_blocks(table_at, table_ids)
        self._write_inputs(rows, size)
        return self._run(size), sample_indices, sampled_slots

    def _write_inputs(self, rows: StepRows, size: int) -> None:
        """Each sequence has one token: its newest sampled one, where the host does not know it."""
        ids = rows.token_ids
        self._token_ids[:size] = np.where(ids < 0, self._newest[np.maximum(-1 - ids, 0)], ids)
        self._positions[:size] = rows.positions
        self._full[:size] = rows.slot_mapping_full
        self._sliding[:size] = rows.slot_mapping_sliding
        self._context_lens[:size] = rows.context_lens
        for group in (FULL, SLIDING):
            self._tables[group, :size, : rows.num_blocks] = self._all_tables[
                group, rows.slots, : rows.num_blocks
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
        def first(array: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> Tensor:
            return torch.from_numpy(array[:size])

        return StepBatch(
            token_ids=first(self._token_ids),
            positions=first(self._positions),
            slot_mapping_full=first(self._full),
            slot_mapping_sliding=first(self._sliding),
            block_table_full=first(self._tables[FULL]),
            block_table_sliding=first(self._tables[SLIDING]),
            context_lens=first(self._context_lens),
            cu_seqlens_q=self._cu_seqlens_q[: size + 1],
            max_query_len=1,
            # The sampled rows are taken outside.
            sample_indices=first(self._positions),
        )
