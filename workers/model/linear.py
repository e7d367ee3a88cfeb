"""Dense projections. A rank's shard of one is the same class with fewer rows (heads) or columns, so
sharding stays in the loader."""

from dataclasses import dataclass

from torch import Tensor

from kernels.linear import PackedWeight, linear


@dataclass(frozen=True, slots=True)
class Linear:
    """`x @ weight.T + bias`, the same for a row whatever else is in the batch.

    Attributes:
        weight: [out_features, in_features]; packed where the kernels of this device and dtype want
            it so.
        bias: [out_features], or None.
    """

    weight: Tensor | PackedWeight
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in_features] → [T, out_features], in the dtype of x."""
        return linear(x, self.weight, self.bias)
