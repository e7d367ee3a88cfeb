"""A rank's memory of its live sequences, by slot, so that a step's batch is built by indexing.

Lengths and prompts are on the host. Block tables and each sequence's newest sampled token are on
the device: the host lays out the next step without having seen the tokens of the last one, and a
step uploads only the blocks that are new.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.slots import read_slots
from workers.config import BLOCK_SIZE
from workers.model.step_batch import StepBatch
from workers.rank.step_inputs import Array
from workers.scheduler.plan import NULL_BLOCK, SequenceStart, StepPlan

Ints = npt.NDArray[np.int64]
FULL, SLIDING = 0, 1


@dataclass(frozen=True, slots=True)
class StepRows:
    """What a plan computes, still on the host. T tokens of S sequences, as in StepBatch.

    Attributes:
        slots: [S] slot of each sequence, in plan order.
        sampled: [num_samples] indices into `slots` of the sequences that yield a token.
        output_positions: [num_samples] index of the token to sample among its sequence's output
            tokens.
        token_ids: [T] int64; -1 - slot stands for the newest token sampled for that slot, which
            only the device knows.
        table_at, table_ids: [n] int64, int32: block table entries that this step sets, as flat
            indices into `DeviceSlots.tables`.
        num_blocks: of the longest sequence.
    """

    slots: Ints
    sampled: Ints
    output_positions: Ints
    token_ids: Ints
    positions: Ints
    slot_mapping_full: Ints
    slot_mapping_sliding: Ints
    context_lens: npt.NDArray[np.int32]
    cu_seqlens_q: npt.NDArray[np.int32]
    sample_indices: Ints
    table_at: Ints
    table_ids: npt.NDArray[np.int32]
    num_blocks: int

    @property
    def is_decode(self) -> bool:
        """Whether each sequence computes one token."""
        return len(self.token_ids) == len(self.slots)

    @property
    def samples_all(self) -> bool:
        """Whether each row of a decode yields a token, so that `sample_indices` are the first rows
        in order."""
        return self.is_decode and len(self.sampled) == len(self.slots)

    @property
    def max_query_len(self) -> int:
        """Tokens that one sequence computes at most."""
        return 1 if self.is_decode else int(np.diff(self.cu_seqlens_q).max())

    def batch_arrays(self) -> list[Array]:
        """What StepBatch is made of on the device; their shapes depend on T and S only."""
        return [
            self.token_ids,
            self.positions,
            self.slot_mapping_full,
            self.slot_mapping_sliding,
            self.slots,
            self.context_lens,
            self.cu_seqlens_q,
        ]

    def other_arrays(self) -> list[Array]:
        """Inputs around the model: sampled rows, their slots, new block table entries."""
        return [self.sample_indices, self.slots[self.sampled], self.table_at, self.table_ids]

    def padded(self, size: int, padding_slot: int) -> "StepRows":
        """A decode batch with rows up to `size` that compute a token of a sequence of one, written
        to and read from NULL_BLOCK.

        Args:
            padding_slot: its block table is all NULL_BLOCK.
        """
        assert self.is_decode, "only decode batches are padded"
        missing = size - len(self.slots)
        zeros, ones = np.zeros(missing, dtype=np.int64), np.ones(missing, dtype=np.int32)
        null = zeros + NULL_BLOCK * BLOCK_SIZE
        return StepRows(
            slots=np.concatenate((self.slots, zeros + padding_slot)),
            sampled=self.sampled,
            output_positions=self.output_positions,
            token_ids=np.concatenate((self.token_ids, zeros)),
            positions=np.concatenate((self.positions, zeros)),
            slot_mapping_full=np.concatenate((self.slot_mapping_full, null)),
            slot_mapping_sliding=np.concatenate((self.slot_mapping_sliding, null)),
            context_lens=np.concatenate((self.context_lens, ones)),
            cu_seqlens_q=np.arange(size + 1, dtype=np.int32),
            sample_indices=self.sample_indices,
            table_at=self.table_at,
            table_ids=self.table_ids,
            num_blocks=self.num_blocks,
        )


class SequenceSlots:
    """The host's part. Pages of `_tokens` are only touched as far as prompts are long.

    Args:
        max_num_seqs: sequences known at once.
        max_model_len: tokens of a sequence at most.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        self.max_num_seqs = max_num_seqs
        # A sequence that is complete may be planned once more before that is known: one further
        # position.
        self.max_blocks = max_model_len // BLOCK_SIZE + 1
        self._tokens = np.zeros((max_num_seqs, max_model_len), dtype=np.int32)
        self._num_known = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._tables = np.full((2, max_num_seqs + 1, self.max_blocks), NULL_BLOCK, dtype=np.int32)
        self._num_blocks = ([0] * max_num_seqs, [0] * max_num_seqs)
        self._slot_of: dict[int, int] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))
        # Table entries to be set, here and on the device, with the next step: flat indices and
        # block ids.
        self._new_at: list[range] = []
        self._new_ids: list[int] = []

    def slot(self, seq_id: int) -> int:
        """Where a live sequence lives."""
        return self._slot_of[seq_id]

    def drop(self, seq_id: int) -> int:
        """Forget a sequence; returns the slot it had."""
        slot = self._slot_of.pop(seq_id)
        self._free.append(slot)
        return slot

    def start(self, start: SequenceStart) -> int:
        """Take in a sequence; returns its slot."""
        assert start.seq_id not in self._slot_of, f"sequence {start.seq_id} started twice"
        slot = self._free.pop()
        self._slot_of[start.seq_id] = slot
        self._tokens[slot, : len(start.token_ids)] = start.token_ids
        self._num_known[slot] = self._num_tokens[slot] = len(start.token_ids)
        self._num_prompt_tokens[slot] = start.num_prompt_tokens
        self._num_blocks[FULL][slot] = self._num_blocks[SLIDING][slot] = 0
        self._append_blocks(slot, start.full_blocks, start.sliding_blocks)
        return slot

    def build(self, plan: StepPlan) -> StepRows:
        """Append the plan's new blocks, lay out its tokens, and count the tokens it samples. Drops
        and starts have been applied."""
        slots = np.fromiter(
            map(self._slot_of.__getitem__, plan.seq_ids), dtype=np.int64, count=len(plan.seq_ids)
        )
        for index, full, sliding in plan.new_blocks:
            self._append_blocks(int(slots[index]), full, sliding)
        table_at, table_ids = self._set_new_blocks()
        computed = np.array(plan.num_computed_tokens, dtype=np.int64)
        scheduled = np.array(plan.num_scheduled_tokens, dtype=np.int64)
        samples = np.array(plan.samples, dtype=bool)
        context_lens = computed + scheduled
        num_tokens = self._num_tokens[slots]
        assert ((context_lens == num_tokens) == samples).all(), (
            "the plan samples where tokens are missing, or not at the end"
        )
        ends = np.cumsum(scheduled)
        if int(ends[-1]) == len(slots):
            rows, positions = slots, computed
        else:
            rows = np.repeat(slots, scheduled)
            positions = np.arange(ends[-1]) + np.repeat(context_lens - ends, scheduled)
        blocks, offsets = positions // BLOCK_SIZE, positions % BLOCK_SIZE
        # A position past the known ones is that of the newest sampled token: the others have been
        # computed.
        token_ids = -1 - rows
        known = np.flatnonzero(positions < self._num_known[rows])
        token_ids[known] = self._tokens[rows[known], positions[known]]
        sampled = np.flatnonzero(samples)
        sampling = slots[sampled]
        output_positions = num_tokens[sampled] - self._num_prompt_tokens[sampling]
        self._num_tokens[sampling] += 1
        return StepRows(
            slots=slots,
            sampled=sampled,
            output_positions=output_positions,
            token_ids=token_ids,
            positions=positions,
            slot_mapping_full=self._tables[FULL, rows, blocks].astype(np.int64) * BLOCK_SIZE + offsets,
            slot_mapping_sliding=self._tables[SLIDING, rows, blocks].astype(np.int64) * BLOCK_SIZE + offsets,
            context_lens=context_lens.astype(np.int32),
            cu_seqlens_q=np.concatenate(([0], ends)).astype(np.int32),
            sample_indices=ends[sampled] - 1,
            table_at=table_at,
            table_ids=table_ids,
            num_blocks=-(-int(context_lens.max()) // BLOCK_SIZE),
        )

    def _set_new_blocks(self) -> tuple[Ints, npt.NDArray[np.int32]]:
        """Set the table entries that are new; returns them, for the device."""
        table_at = np.fromiter(
            (at for part in self._new_at for at in part), dtype=np.int64, count=len(self._new_ids)
        )
        table_ids = np.array(self._new_ids, dtype=np.int32)
        self._new_at.clear()
        self._new_ids.clear()
        self._tables.reshape(-1)[table_at] = table_ids
        return table_at, table_ids

    def _append_blocks(self, slot: int, full: tuple[int, ...], sliding: tuple[int, ...]) -> None:
        for group, new in ((FULL, full), (SLIDING, sliding)):
            first = self._num_blocks[group][slot]
            end = self._num_blocks[group][slot] = first + len(new)
            row = (group * (self.max_num_seqs + 1) + slot) * self.max_blocks
            self._new_at.append(range(row + first, row + end))
            self._new_ids.extend(new)


class DeviceSlots:
    """The device's part: block tables and newest tokens by slot. The slot behind the last is that
    of padding rows.

    Attributes:
        tables: [2, max_num_seqs + 1, max_blocks] int32: full, sliding.
        newest: [max_num_seqs + 1] int64.
    """

    def __init__(self, slots: SequenceSlots, device: torch.device) -> None:
        self.padding_slot = slots.max_num_seqs
        self.tables = torch.full(
            (2, slots.max_num_seqs + 1, slots.max_blocks), NULL_BLOCK, dtype=torch.int32, device=device
        )
        self.newest = torch.zeros(slots.max_num_seqs + 1, dtype=torch.int64, device=device)

    def set_blocks(self, table_at: Tensor, table_ids: Tensor) -> None:
        """Take in what `StepRows` says is new."""
        if len(table_ids):
            self.tables.view(-1).index_copy_(0, table_at, table_ids)

    def batch(
        self, arrays: list[Tensor], sample_indices: Tensor, num_blocks: int, max_query_len: int
    ) -> StepBatch:
        """The model's input from `StepRows.batch_arrays` on the device; reads nothing back, so that
        a CUDA graph can hold it.

        Args:
            num_blocks: width of the block tables.
            max_query_len: as in StepBatch.
        """
        token_ids, positions, slot_mapping_full, slot_mapping_sliding, slots, context_lens, cu_seqlens_q = (
            arrays
        )
        token_ids, tables = read_slots(token_ids, slots, self.newest, self.tables, num_blocks)
        return StepBatch(
            token_ids=token_ids,
            positions=positions,
            slot_mapping_full=slot_mapping_full,
            slot_mapping_sliding=slot_mapping_sliding,
            block_table_full=tables[FULL],
            block_table_sliding=tables[SLIDING],
            context_lens=context_lens,
            cu_seqlens_q=cu_seqlens_q,
            sample_indices=sample_indices,
            max_query_len=max_query_len,
        )
