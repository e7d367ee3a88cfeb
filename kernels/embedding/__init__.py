"""Rows of the embedding, of which a rank may hold a part."""

from torch import Tensor

from kernels.backend import runs_triton
from kernels.embedding import reference

__all__ = ["embed"]


def embed(token_ids: Tensor, weight: Tensor, first_id: int = 0) -> Tensor:
    """`kernels.embedding.reference.embed`, which defines it, by the kernel for this device."""
    if not runs_triton(weight):
        return reference.embed(token_ids, weight, first_id)
    from kernels.embedding import lookup

    reference.check_embed(token_ids, weight, first_id)
    return lookup.embed(token_ids, weight, first_id)
