"""The mixture of experts by Triton kernels: top-k and routing share one launch, and so do the sum
over a token's experts and the norm after it."""

import torch
from torch import Tensor

from kernels.backend import checks_indices
from kernels.moe import combine, grouped, reference
from kernels.moe.operations import check_residual
from kernels.moe.routing import Routing
from kernels.moe.weights import ExpertWeights


class OnTriton:
    """Triton's implementation of `kernels.moe.operations.ExpertOperations`.

    Args:
        kind: `grouped.kind_of` for the weights.
    Raises:
        ValueError: names a part of the weights that is not contiguous or not on the device.
    """

    def __init__(self, weights: ExpertWeights, kind: str, device: torch.device) -> None:
        grouped.check_memory(weights, device)
        self._weights = weights
        self._kind = kind

    def fused_experts(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Compute as the protocol defines; expert ids are not checked
        (`kernels.backend.checks_indices`)."""
        reference.check_experts(x, topk_ids, topk_weights, self._weights)
        if checks_indices():
            reference.check_ids(topk_ids, self._weights.num_experts)
        return combine.combine(*grouped.fused_experts(x, topk_ids, topk_weights, self._weights, self._kind))

    def gated_experts(self, x: Tensor, gate_logits: Tensor, k: int) -> Tensor:
        """Compute as the protocol defines."""
        return combine.combine(*self._summands(x, gate_logits, k))

    def gated_experts_add_rms_norm(
        self, x: Tensor, gate_logits: Tensor, k: int, residual: Tensor, norm_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Compute as the protocol defines."""
        check_residual(x, residual, norm_weight)
        summands = self._summands(x, gate_logits, k)
        return combine.combine_add_rms_norm(*summands, residual, norm_weight, eps)

    def _summands(self, x: Tensor, gate_logits: Tensor, k: int) -> tuple[Tensor, Routing]:
        reference.check_choice(x, gate_logits, k, self._weights)
        return grouped.gated_experts(x, gate_logits.contiguous(), k, self._weights, self._kind)
