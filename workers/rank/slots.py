"""A rank's state of its live sequences, by slot, so that a step's batch is built by indexing.

Lengths and prompts are on the host. Block tables and each sequence's newest sampled token are on
the device: the host prepares the next step without having seen the tokens of the last one, and a
step uploads only new blocks.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.slots import select as select_slots
from workers.config import BLOCK_SIZE
from workers.kv_cache.block_pool import NULL_BLOCK
from workers.model.step_batch import StepBatch
from workers.rank.drafts import NO_DRAFT, DraftRows
from workers.rank.step_arrays import TOKEN_KNOWN, EdgeArrays, ModelArrays
from workers.rank.step_inputs import Array
from workers.scheduler.plan import SequenceStart, StepPlan

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
FULL, SLIDING = 0, 1


@dataclass(frozen=True, slots=True)
class StepRows:
    """The computation of a plan, still on the host.

    An entry of the plan is one row, and each of its drafts is another: so a batch of decodes stays
    one, and each row yields at most one token.

    Attributes:
        model: T tokens of S rows.
        edges: input around the model.
        entries: [S] index of each row's entry in the plan.
        sampled: [num_samples] indices of the rows after which a token is sampled.
        output_positions: [num_samples] index of the token to sample among its sequence's output
            tokens.
        num_blocks: number of blocks of the longest sequence.
        drafts: None if the plan has none.
    """

    model: ModelArrays[Array]
    edges: EdgeArrays[Array]
    entries: Ints
    sampled: Ints
    output_positions: Ints
    num_blocks: int
    drafts: DraftRows | None

    @property
    def num_rows(self) -> int:
        return len(self.model.slots)

    @property
    def sampled_slots(self) -> Ints:
        """[num_samples] slots of the sequences in `sampled`."""
        return self.edges.sampled_slots.astype(np.int64, copy=False)

    @property
    def is_decode(self) -> bool:
        """True if each row is one token."""
        return len(self.model.token_ids) == len(self.model.slots)

    @property
    def samples_all(self) -> bool:
        """True if a token is sampled after each row of a decode, so that `sample_indices` are the
        first rows in order."""
        return self.is_decode and len(self.sampled) == self.num_rows

    @property
    def max_query_len(self) -> int:
        """Maximum number of tokens of a row."""
        return 1 if self.is_decode else int(np.diff(self.model.cu_seqlens_q).max())


def padded(model: ModelArrays[Array], size: int, padding_slot: int) -> ModelArrays[Array]:
    """Return a decode batch extended to `size` rows. Each added row computes one token of a
    sequence of length one, whose KV is written to and read from NULL_BLOCK.

    Args:
        padding_slot: slot whose block table is all NULL_BLOCK.
    """
    missing = size - len(model.slots)
    assert len(model.token_ids) == len(model.slots), "only decode batches are padded"
    zeros, ones = np.zeros(missing, dtype=np.int64), np.ones(missing, dtype=np.int32)
    null = zeros + NULL_BLOCK * BLOCK_SIZE
    return ModelArrays(
        token_ids=np.concatenate((model.token_ids, zeros)),
        newest_of=np.concatenate((model.newest_of, zeros + TOKEN_KNOWN)),
        positions=np.concatenate((model.positions, zeros)),
        slot_mapping_full=np.concatenate((model.slot_mapping_full, null)),
        slot_mapping_sliding=np.concatenate((model.slot_mapping_sliding, null)),
        slots=np.concatenate((model.slots, zeros + padding_slot)),
        context_lens=np.concatenate((model.context_lens, ones)),
        cu_seqlens_q=np.arange(size + 1, dtype=np.int32),
    )


def padding(size: int, padding_slot: int) -> ModelArrays[Array]:
    """Return a decode batch that consists of padding only."""
    none, ids = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
    starts = np.zeros(1, dtype=np.int32)
    empty: ModelArrays[Array] = ModelArrays(none, none, none, none, none, none, ids, starts)
    return padded(empty, size, padding_slot)


class SequenceSlots:
    """The slots' state on the host. Pages of `_tokens` are only touched as far as prompts are long.

    Args:
        max_num_seqs: maximum number of live sequences.
        max_model_len: maximum tokens of a sequence.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        self.max_num_seqs = max_num_seqs
        # A complete sequence may be planned once more before its end is known: one further
        # position.
        self.max_blocks = max_model_len // BLOCK_SIZE + 1
        self._tokens = np.zeros((max_num_seqs, max_model_len), dtype=np.int32)
        self._num_known = np.zeros(max_num_seqs, dtype=np.int64)
        # Bounds on the current number of tokens of each sequence; they differ if the last step had
        # drafts.
        self._num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._most_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._tables = np.full((2, max_num_seqs + 1, self.max_blocks), NULL_BLOCK, dtype=np.int32)
        self._num_blocks = ([0] * max_num_seqs, [0] * max_num_seqs)
        self._slot_of: dict[int, int] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))
        # Table entries to set with the next step, here and on the device: flat indices and block
        # ids.
        self._new_at: list[range] = []
        self._new_ids: list[int] = []

    def slot(self, seq_id: int) -> int:
        """Return the slot of a live sequence."""
        return self._slot_of[seq_id]

    def drop(self, seq_id: int) -> int:
        """Drop a sequence and return its slot."""
        slot = self._slot_of.pop(seq_id)
        self._free.append(slot)
        return slot

    def start(self, start: SequenceStart) -> int:
        """Add a sequence and return its slot."""
        assert start.seq_id not in self._slot_of, f"sequence {start.seq_id} started twice"
        slot = self._free.pop()
        self._slot_of[start.seq_id] = slot
        self._tokens[slot, : len(start.token_ids)] = start.token_ids
        self._num_known[slot] = len(start.token_ids)
        self._num_tokens[slot] = self._most_tokens[slot] = len(start.token_ids)
        self._num_prompt_tokens[slot] = start.num_prompt_tokens
        self._num_blocks[FULL][slot] = self._num_blocks[SLIDING][slot] = 0
        self._append_blocks(slot, start.full_blocks, start.sliding_blocks)
        return slot

    def build(self, plan: StepPlan) -> StepRows:
        """Append the plan's new blocks, lay out its tokens, and count the tokens that it samples.
        The plan's drops and starts must have been applied."""
        slots = np.fromiter(
            map(self._slot_of.__getitem__, plan.seq_ids), dtype=np.int64, count=len(plan.seq_ids)
        )
        for index, full, sliding in plan.new_blocks:
            self._append_blocks(int(slots[index]), full, sliding)
        computed = np.array(plan.num_computed_tokens, dtype=np.int64)
        scheduled = np.array(plan.num_scheduled_tokens, dtype=np.int64)
        samples = np.array(plan.samples, dtype=bool)
        num_drafts: Ints | None = None
        if plan.drafts:
            num_drafts = np.zeros(len(slots), dtype=np.int64)
            for index, drafts in plan.drafts:
                num_drafts[index] = len(drafts)
            scheduled -= num_drafts
        self._count(slots, computed + scheduled, samples, num_drafts)
        entries = np.arange(len(slots))
        if num_drafts is not None:
            slots, computed, scheduled, samples, entries = _with_draft_rows(
                slots, computed, scheduled, samples, num_drafts
            )
        return self._lay_out(plan, slots, computed, scheduled, samples, entries)

    def prompt_tokens(self, seq_id: int, start: int, end: int) -> Ints:
        """Return the prompt tokens of a live sequence at positions start..end."""
        return self._tokens[self._slot_of[seq_id], start:end].astype(np.int64)

    def _count(self, slots: Ints, lengths: Ints, samples: Bools, num_drafts: Ints | None) -> None:
        """Check the plan against the existing tokens, and count those that the step will add.

        Args:
            lengths: tokens computed after the step, without drafts.
        """
        fits = (lengths >= self._num_tokens[slots]) & (lengths <= self._most_tokens[slots])
        assert (fits == samples).all(), "the plan samples where tokens are missing, or not at the end"
        sampling, following = slots[samples], lengths[samples] + 1
        self._num_tokens[sampling] = following
        self._most_tokens[sampling] = following if num_drafts is None else following + num_drafts[samples]

    def _lay_out(
        self,
        plan: StepPlan,
        slots: Ints,
        computed: Ints,
        scheduled: Ints,
        samples: Bools,
        entries: Ints,
    ) -> StepRows:
        table_at, table_ids = self._set_new_blocks()
        context_lens = computed + scheduled
        ends = np.cumsum(scheduled)
        if int(ends[-1]) == len(slots):
            rows, positions = slots, computed
        else:
            rows = np.repeat(slots, scheduled)
            positions = np.arange(ends[-1]) + np.repeat(context_lens - ends, scheduled)
        blocks, offsets = positions // BLOCK_SIZE, positions % BLOCK_SIZE
        # A position past the known ones holds the newest sampled token: all others have been
        # computed.
        is_known = positions < self._num_known[rows]
        known = np.flatnonzero(is_known)
        token_ids = np.zeros(len(rows), dtype=np.int64)
        token_ids[known] = self._tokens[rows[known], positions[known]]
        newest_of = np.where(is_known, TOKEN_KNOWN, rows)
        sampled = np.flatnonzero(samples)
        drafts = None
        if plan.drafts:
            drafts = _draft_rows(plan, entries[sampled])
            first_tokens = ends - scheduled
            for index, ids in plan.drafts:
                # An entry's drafts are its last rows.
                last = np.searchsorted(entries, index, side="right")
                at = first_tokens[last - len(ids) : last]
                token_ids[at], newest_of[at] = ids, TOKEN_KNOWN
        full, sliding = (self._tables[group, rows, blocks].astype(np.int64) for group in (FULL, SLIDING))
        return StepRows(
            model=ModelArrays(
                token_ids=token_ids,
                newest_of=newest_of,
                positions=positions,
                slot_mapping_full=full * BLOCK_SIZE + offsets,
                slot_mapping_sliding=sliding * BLOCK_SIZE + offsets,
                slots=slots,
                context_lens=context_lens.astype(np.int32),
                cu_seqlens_q=np.concatenate(([0], ends)).astype(np.int32),
            ),
            edges=EdgeArrays(
                sample_indices=ends[sampled] - 1,
                sampled_slots=slots[sampled],
                table_at=table_at,
                table_ids=table_ids,
            ),
            entries=entries,
            sampled=sampled,
            output_positions=context_lens[sampled] - self._num_prompt_tokens[slots[sampled]],
            num_blocks=-(-int(context_lens.max()) // BLOCK_SIZE),
            drafts=drafts,
        )

    def _set_new_blocks(self) -> tuple[Ints, npt.NDArray[np.int32]]:
        """Set the new table entries on the host and return them for the device."""
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


def _with_draft_rows(
    slots: Ints, computed: Ints, scheduled: Ints, samples: Bools, num_drafts: Ints
) -> tuple[Ints, Ints, Ints, Bools, Ints]:
    """Return the entries with one row of one token added after them for each draft: (slots,
    computed, scheduled, samples, entries) by row.

    Args:
        scheduled: token counts without the drafts.
    """
    entries = np.repeat(np.arange(len(slots)), 1 + num_drafts)
    firsts = np.cumsum(1 + num_drafts) - 1 - num_drafts
    nth = np.arange(len(entries)) - firsts[entries]
    ends = (computed + scheduled)[entries]
    return (
        slots[entries],
        np.where(nth == 0, computed[entries], ends + nth - 1),
        np.where(nth == 0, scheduled[entries], 1),
        samples[entries],
        entries,
    )


def _draft_rows(plan: StepPlan, entries: Ints) -> DraftRows:
    """Return the relations between the sampled rows.

    Args:
        entries: [num_samples] index of each row's entry.
    """
    firsts = np.searchsorted(entries, entries)
    expected = np.full(len(entries), NO_DRAFT, dtype=np.int64)
    prefixes: dict[int, tuple[int, ...]] = {}
    for index, ids in plan.drafts:
        first = int(np.searchsorted(entries, index))
        expected[first : first + len(ids)] = ids
        prefixes |= {first + count: ids[:count] for count in range(1, len(ids) + 1)}
    return DraftRows(expected, firsts, prefixes)


class DeviceSlots:
    """The slots' state on the device: block tables and newest tokens by slot. The slot after the
    last one is that of padding rows.

    Attributes:
        tables: [2, max_num_seqs + 1, max_blocks] int32: full, sliding.
        newest: [max_num_seqs + 1] int64.
    """

    def __init__(self, slots: SequenceSlots, device: torch.device) -> None:
        self.padding_slot = slots.max_num_seqs
        self._read_slots = select_slots(device).run
        self.tables = torch.full(
            (2, slots.max_num_seqs + 1, slots.max_blocks), NULL_BLOCK, dtype=torch.int32, device=device
        )
        self.newest = torch.zeros(slots.max_num_seqs + 1, dtype=torch.int64, device=device)

    def set_blocks(self, edges: EdgeArrays[Tensor]) -> None:
        """Store new block table entries."""
        if len(edges.table_ids):
            self.tables.view(-1).index_copy_(0, edges.table_at, edges.table_ids)

    def batch(
        self, arrays: ModelArrays[Tensor], sample_indices: Tensor, num_blocks: int, max_query_len: int
    ) -> StepBatch:
        """Return the model's input. Nothing is read back, so a CUDA graph can hold this.

        Args:
            num_blocks: width of the block tables.
            max_query_len: as in StepBatch.
        """
        token_ids, tables = self._read_slots(
            arrays.token_ids, arrays.newest_of, arrays.slots, self.newest, self.tables, num_blocks
        )
        return StepBatch(
            token_ids=token_ids,
            positions=arrays.positions,
            slot_mapping_full=arrays.slot_mapping_full,
            slot_mapping_sliding=arrays.slot_mapping_sliding,
            block_table_full=tables[FULL],
            block_table_sliding=tables[SLIDING],
            context_lens=arrays.context_lens,
            cu_seqlens_q=arrays.cu_seqlens_q,
            sample_indices=sample_indices,
            max_query_len=max_query_len,
        )
