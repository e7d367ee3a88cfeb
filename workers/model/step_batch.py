"""StepBatch: the forward context of one step, an argument of every forward; the runner builds it
from a StepPlan and its own state."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All sequences' new tokens of one step, concatenated ("varlen"), on the model's device.

    T tokens of S sequences; sequence `s` owns the rows `cu_seqlens_q[s] : cu_seqlens_q[s + 1]`, and
    its last row is position `context_lens[s] - 1`. The layers of each KV group (`full` and
    `sliding`) share that group's slots and block tables.

    Attributes:
        token_ids: [T] int64.
        positions: [T] int64, position of each token in its sequence.
        slot_mapping_full, slot_mapping_sliding: [T] int64, `block id * block_size + offset` of each
        new token in the group's caches.
        block_table_full, block_table_sliding: [S, max_blocks] int32, indexed by `position //
        block_size`. Entries past the last block are not read; in the sliding table blocks before
        the window may be NULL_BLOCK.
        context_lens: [S] int32, tokens in the cache once this step's are stored (computed +
            scheduled).
        cu_seqlens_q: [S + 1] int32, from 0 to T.
        sample_indices: [num_samples] int64, rows whose logits are needed.
        max_query_len: maximum number of new tokens of a sequence, on the host: 1 if all decode.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping_full: Tensor
    slot_mapping_sliding: Tensor
    block_table_full: Tensor
    block_table_sliding: Tensor
    context_lens: Tensor
    cu_seqlens_q: Tensor
    sample_indices: Tensor
    max_query_len: int
