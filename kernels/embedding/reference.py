"""Embedding lookup in torch."""

import torch
from torch import Tensor
from torch.nn import functional


def embed(token_ids: Tensor, weight: Tensor, first_id: int = 0) -> Tensor:
    """Return the row of each token; zeros for tokens whose row is on another rank.

    Args:
        token_ids: [T] int64.
        weight: [V, H], the rows of tokens first_id to first_id + V - 1.
    Returns:
        [T, H], dtype of weight.
    Raises:
        ValueError: names the argument of a wrong shape, dtype or value.
    """
    check_embed(token_ids, weight, first_id)
    num_rows, width = weight.shape
    if num_rows == 0:
        return torch.zeros(len(token_ids), width, dtype=weight.dtype, device=weight.device)
    local = token_ids - first_id
    rows = functional.embedding(local.clamp(0, num_rows - 1), weight)
    return rows.masked_fill_(((local < 0) | (local >= num_rows))[:, None], 0)


def check_embed(token_ids: Tensor, weight: Tensor, first_id: int) -> None:
    """Refuse arguments that `embed` cannot take.

    Raises:
        ValueError: names the argument.
    """
    if token_ids.ndim != 1 or token_ids.dtype != torch.int64:
        raise ValueError(
            f"token_ids must be [T] int64, got shape {list(token_ids.shape)} of {token_ids.dtype}"
        )
    if weight.ndim != 2 or not weight.dtype.is_floating_point:
        raise ValueError(f"weight must be [V, H] float, got shape {list(weight.shape)} of {weight.dtype}")
    if first_id < 0:
        raise ValueError(f"first_id must be 0 or more, got {first_id}")
