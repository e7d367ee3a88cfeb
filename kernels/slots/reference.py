"""Reads by slot in torch."""

import torch
from torch import Tensor


def read_slots(
    token_ids: Tensor, newest_of: Tensor, slots: Tensor, newest: Tensor, tables: Tensor, num_blocks: int
) -> tuple[Tensor, Tensor]:
    """Return a step's token ids, of which some are known only to the device, and the block tables
    of its sequences.

    Args:
        token_ids: [T] int64.
        newest_of: [T] int64: slot whose newest token this is; negative if the token is in
            `token_ids`.
        slots: [S] int64.
        newest: [num_slots] int64.
        tables: [groups, num_slots, max_blocks] int32.
        num_blocks: number of entries wanted from the start of each table.
    Returns:
        (token ids [T] int64, tables of these slots [groups, S, num_blocks] int32, contiguous).
    Raises:
        ValueError: names the argument of a wrong shape or dtype.
    """
    check_read_slots(token_ids, newest_of, slots, newest, tables, num_blocks)
    of_slot = newest.index_select(0, newest_of.clamp(min=0))
    return torch.where(newest_of < 0, token_ids, of_slot), tables[:, :, :num_blocks].index_select(1, slots)


def check_read_slots(
    token_ids: Tensor, newest_of: Tensor, slots: Tensor, newest: Tensor, tables: Tensor, num_blocks: int
) -> None:
    """Refuse arguments that `read_slots` cannot take, except slots out of range (`check_slots`).

    Raises:
        ValueError: names the argument.
    """
    vectors = (("token_ids", token_ids), ("newest_of", newest_of), ("slots", slots), ("newest", newest))
    for name, vector in vectors:
        if vector.ndim != 1 or vector.dtype != torch.int64:
            raise ValueError(
                f"{name} must be a vector of int64, got shape {list(vector.shape)} of {vector.dtype}"
            )
    if len(newest_of) != len(token_ids):
        raise ValueError(f"newest_of must be as long as token_ids, {len(token_ids)}, got {len(newest_of)}")
    if tables.ndim != 3 or tables.shape[1] != len(newest) or tables.dtype != torch.int32:
        raise ValueError(
            f"tables must be [groups, {len(newest)}, max_blocks] int32, got shape {list(tables.shape)} of "
            f"{tables.dtype}"
        )
    if not 0 <= num_blocks <= tables.shape[2]:
        raise ValueError(f"num_blocks must be from 0 to the {tables.shape[2]} of tables, got {num_blocks}")


def check_slots(newest_of: Tensor, slots: Tensor, num_slots: int) -> None:
    """Refuse slots that do not exist. Reads the indices back from the device.

    Raises:
        IndexError: names the argument.
    """
    if newest_of.numel() and int(newest_of.max()) >= num_slots:
        raise IndexError(f"newest_of must be below {num_slots}, found {int(newest_of.max())}")
    if slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < num_slots:
        raise IndexError(
            f"slots must be from 0 to {num_slots - 1}, found {int(slots.min())} to {int(slots.max())}"
        )
