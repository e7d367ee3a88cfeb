"""Linear layers whose result for a row does not depend on the other rows, on a CPU; on a GPU,
cuBLAS or hipBLASLt."""

import torch
from torch import Tensor
from torch.nn import functional

from kernels.backend import runs_triton
from kernels.cpu import dense
from kernels.cpu import linear as cpu
from kernels.cpu.dense import PackedWeight
from kernels.cpu.pointwise import converted
from kernels.linear import reference

__all__ = ["PackedWeight", "linear"]

MAX_NARROW_TOKENS = 256
"""Beyond it a matrix product by tiles is better for the gate, too, and its launches do not
matter."""


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`kernels.linear.reference.linear`, which defines it, by the faster kernel for these tensors
    and this device.

    Args:
        weight: as there, or packed by `kernels.cpu.dense` for bf16 activations on a CPU.
    """
    if isinstance(weight, PackedWeight):
        return dense.linear(x, weight, bias)
    reference.check_linear(x, weight, bias)
    if x.dtype != weight.dtype:
        if runs_triton(x) and weight.dtype == torch.float32 and x.shape[0] <= MAX_NARROW_TOKENS:
            from kernels.linear import narrow

            return narrow.linear(x, weight, bias)
        x = converted(x, weight.dtype) if cpu.can_run(x) and cpu.can_run(weight) else x.to(weight.dtype)
    if x.is_cuda:
        # One launch, the bias in its epilogue. Its order of summation depends on the number of
        # rows.
        return functional.linear(x, weight, bias)
    if not cpu.can_run(x):
        return reference.linear(x, weight, bias)
    return cpu.linear(x, weight, bias)
