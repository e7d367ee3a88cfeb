"""Drafts of a step: guesses of what follows, each computed as a row of its own behind the newest
token, and sampled after like any other. A draft was right if the token sampled before it is the
same: the tokens are those that would have come one by one, greedy or drawn, since a draw depends on
seed and position alone."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
NO_DRAFT = -1


@dataclass(frozen=True, slots=True)
class DraftRows:
    """The relations between the sampled rows of a step.

    Attributes:
        expected: [num_samples] int64: the draft that the next row computes; NO_DRAFT at the last
            row of an entry.
        firsts: [num_samples] int64: index of the first sampled row of the same entry.
        prefixes: by row, the drafts that precede it, if any.
    """

    expected: Ints
    firsts: Ints
    prefixes: dict[int, tuple[int, ...]]


def kept_rows(token_ids: list[int], drafts: DraftRows) -> tuple[list[bool], tuple[int, ...]]:
    """Return whether each row's token is one of its sequence, and how many each entry has: the
    drafts that were right, and the token after them."""
    kept: list[bool] = []
    counts: list[int] = []
    goes_on = False
    for row, (token_id, expected, first) in enumerate(
        zip(token_ids, drafts.expected.tolist(), drafts.firsts.tolist(), strict=True)
    ):
        if row == first:
            goes_on = True
            counts.append(0)
        kept.append(goes_on)
        counts[-1] += goes_on
        goes_on = goes_on and token_id == expected
    return kept, tuple(counts)


def newest_slots(
    token_ids: Tensor, expected: Tensor, firsts: Tensor, slots: Tensor, padding_slot: int
) -> Tensor:
    """Return where each row's token is to be written as its slot's newest one: that of the last row
    that `kept_rows` keeps to its slot, all others to `padding_slot`. Stays on the device.

    Args:
        token_ids, expected, firsts, slots: [num_samples] int64, of the sampled rows.
    """
    misses = (token_ids != expected).to(torch.int64)
    misses_before = misses.cumsum(0) - misses
    # An entry's first miss ends what is kept, and its last row, which expects nothing, is one.
    is_last = (misses == 1) & (misses_before == misses_before.index_select(0, firsts))
    return torch.where(is_last, slots, padding_slot)
