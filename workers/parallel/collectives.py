"""What ranks say to each other while they compute. The model sees only this interface, so the same code runs alone, over
torch.distributed, and over threads in tests."""

from typing import Protocol

from torch import Tensor


class Collectives(Protocol):
    """The ranks of one replica. Every rank makes the same calls in the same order, with tensors of equal shape and dtype."""

    @property
    def rank(self) -> int:
        """This rank's number, from 0."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place where that is possible; returns the sum."""

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Every rank's tensor, by rank, on rank 0; None on the others."""

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's values, written into every rank's `tensor`; returns it."""


class Alone:
    """One rank: nothing to exchange."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See Collectives."""
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """See Collectives."""
        return [tensor]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """See Collectives."""
        return tensor
