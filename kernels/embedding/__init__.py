"""Rows of the embedding, of which a rank may hold a part."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.cpu import pointwise as cpu
from kernels.embedding import reference
from kernels.implementation import Implementation, by_device

__all__ = ["Embed", "embed", "select"]

Embed = Callable[[Tensor, Tensor, int], Tensor]
"""Signature of `kernels.embedding.reference.embed`."""


def select(dtype: torch.dtype, device: torch.device) -> Implementation[Embed]:
    """Select the implementation for an embedding of this dtype."""
    return by_device(device, dtype, triton=_on_triton, cpp=cpu.embed, reference=reference.embed)


def _on_triton() -> Embed:
    from kernels.embedding import lookup

    return lookup.embed


def embed(token_ids: Tensor, weight: Tensor, first_id: int = 0) -> Tensor:
    """Compute `kernels.embedding.reference.embed` with the kernel for this device."""
    reference.check_embed(token_ids, weight, first_id)
    return select(weight.dtype, weight.device).run(token_ids, weight, first_id)
