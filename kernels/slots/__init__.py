"""What a step reads of the memory that a device keeps of its sequences, by slot."""

from torch import Tensor

from kernels.backend import checks_indices, runs_triton
from kernels.slots import reference

__all__ = ["read_slots"]


def read_slots(
    token_ids: Tensor, newest_of: Tensor, slots: Tensor, newest: Tensor, tables: Tensor, num_blocks: int
) -> tuple[Tensor, Tensor]:
    """`kernels.slots.reference.read_slots`, which defines it, by the kernel for this device.

    On a GPU, slots are taken as they are (`kernels.backend.checks_indices`).
    """
    if not runs_triton(tables):
        return reference.read_slots(token_ids, newest_of, slots, newest, tables, num_blocks)
    from kernels.slots import read

    reference.check_read_slots(token_ids, newest_of, slots, newest, tables, num_blocks)
    if checks_indices():
        reference.check_slots(newest_of, slots, len(newest))
    return read.read_slots(token_ids, newest_of, slots, newest, tables, num_blocks)
