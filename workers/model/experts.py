"""The MoE layer: gate, top-k, and the experts of this rank. Every rank sees every token, computes
what its own experts add, and the caller adds the ranks up. Attention data-parallelism with the
experts spread over all ranks, where tokens travel to their experts, would live here.
"""

from dataclasses import dataclass

from torch import Tensor

from kernels.moe import gated_experts, gated_experts_add_rms_norm
from kernels.mxfp4 import PackedMXFP4
from workers.model.linear import Linear


@dataclass(frozen=True, slots=True)
class Experts:
    """Top-k of all experts with a clamped SwiGLU; E of them, or slices of these, are on this rank.

    Attributes:
        gate: fp32 whatever the model's dtype: in bf16 the logits of the last chosen and the first
            rejected expert often round to a tie, and which expert wins would then depend on the
            batch.
        gate_up: [E, 2 * intermediate, hidden], rows interleaved: even = gate, odd = up.
            `intermediate` is this rank's, padded with zeros.
        gate_up_bias: [E, 2 * intermediate].
        down: [E, hidden, intermediate].
        down_bias: [E, hidden]; zeros where another rank of the group adds it.
        first_expert: global id of the first of this rank's experts.
        mxfp8_activations: round what MXFP4 experts multiply to MXFP8
            (`kernels.moe.reference.round_to_mxfp8`).
    """

    gate: Linear
    gate_up: PackedMXFP4 | Tensor
    gate_up_bias: Tensor
    down: PackedMXFP4 | Tensor
    down_bias: Tensor
    first_expert: int
    num_experts_per_token: int
    swiglu_limit: float
    swiglu_alpha: float
    mxfp8_activations: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] → [T, hidden], the weighted sum of each token's experts on this rank."""
        return gated_experts(
            x,
            self.gate(x),
            self.num_experts_per_token,
            self.gate_up,
            self.gate_up_bias,
            self.down,
            self.down_bias,
            swiglu_limit=self.swiglu_limit,
            swiglu_alpha=self.swiglu_alpha,
            first_expert=self.first_expert,
            mxfp8_activations=self.mxfp8_activations,
        )

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`kernels.pointwise.add_rms_norm` of a residual stream and what these experts make of x,
        for a rank alone: no other's part is to be added before."""
        return gated_experts_add_rms_norm(
            residual,
            norm_weight,
            eps,
            x,
            self.gate(x),
            self.num_experts_per_token,
            self.gate_up,
            self.gate_up_bias,
            self.down,
            self.down_bias,
            swiglu_limit=self.swiglu_limit,
            swiglu_alpha=self.swiglu_alpha,
            first_expert=self.first_expert,
            mxfp8_activations=self.mxfp8_activations,
        )
