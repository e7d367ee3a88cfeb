"""Weights that are all zeros: what a conversion leaves that has lost a tensor. A model answers with
them, and what it says is noise."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.errors import CheckpointError
from workers.model.mapped_files import MappedTensors
from workers.model.safetensors_files import StoredTensor

_MAGNITUDES = 0x77
"""Mask of the two e2m1 values in a byte; their signs are left out, since -0 is zero, too."""
_ROWS = 4096
"""Rows of a suspect tensor that are looked at at a time."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a stored tensor that are one matrix, expert or norm."""

    first: int
    last: int
    what: str


class ZeroWeights:
    """Looks at what a rank reads anyway, and only as far as the first row with a value in it. A
    rank's slice may be zeros where the whole is not: then the whole is looked at, so that all ranks
    find the same.

    Args:
        allowed: there may be such weights; nothing is looked at.
    """

    def __init__(self, files: MappedTensors, tensors: Mapping[str, StoredTensor], *, allowed: bool) -> None:
        self._files = files
        self._tensors = tensors
        self._allowed = allowed
        # Those in which no value has been seen, by name and first row. Threads take parts out; none
        # puts one in.
        self._suspects: dict[str, dict[int, _Part]] = {}

    def expect(self, name: str, first: int, last: int, what: str = "") -> None:
        """Values should be in the rows first:last of a tensor; `what` says which part of it that
        is."""
        if not self._allowed:
            self._suspects.setdefault(name, {})[first] = _Part(first, last, what)

    def see(self, name: str, first: int, values: Tensor) -> None:
        """These are, or are a part of, a tensor's rows from `first` on. Any thread."""
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
        """After all has been read.

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
