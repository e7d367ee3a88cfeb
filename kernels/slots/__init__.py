"""Reads of a step from the device's state of its sequences, by slot."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.backend import triton_runs_on
from kernels.implementation import Implementation, triton_name
from kernels.slots import reference

__all__ = ["ReadSlots", "read_slots", "select"]

ReadSlots = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Signature of `kernels.slots.reference.read_slots`."""


def select(device: torch.device) -> Implementation[ReadSlots]:
    """Select the implementation for state on this device."""
    if triton_runs_on(device):
        from kernels.slots import read

        return Implementation(read.read_slots, triton_name(device), "in one launch")
    return Implementation(reference.read_slots, "torch", "a few small copies")


def read_slots(
    token_ids: Tensor, newest_of: Tensor, slots: Tensor, newest: Tensor, tables: Tensor, num_blocks: int
) -> tuple[Tensor, Tensor]:
    """Compute `kernels.slots.reference.read_slots` with the implementation that `select` returns.

    On a GPU, slots are not checked (`kernels.backend.checks_indices`).
    """
    return select(tables.device).run(token_ids, newest_of, slots, newest, tables, num_blocks)
