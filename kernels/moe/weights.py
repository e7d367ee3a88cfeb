"""The experts of a rank: their weights, and the parameters that all operations on them need."""

from dataclasses import dataclass

from torch import Tensor

from kernels.formats import MX_BLOCK, MoeActivationDtype
from kernels.mxfp4 import PackedMXFP4


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """Weights of E experts, `first_expert` to `first_expert + E - 1` of `num_experts`.

    Attributes:
        gate_up: [E, 2I, H], packed or dense; rows interleaved: even = gate, odd = up.
        gate_up_bias: [E, 2I] float.
        down: [E, H, I], packed or dense.
        down_bias: [E, H] float.
        swiglu_limit: upper bound of gate, and bound of up on both sides.
        swiglu_alpha: factor of the gate in its sigmoid.
        num_experts: number of experts over all ranks.
        moe_activation_dtype: `auto` does not convert activations. `mxfp8` changes the numerics: the
            input of a projection is first rounded to MXFP8
            (`kernels.moe.reference.round_to_mxfp8`), for hardware that multiplies MXFP8 with MXFP4.
            H and I must then be multiples of 32.
    Raises:
        ValueError: names the argument whose shape does not fit the others, or the range.
    """

    gate_up: PackedMXFP4 | Tensor
    gate_up_bias: Tensor
    down: PackedMXFP4 | Tensor
    down_bias: Tensor
    swiglu_limit: float
    swiglu_alpha: float
    num_experts: int
    first_expert: int = 0
    moe_activation_dtype: MoeActivationDtype = "auto"

    def __post_init__(self) -> None:
        if len(self.gate_up.shape) != 3 or self.gate_up.shape[1] % 2:
            raise ValueError(f"gate_up must be [E, 2I, H], got shape {list(self.gate_up.shape)}")
        num_local, double_width, hidden_size = self.gate_up.shape
        if not 0 <= self.first_expert <= self.num_experts - num_local:
            raise ValueError(
                f"first_expert must leave room for {num_local} of {self.num_experts} experts, got "
                f"{self.first_expert}"
            )
        expected = {
            "gate_up_bias": (self.gate_up_bias.shape, (num_local, double_width)),
            "down": (self.down.shape, (num_local, hidden_size, double_width // 2)),
            "down_bias": (self.down_bias.shape, (num_local, hidden_size)),
        }
        for name, (shape, wanted) in expected.items():
            if tuple(shape) != wanted:
                raise ValueError(f"{name} must be {list(wanted)}, got shape {list(shape)}")
        if self.mxfp8 and (self.gate_up.shape[2] % MX_BLOCK or self.down.shape[2] % MX_BLOCK):
            raise ValueError(
                f"moe_activation_dtype mxfp8 needs widths that are multiples of {MX_BLOCK}, got "
                f"{self.gate_up.shape[2]} of gate_up, {self.down.shape[2]} of down"
            )

    @property
    def num_local(self) -> int:
        """Number of experts on this rank, E."""
        return self.gate_up.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, H."""
        return self.gate_up.shape[2]

    @property
    def mxfp8(self) -> bool:
        """True if activations are rounded to MXFP8."""
        return self.moe_activation_dtype == "mxfp8"

    @property
    def layout(self) -> str:
        """Layout of the weights in memory, for the user."""
        if isinstance(self.gate_up, PackedMXFP4):
            return f"MXFP4 layout {self.gate_up.layout}"
        return f"dense {self.gate_up.dtype}".replace("torch.", "")
