"""The MoE layer: gate, top-k, and the experts of this rank. Every rank sees every token and
computes its own experts' part; the caller adds the parts up. Attention data-parallelism with the
experts spread over all ranks, where tokens travel to their experts, would live here."""

from dataclasses import dataclass

from torch import Tensor

from kernels.implementation import Implementation
from kernels.moe import ExpertOperations, ExpertWeights
from workers.model.linear import Linear


@dataclass(frozen=True, slots=True)
class Experts:
    """Top-k of all experts with a clamped SwiGLU; some of them, or slices of these, are on this
    rank.

    Attributes:
        gate: fp32 whatever the model's dtype: in bf16 the logits of the last chosen and the first
            rejected expert often round to a tie, and which expert wins would then depend on the
            batch.
        weights: this rank's; `intermediate` is padded with zeros, and down_bias is zeros where
            another rank of the group adds it.
        kernels: what computes them, chosen when the layer was loaded.
    """

    gate: Linear
    weights: ExpertWeights
    num_experts_per_token: int
    kernels: Implementation[ExpertOperations]

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] → [T, hidden], the weighted sum of each token's experts on this rank."""
        return self.kernels.run.gated_experts(x, self.gate(x), self.num_experts_per_token)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`kernels.pointwise.add_rms_norm` of a residual stream and what these experts make of x,
        for a rank alone: no other's part is to be added before."""
        return self.kernels.run.gated_experts_add_rms_norm(
            x, self.gate(x), self.num_experts_per_token, residual, norm_weight, eps
        )
