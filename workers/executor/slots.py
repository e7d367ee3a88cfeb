"""A rank's memory of its live sequences: one row of numpy arrays each, so that a step's batch is built by indexing."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.config import BLOCK_SIZE
from workers.model.step_batch import StepBatch
from workers.scheduler.plan import NULL_BLOCK, SequenceStart, StepPlan

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepRows:
    """What a plan computes, by slot.

    Attributes:
        slots: [S] slot of each sequence, in plan order.
        sampled: [num_samples] indices into `slots` of the sequences that yield a token.
    """

    slots: Ints
    sampled: Ints
    batch: StepBatch


class SequenceSlots:
    """Tokens and block tables by slot. Pages of `tokens` are only touched as far as sequences are long.

    Args:
        max_num_seqs: sequences known at once.
        max_model_len: tokens of a sequence at most.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        max_blocks = -(-max_model_len // BLOCK_SIZE)
        self.tokens = np.zeros((max_num_seqs, max_model_len), dtype=np.int32)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._full_blocks = np.full((max_num_seqs, max_blocks), NULL_BLOCK, dtype=np.int32)
        self._sliding_blocks = np.full((max_num_seqs, max_blocks), NULL_BLOCK, dtype=np.int32)
        self._num_full = [0] * max_num_seqs
        self._num_sliding = [0] * max_num_seqs
        self._slot_of: dict[int, int] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))

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
        self.tokens[slot, : len(start.token_ids)] = start.token_ids
        self.num_tokens[slot] = len(start.token_ids)
        self.num_prompt_tokens[slot] = start.num_prompt_tokens
        self._num_full[slot] = self._num_sliding[slot] = 0
        self._append_blocks(slot, start.full_blocks, start.sliding_blocks)
        return slot

    def append_tokens(self, slots: Ints, token_ids: Ints) -> None:
        """One sampled token for each of these slots."""
        self.tokens[slots, self.num_tokens[slots]] = token_ids
        self.num_tokens[slots] += 1

    def build(self, plan: StepPlan, device: torch.device) -> StepRows:
        """Append the plan's new blocks and lay out its tokens. Drops and starts have been applied."""
        slots = np.fromiter(map(self._slot_of.__getitem__, plan.seq_ids), dtype=np.int64, count=len(plan.seq_ids))
        for index, full, sliding in plan.new_blocks:
            self._append_blocks(int(slots[index]), full, sliding)
        computed = np.array(plan.num_computed_tokens, dtype=np.int64)
        scheduled = np.array(plan.num_scheduled_tokens, dtype=np.int64)
        samples = np.array(plan.samples, dtype=bool)
        context_lens = computed + scheduled
        assert ((context_lens == self.num_tokens[slots]) == samples).all(), "the plan samples where tokens are missing, or not at the end"
        ends = np.cumsum(scheduled)
        rows = np.repeat(slots, scheduled)
        positions = np.arange(ends[-1]) + np.repeat(context_lens - ends, scheduled)
        blocks, offsets = positions // BLOCK_SIZE, positions % BLOCK_SIZE
        num_blocks = -(-int(context_lens.max()) // BLOCK_SIZE)
        sampled = np.flatnonzero(samples)
        batch = StepBatch(
            token_ids=_tensor(self.tokens[rows, positions].astype(np.int64), device),
            positions=_tensor(positions, device),
            slot_mapping_full=_tensor(self._full_blocks[rows, blocks].astype(np.int64) * BLOCK_SIZE + offsets, device),
            slot_mapping_sliding=_tensor(self._sliding_blocks[rows, blocks].astype(np.int64) * BLOCK_SIZE + offsets, device),
            block_table_full=_tensor(self._full_blocks[slots, :num_blocks], device),
            block_table_sliding=_tensor(self._sliding_blocks[slots, :num_blocks], device),
            context_lens=_tensor(context_lens.astype(np.int32), device),
            cu_seqlens_q=_tensor(np.concatenate(([0], ends)).astype(np.int32), device),
            sample_indices=_tensor(ends[sampled] - 1, device),
        )
        return StepRows(slots, sampled, batch)

    def _append_blocks(self, slot: int, full: tuple[int, ...], sliding: tuple[int, ...]) -> None:
        num_full, num_sliding = self._num_full[slot], self._num_sliding[slot]
        self._full_blocks[slot, num_full : num_full + len(full)] = full
        self._sliding_blocks[slot, num_sliding : num_sliding + len(sliding)] = sliding
        self._num_full[slot] = num_full + len(full)
        self._num_sliding[slot] = num_sliding + len(sliding)


def _tensor(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
