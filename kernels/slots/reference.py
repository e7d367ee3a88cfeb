"""Reads by slot in torch."""

import torch
from torch import Tensor


def read_slots(
    token_ids: Tensor, slots: Tensor, newest: Tensor, tables: Tensor, num_blocks: int
) -> tuple[Tensor, Tensor]:
    """Tokens that only the device knows, and the block tables of a step's sequences.

    Args:
        token_ids: [T] int64; -1 - slot stands for the newest token of that slot.
        slots: [S] int64.
        newest: [num_slots] int64.
        tables: [groups, num_slots, max_blocks] int32.
        num_blocks: entries of each table that are wanted, its first.
    Returns:
        (token ids [T] int64, tables of these slots [groups, S, num_blocks] int32, contiguous).
    Raises:
        ValueError: names the argument of a wrong shape or dtype.
    """
    check_read_slots(token_ids, slots, newest, tables, num_blocks)
    of_slot = newest.index_select(0, (-1 - token_ids).clamp_(min=0))
    return torch.where(token_ids < 0, of_slot, token_ids), tables[:, :, :num_blocks].index_select(1, slots)


def check_read_slots(
    token_ids: Tensor, slots: Tensor, newest: Tensor, tables: Tensor, num_blocks: int
) -> None:
    """Refuse what `read_slots` cannot read, but for slots out of range (`check_slots`).

    Raises:
        ValueError: names the argument.
    """
    for name, vector in (("token_ids", token_ids), ("slots", slots), ("newest", newest)):
        if vector.ndim != 1 or vector.dtype != torch.int64:
            raise ValueError(
                f"{name} must be a vector of int64, got shape {list(vector.shape)} of {vector.dtype}"
            )
    if tables.ndim != 3 or tables.shape[1] != len(newest) or tables.dtype != torch.int32:
        raise ValueError(
            f"tables must be [groups, {len(newest)}, max_blocks] int32, got shape {list(tables.shape)} of "
            f"{tables.dtype}"
        )
    if not 0 <= num_blocks <= tables.shape[2]:
        raise ValueError(f"num_blocks must be from 0 to the {tables.shape[2]} of tables, got {num_blocks}")


def check_slots(token_ids: Tensor, slots: Tensor, num_slots: int) -> None:
    """Refuse slots that are none; reads them back.

    Raises:
        IndexError: names the argument.
    """
    if token_ids.numel() and int(token_ids.min()) < -num_slots:
        raise IndexError(
            f"token_ids must be tokens or -1 - slot with {num_slots} slots, found {int(token_ids.min())}"
        )
    if slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < num_slots:
        raise IndexError(
            f"slots must be from 0 to {num_slots - 1}, found {int(slots.min())} to {int(slots.max())}"
        )
