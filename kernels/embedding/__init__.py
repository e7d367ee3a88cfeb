"""Rows of the embedding, of which a rank may hold a part."""

from torch import Tensor

from kernels.backend import runs_triton
from kernels.cpu import pointwise as cpu
from kernels.embedding import reference

__all__ = ["embed"]


def embed(token_ids: Tensor, weight: Tensor, first_id: int = 0) -> Tensor:
    """`kernels.embedding.reference.embed`, which defines it, by the kernel for this device."""
    reference.check_embed(token_ids, weight, first_id)
    if not runs_triton(weight):
        run = cpu.embed if cpu.can_run(weight, weight) else reference.embed
        return run(token_ids, weight, first_id)
    from kernels.embedding import lookup

    return lookup.embed(token_ids, weight, first_id)
