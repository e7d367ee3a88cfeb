"""Linear layers. On a CPU the result of a row does not depend on the other rows; a GPU uses cuBLAS
or hipBLASLt."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from kernels.backend import has_triton, triton_runs_on
from kernels.cpu import dense
from kernels.cpu import linear as cpu
from kernels.cpu.dense import PackedWeight
from kernels.cpu.native import DATA_TYPES
from kernels.cpu.pointwise import converted
from kernels.implementation import Implementation, cpp_name, why_not_compiled
from kernels.linear import reference

__all__ = ["PackedWeight", "linear", "select"]

MAX_NARROW_TOKENS = 256
"""Maximum number of tokens for the gate's kernel. With more, a tiled matrix product is better for
the gate too, and its launches do not matter."""

_Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def select(
    weight: Tensor | PackedWeight, bias: Tensor | None = None
) -> Implementation[Callable[[Tensor], Tensor]]:
    """Select the implementation for a layer; its `run` takes activations.

    Args:
        weight, bias: as in `linear`.
    """
    if isinstance(weight, PackedWeight):
        layout = f"packed {weight.values.dtype}".replace("torch.", "")
        return Implementation(
            lambda x: dense.linear(x, weight, bias), cpp_name(), _SAME_IN_EVERY_BATCH, layout
        )
    product, name, why = _product(weight)
    if weight.dtype == torch.float32 and triton_runs_on(weight.device):
        product = partial(_narrow_or, product)
    return Implementation(lambda x: product(x, weight, bias), name, why)


_SAME_IN_EVERY_BATCH = "a row's result does not depend on its batch"


def _product(weight: Tensor) -> tuple[_Product, str, str]:
    """Return (run, name, why)."""
    if weight.device.type == "cuda":
        why = "through torch; the gate by Triton" if has_triton() else "through torch"
        return _blas, "hipBLASLt" if torch.version.hip else "cuBLAS", why
    if cpu.can_run(weight):
        return _cpp, cpp_name(), _SAME_IN_EVERY_BATCH
    return _reference, "torch", why_not_compiled(weight.device, weight.dtype)


def _narrow_or(otherwise: _Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the product with the gate's kernel for a few tokens of another dtype, else with
    `otherwise`."""
    if x.dtype == weight.dtype or x.shape[0] > MAX_NARROW_TOKENS:
        return otherwise(x, weight, bias)
    from kernels.linear import narrow

    reference.check_linear(x, weight, bias)
    return narrow.linear(x, weight, bias)


def _blas(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the product in one launch, with the bias in its epilogue. Its order of summation
    depends on the number of rows."""
    reference.check_linear(x, weight, bias)
    return functional.linear(_as(weight.dtype, x), weight, bias)


def _cpp(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    reference.check_linear(x, weight, bias)
    x = converted(x, weight.dtype) if x.dtype in DATA_TYPES else _as(weight.dtype, x)
    return cpu.linear(x, weight, bias)


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    reference.check_linear(x, weight, bias)
    return reference.linear(_as(weight.dtype, x), weight, bias)


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Compute `kernels.linear.reference.linear` with the implementation that `select` returns.

    Args:
        weight: as in the reference, or packed by `kernels.cpu.dense` for bf16 activations on a CPU.
    """
    return select(weight, bias).run(x)
