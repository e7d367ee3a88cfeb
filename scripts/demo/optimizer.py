"""Muon for the matrices inside the model, AdamW for the rest.

Follows: Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), with its scaling to
the RMS of AdamW's updates from Moonlight (arXiv 2502.16982, section 2.2).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_MOMENTUM = 0.95
_BETAS = (0.9, 0.97)
_EPS = 1e-10


@dataclass(slots=True)
class Optimizer:
    """The moments of all parameters.

    Attributes:
        matrices: [N, K] or [E, N, K], by name: Muon.
        others: embeddings, head, norms, biases, sinks and gates: AdamW without decay.
        step: number of updates so far.
    """

    matrices: Mapping[str, Tensor]
    others: Mapping[str, Tensor]
    step: int = 0
    moments: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in self.matrices.items():
            self.moments[name] = [torch.zeros_like(tensor)]
        for name, tensor in self.others.items():
            self.moments[name] = [torch.zeros_like(tensor), torch.zeros_like(tensor)]

    @torch.no_grad()
    def update(self, matrix_rate: float, other_rate: float, decay: float) -> None:
        """Apply the gradients and clear them.

        Args:
            matrix_rate, other_rate: learning rates.
            decay: weight decay of the matrices, times the learning rate.
        """
        self.step += 1
        for name, tensor in self.matrices.items():
            gradient, (momentum,) = _take_gradient(tensor), self.moments[name]
            momentum.lerp_(gradient, 1 - _MOMENTUM)
            direction = orthogonalized(gradient.lerp(momentum, _MOMENTUM))
            tensor.mul_(1 - matrix_rate * decay)
            tensor.add_(direction, alpha=-matrix_rate * 0.2 * max(tensor.shape[-2:]) ** 0.5)
        corrections = [1 - beta**self.step for beta in _BETAS]
        for name, tensor in self.others.items():
            gradient, (first, second) = _take_gradient(tensor), self.moments[name]
            first.lerp_(gradient, 1 - _BETAS[0])
            second.lerp_(gradient.square(), 1 - _BETAS[1])
            scale = (second / corrections[1]).sqrt_().add_(_EPS)
            tensor.addcdiv_(first, scale, value=-other_rate / corrections[0])


def clip(tensors: Iterable[Tensor], limit: float) -> float:
    """Scale all gradients down so that their norm is at most `limit`; return the norm before."""
    return float(torch.nn.utils.clip_grad_norm_(tensors, limit))


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return the nearest matrices with singular values of about 1, for [..., N, K]."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    orthogonal: Tensor = x.mT if tall else x
    return orthogonal


def _take_gradient(tensor: Tensor) -> Tensor:
    gradient = tensor.grad
    assert gradient is not None
    tensor.grad = None
    return gradient
