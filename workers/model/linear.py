"""Dense projections. A rank's shard of a projection is the same class with fewer rows (heads) or
columns, so only the loader knows about sharding."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from kernels.implementation import Implementation
from kernels.linear import PackedWeight, select


@dataclass(frozen=True, slots=True)
class Linear:
    """A projection `x @ weight.T + bias`. A row's result is the same whatever else is in the batch.

    Attributes:
        weight: [out_features, in_features]; packed if the kernels of this device and dtype require
            it.
        bias: [out_features], or None.
        kernel: implementation, selected when the layer is built.
    """

    weight: Tensor | PackedWeight
    bias: Tensor | None = None
    kernel: Implementation[Callable[[Tensor], Tensor]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", select(self.weight, self.bias))

    def __call__(self, x: Tensor) -> Tensor:
        """Compute [T, in_features] → [T, out_features], in the dtype of the weight."""
        return self.kernel.run(x)
