# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""A step's token ids and block tables by slot in Triton, in one launch: a program takes BLOCK
tokens, or BLOCK entries of one table."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import checks_indices
from kernels.slots.reference import check_read_slots, check_slots

BLOCK = 1024


@triton.jit(
    do_not_specialize=["num_tokens", "num_seqs", "num_blocks"],
    do_not_specialize_on_alignment=["token_ids_ptr", "newest_of_ptr", "slots_ptr"],
)
def read_slots_kernel(
    token_ids_ptr, newest_of_ptr, slots_ptr, newest_ptr, tables_ptr, ids_out_ptr, tables_out_ptr,
    num_tokens, num_seqs, num_blocks, slot_stride, group_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    token_programs = tl.cdiv(num_tokens, BLOCK)
    if tl.program_id(0) < token_programs:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        token = tl.load(token_ids_ptr + at, mask=at < num_tokens, other=0)
        slot = tl.load(newest_of_ptr + at, mask=at < num_tokens, other=-1)
        newest = tl.load(newest_ptr + slot, mask=slot >= 0, other=0)
        tl.store(ids_out_ptr + at, tl.where(slot >= 0, newest, token), mask=at < num_tokens)
    else:
        pieces = tl.cdiv(num_blocks, BLOCK)
        # row of the output tables
        row = ((tl.program_id(0) - token_programs) // pieces).to(tl.int64)
        at = (tl.program_id(0) - token_programs) % pieces * BLOCK + tl.arange(0, BLOCK)
        table = (
            tables_ptr + row // num_seqs * group_stride + tl.load(slots_ptr + row % num_seqs) * slot_stride
        )
        tl.store(
            tables_out_ptr + row * num_blocks + at,
            tl.load(table + at, mask=at < num_blocks),
            mask=at < num_blocks,
        )


def read_slots(
    token_ids: Tensor, newest_of: Tensor, slots: Tensor, newest: Tensor, tables: Tensor, num_blocks: int
) -> tuple[Tensor, Tensor]:
    """Compute `kernels.slots.reference.read_slots`; slots are checked only if `checks_indices`.

    Raises:
        ValueError: as there; or names the argument that is not contiguous (tables: in its last
            axis) or on another device than tables.
        IndexError: names the argument with a slot that does not exist.
    """
    check_read_slots(token_ids, newest_of, slots, newest, tables, num_blocks)
    if checks_indices():
        check_slots(newest_of, slots, len(newest))
    vectors = (("token_ids", token_ids), ("newest_of", newest_of), ("slots", slots), ("newest", newest))
    for name, vector in vectors:
        if not vector.is_contiguous() or vector.device != tables.device:
            raise ValueError(
                f"{name} must be contiguous and on {tables.device} as tables is, got {vector.stride()} on "
                f"{vector.device}"
            )
    if tables.stride(2) != 1:
        raise ValueError(f"tables must be contiguous in its last axis, got strides {tables.stride()}")
    num_groups, num_tokens, num_seqs = tables.shape[0], len(token_ids), len(slots)
    ids = torch.empty(num_tokens, dtype=torch.int64, device=tables.device)
    wanted = torch.empty(num_groups, num_seqs, num_blocks, dtype=torch.int32, device=tables.device)
    num_programs = triton.cdiv(num_tokens, BLOCK) + num_groups * num_seqs * triton.cdiv(num_blocks, BLOCK)
    if num_programs:
        read_slots_kernel[(num_programs,)](
            token_ids,
            newest_of,
            slots,
            newest,
            tables,
            ids,
            wanted,
            num_tokens,
            num_seqs,
            num_blocks,
            tables.stride(1),
            tables.stride(0),
            BLOCK=BLOCK,
            num_warps=4,
        )
    return ids, wanted
