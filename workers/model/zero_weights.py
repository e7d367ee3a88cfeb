"""Detection of weights that are all zeros, which a conversion leaves when it loses a tensor. The
model still answers, but with noise."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.errors import CheckpointError
from workers.model.mapped_files import MappedTensors
from workers.model.safetensors_files import StoredTensor

_MAGNITUDES = 0x77
"""Mask of the two e2m1 values in a byte without their signs, since -0 is zero too."""
_ROWS = 4096
"""Rows of a suspect tensor checked at a time."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a stored tensor that are one matrix, expert or norm."""

    first: int
    last: int
    what: str


class ZeroWeights:
    """Checks values as a rank reads them, each part only up to the first row with a nonzero value.
    If a rank's slice is all zeros, the whole tensor is checked, so that all ranks reach the same
    result.

    Args:
        allowed: whether weights of zeros are accepted; nothing is then checked.
    """

    def __init__(self, files: MappedTensors, tensors: Mapping[str, StoredTensor], *, allowed: bool) -> None:
        self._files = files
        self._tensors = tensors
        self._allowed = allowed
        # Parts without a nonzero value so far, by name and first row. Threads remove parts; none
        # adds one.
        self._suspects: dict[str, dict[int, _Part]] = {}

    def expect(self, name: str, first: int, last: int, what: str = "") -> None:
        """Expect nonzero values in the rows first:last of a tensor; `what` names that part of
        it."""
        if not self._allowed:
            self._suspects.setdefault(name, {})[first] = _Part(first, last, what)

    def see(self, name: str, first: int, values: Tensor) -> None:
        """Check values from a tensor's rows from `first` on. Any thread may call this."""
        suspects = self._suspects.get(name)
        if not suspects:
            return
        exact = suspects.get(first)
        for part in [exact] if exact is not None else list(suspects.values()):
            if part.first < first + len(values) and first < part.last:
                rows = values[max(part.first - first, 0) : part.last - first]
                if self._has_value(name, rows[:1]) or self._has_value(name, rows):
                    suspects.pop(part.first, None)

    def check(self) -> None:
        """Check for remaining suspects after everything has been read.

        Raises:
            CheckpointError: names the first tensor, and the expert.
        """
        for name, suspects in self._suspects.items():
            for part in suspects.values():
                starts = range(part.first, part.last, _ROWS)
                if not any(
                    self._has_value(name, self._files.view(name, start, min(start + _ROWS, part.last)))
                    for start in starts
                ):
                    raise CheckpointError(
                        f"{self._tensors[name].file}: tensor {name} is all zeros{part.what}; if the model "
                        f"was pruned this way, set --allow-zero-weights "
                        "(engine.allow_zero_weights)"
                    )

    def _has_value(self, name: str, values: Tensor) -> bool:
        if name.endswith("blocks"):
            values = values & _MAGNITUDES
        return bool(torch.count_nonzero(values))
