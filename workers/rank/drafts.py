"""Drafts of a step: guesses of the next tokens. Each is computed as a row of its own after the
newest token, and a token is sampled after it as after any other. A draft is right if it equals the
token sampled before it. The output is the same as without drafts, for greedy and random sampling,
since a draw depends on seed and position alone."""

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
        expected: [num_samples] int64: the draft that the next row computes; NO_DRAFT in the last
            row of an entry.
        firsts: [num_samples] int64: index of the first sampled row of the same entry.
        prefixes: by row, the drafts before it; rows without any are absent.
    """

    expected: Ints
    firsts: Ints
    prefixes: dict[int, tuple[int, ...]]


def kept_rows(token_ids: list[int], drafts: DraftRows) -> tuple[list[bool], tuple[int, ...]]:
    """Return whether each row's token belongs to its sequence, and the number of tokens of each
    entry: its right drafts and the token after them."""
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
    """Return the slot to which each row's token is written as the newest one: the row's own slot
    for the last row that `kept_rows` keeps of an entry, `padding_slot` for all others. The result
    stays on the device.

    Args:
        token_ids, expected, firsts, slots: [num_samples] int64, of the sampled rows.
    """
    misses = (token_ids != expected).to(torch.int64)
    misses_before = misses.cumsum(0) - misses
    # The first wrong draft ends what is kept. The last row of an entry expects nothing, so it
    # counts as wrong.
    is_last = (misses == 1) & (misses_before == misses_before.index_select(0, firsts))
    return torch.where(is_last, slots, padding_slot)
