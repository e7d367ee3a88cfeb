"""The MoE layer: gate, top-k, and the experts of this rank. Every rank sees every token and
computes the part of its own experts; the caller sums the parts. Attention data-parallelism with the
experts spread over all ranks, where tokens travel to their experts, would belong here."""

from dataclasses import dataclass

from torch import Tensor

from kernels.implementation import Implementation
from kernels.moe import ExpertOperations, ExpertWeights
from workers.model.linear import Linear


@dataclass(frozen=True, slots=True)
class Experts:
    """The MoE layer on one rank: top-k over all experts with a clamped SwiGLU, computed for the
    experts, or slices of experts, on this rank.

    Attributes:
        gate: fp32 for every dtype of the model: in bf16 the logits of the last chosen and the first
            rejected expert often round to a tie, which would be decided by the batch.
        weights: the experts of this rank; `intermediate` is padded with zeros, and down_bias is
            zeros if another rank of the group adds it.
        kernels: implementation, selected when the layer was loaded.
    """

    gate: Linear
    weights: ExpertWeights
    num_experts_per_token: int
    kernels: Implementation[ExpertOperations]

    def __call__(self, x: Tensor) -> Tensor:
        """Compute [T, hidden] → [T, hidden], the weighted sum of each token's experts on this
        rank."""
        return self.kernels.run.gated_experts(x, self.gate(x), self.num_experts_per_token)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Compute `kernels.pointwise.add_rms_norm` of a residual stream and the output of these
        experts for x. Only for a single rank, where no other rank's part has to be added before."""
        return self.kernels.run.gated_experts_add_rms_norm(
            x, self.gate(x), self.num_experts_per_token, residual, norm_weight, eps
        )
