"""The interface of implementations of the mixture of experts, and the implementation that calls its
operations one by one, for the C++ kernels and the reference. `on_triton.py` has the other
implementation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.moe import reference
from kernels.moe.weights import ExpertWeights


class ExpertOperations(Protocol):
    """Operations of the experts of one layer on this rank, bound to their weights."""

    def fused_experts(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Compute `kernels.moe.reference.fused_experts`."""

    def gated_experts(self, x: Tensor, gate_logits: Tensor, k: int) -> Tensor:
        """Compute `fused_experts` for the experts that `gate_topk` selects.

        Args:
            gate_logits: [T, num_experts] float.
        """

    def gated_experts_add_rms_norm(
        self, x: Tensor, gate_logits: Tensor, k: int, residual: Tensor, norm_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Compute `kernels.pointwise.add_rms_norm` of a residual stream and `gated_experts`, with
        the same bits as the two separately.

        Args:
            residual: [T, H], dtype of x; may be overwritten.
            norm_weight: [H] float.
        Returns:
            (the sum, its RMSNorm), both with shape and dtype of residual.
        """


@dataclass(frozen=True, slots=True)
class InSteps:
    """An implementation in separate steps: top-k, experts, and the norm after them.

    Attributes:
        gate_topk, experts, add_rms_norm: the implementations of the steps.
    """

    weights: ExpertWeights
    gate_topk: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    experts: Callable[[Tensor, Tensor, Tensor, ExpertWeights], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]

    def fused_experts(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Compute as the protocol defines, after a check of the ids."""
        reference.check_experts(x, topk_ids, topk_weights, self.weights)
        reference.check_ids(topk_ids, self.weights.num_experts)
        return self.experts(x, topk_ids, topk_weights, self.weights)

    def gated_experts(self, x: Tensor, gate_logits: Tensor, k: int) -> Tensor:
        """Compute as the protocol defines."""
        reference.check_choice(x, gate_logits, k, self.weights)
        return self.experts(x, *self.gate_topk(gate_logits, k), self.weights)

    def gated_experts_add_rms_norm(
        self, x: Tensor, gate_logits: Tensor, k: int, residual: Tensor, norm_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Compute as the protocol defines."""
        check_residual(x, residual, norm_weight)
        return self.add_rms_norm(residual, self.gated_experts(x, gate_logits, k), norm_weight, eps)


def check_residual(x: Tensor, residual: Tensor, norm_weight: Tensor) -> None:
    """Refuse a residual stream to which the experts' result cannot be added, or a norm of another
    width.

    Raises:
        ValueError: names the argument.
    """
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual must be {list(x.shape)} {x.dtype} as x is, got {list(residual.shape)} {residual.dtype}"
        )
    if norm_weight.shape != x.shape[-1:]:
        raise ValueError(f"norm_weight must be {list(x.shape[-1:])}, got shape {list(norm_weight.shape)}")
