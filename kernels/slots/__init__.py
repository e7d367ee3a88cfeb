"""Reads of a step from the device's state of its sequences, by slot."""

from torch import Tensor

from kernels.backend import checks_indices, runs_triton
from kernels.slots import reference

__all__ = ["read_slots"]


def read_slots(
    token_ids: Tensor, newest_of: Tensor, slots: Tensor, newest: Tensor, tables: Tensor, num_blocks: int
) -> tuple[Tensor, Tensor]:
    """Compute `kernels.slots.reference.read_slots` with the kernel for this device.

    On a GPU, slots are not checked (`kernels.backend.checks_indices`).
    """
    if not runs_triton(tables):
        return reference.read_slots(token_ids, newest_of, slots, newest, tables, num_blocks)
    from kernels.slots import read

    reference.check_read_slots(token_ids, newest_of, slots, newest, tables, num_blocks)
    if checks_indices():
        reference.check_slots(newest_of, slots, len(newest))
    return read.read_slots(token_ids, newest_of, slots, newest, tables, num_blocks)
