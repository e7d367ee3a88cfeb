"""Linear layer in torch, as independent of the batch it runs in as a BLAS allows.

A BLAS uses another summation order for matrices of a few rows (matrix-vector kernels, remainder
tiles), so the product of the same row and weight differs in the last bits between a batch of 1 and
a batch of 100. With at least `MIN_ROWS` rows and sums of a few hundred products the result of a row
was found independent of the number of rows and of its position among them (MKL 2024.2 and oneDNN
3.12 under torch 2.13, outputs of at least two columns); with sums of thousands it is not, so the
CPU's own kernel is used wherever it was built.
"""

import torch
from torch import Tensor
from torch.nn import functional

MIN_ROWS = 16
"""Minimum number of rows; smaller inputs are padded with zero rows."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`. A row's result is the same, bit for bit, whatever the other
    rows are, as far as the BLAS allows (see the module).

    Args:
        x: [T, K] float.
        weight: [N, K], dtype of x, or fp32, to which x is widened then.
        bias: [N], dtype of weight.
    Returns:
        [T, N], dtype of weight.
    Raises:
        ValueError: names the argument of a wrong shape or dtype.
    """
    check_linear(x, weight, bias)
    x = x.to(weight.dtype)
    num_rows = x.shape[0]
    if not 0 < num_rows < MIN_ROWS:
        return functional.linear(x, weight, bias)
    padded = torch.zeros(MIN_ROWS, x.shape[1], dtype=x.dtype, device=x.device)
    padded[:num_rows] = x
    return functional.linear(padded, weight, bias)[:num_rows]


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse arguments that `linear` cannot take.

    Raises:
        ValueError: names the argument.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be [T, K], got shape {list(x.shape)}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must be [N, {x.shape[1]}], got shape {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got shape {list(bias.shape)}")
    if not x.dtype.is_floating_point or weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"weight must be {x.dtype} as x is, or torch.float32, got {weight.dtype}")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"bias must be {weight.dtype} as weight is, got {bias.dtype}")
