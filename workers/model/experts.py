"""The MoE layer: gate, top-k, experts. What a later expert-parallel version splits is `gate_up` and `down` along their first dimension."""

from dataclasses import dataclass

from torch import Tensor

from kernels.moe import fused_experts, gate_topk
from kernels.mxfp4 import PackedMXFP4
from workers.model.linear import Linear


@dataclass(frozen=True, slots=True)
class Experts:
    """Top-k of E experts with a clamped SwiGLU.

    Attributes:
        gate: fp32 whatever the model's dtype: in bf16 the logits of the last chosen and the first rejected expert often round to a
            tie, and which expert wins would then depend on the batch.
        gate_up: [E, 2 * intermediate, hidden], rows interleaved: even = gate, odd = up.
        gate_up_bias: [E, 2 * intermediate].
        down: [E, hidden, intermediate].
        down_bias: [E, hidden].
    """

    gate: Linear
    gate_up: PackedMXFP4 | Tensor
    gate_up_bias: Tensor
    down: PackedMXFP4 | Tensor
    down_bias: Tensor
    num_experts_per_token: int
    swiglu_limit: float
    swiglu_alpha: float

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] → [T, hidden], the weighted sum of each token's experts."""
        topk_ids, topk_weights = gate_topk(self.gate(x.float()), self.num_experts_per_token)
        return fused_experts(
            x,
            topk_ids,
            topk_weights,
            self.gate_up,
            self.gate_up_bias,
            self.down,
            self.down_bias,
            swiglu_limit=self.swiglu_limit,
            swiglu_alpha=self.swiglu_alpha,
        )
