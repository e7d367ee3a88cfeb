"""Shapes that break mixture-of-experts kernels, for the interpreter and for GPUs."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.formats import MX_BLOCK, MoeActivationDtype
from kernels.moe import ExpertOperations, ExpertWeights, reference, select
from kernels.mxfp4 import PackedMXFP4, from_natural, to_natural, unpack

LIMIT, ALPHA = 7.0, 1.702
_SIZE = 0.7
"""Standard deviation of weights: large enough that both sides of the clamp are met."""


@dataclass(frozen=True, slots=True)
class MoeCase:
    """Attributes: chosen: "random", "one" (all tokens choose expert `first_expert` first),
    "elsewhere" (none of this rank's), "few" (of the first k + 1). num_local: None: all from
    first_expert on.
    """

    num_tokens: int
    top_k: int
    num_experts: int
    hidden: int
    width: int
    first_expert: int = 0
    num_local: int | None = None
    chosen: str = "random"

    def __str__(self) -> str:
        part = "" if self.num_local is None else f"-{self.first_expert}to{self.first_expert + self.num_local}"
        return (
            f"{self.num_tokens}x{self.top_k}of{self.num_experts}{part}"
            f"-{self.hidden}-{self.width}-{self.chosen}"
        )


PACKED_CASES = [
    MoeCase(0, 2, 5, 96, 64),
    MoeCase(1, 1, 1, 32, 32),
    MoeCase(1, 4, 7, 96, 64),
    MoeCase(2, 3, 5, 64, 96),
    MoeCase(3, 2, 12, 160, 32),
    MoeCase(7, 4, 9, 224, 96),
    MoeCase(8, 1, 2, 128, 64, chosen="one"),
    MoeCase(9, 1, 3, 256, 32, chosen="one"),
    MoeCase(8, 4, 128, 32, 64),
    MoeCase(15, 2, 4, 96, 32, chosen="one"),
    MoeCase(16, 2, 3, 64, 32, chosen="one"),
    MoeCase(17, 2, 3, 96, 64, chosen="one"),
    MoeCase(17, 5, 17, 32, 96, chosen="few"),
    MoeCase(33, 3, 4, 288, 32),
    MoeCase(6, 3, 11, 64, 32, first_expert=3, num_local=4),
    MoeCase(21, 4, 16, 96, 64, first_expert=12, num_local=4),
    MoeCase(5, 2, 9, 64, 96, first_expert=4, num_local=1),
    MoeCase(6, 2, 10, 96, 32, first_expert=0, num_local=3, chosen="elsewhere"),
    MoeCase(63, 2, 3, 32, 64),
    MoeCase(64, 3, 6, 64, 32),
    MoeCase(65, 3, 6, 32, 32),
    MoeCase(97, 4, 33, 64, 32, first_expert=8, num_local=9),
    MoeCase(130, 1, 2, 32, 64, chosen="one"),
]

DENSE_CASES = [
    MoeCase(0, 1, 2, 40, 24),
    MoeCase(1, 4, 5, 33, 37),
    MoeCase(2, 1, 3, 65, 31),
    MoeCase(3, 2, 4, 31, 65),
    MoeCase(9, 2, 6, 64, 32),
    MoeCase(16, 1, 2, 63, 33, chosen="one"),
    MoeCase(17, 3, 5, 129, 17, first_expert=1, num_local=3),
    MoeCase(66, 2, 3, 20, 12),
    MoeCase(1, 1, 1, 1, 1),
    MoeCase(4, 3, 7, 127, 5),
    MoeCase(5, 4, 9, 128, 6),
    MoeCase(7, 2, 2, 129, 7),
    MoeCase(8, 1, 3, 15, 63, chosen="one"),
    MoeCase(15, 4, 33, 16, 64),
    MoeCase(18, 2, 5, 17, 66, chosen="few"),
    MoeCase(6, 3, 11, 96, 50, first_expert=3, num_local=4),
    MoeCase(5, 2, 10, 40, 22, first_expert=0, num_local=3, chosen="elsewhere"),
    MoeCase(33, 1, 2, 48, 33, chosen="one"),
    MoeCase(64, 3, 6, 34, 18),
    MoeCase(65, 3, 6, 35, 19, first_expert=5, num_local=1),
]


class Inputs(NamedTuple):
    """Tokens, their choices, and weights, from which `arguments` makes arguments."""

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    gate_up: PackedMXFP4 | Tensor
    gate_up_bias: Tensor
    down: PackedMXFP4 | Tensor
    down_bias: Tensor


def gate_logits(case: MoeCase, seed: int = 0) -> Tensor:
    """Return [T, E] fp32 logits that lead to the case's choice."""
    logits = torch.randn(case.num_tokens, case.num_experts, generator=torch.Generator().manual_seed(seed))
    local = slice(case.first_expert, case.first_expert + num_local(case))
    if case.chosen == "one":
        logits[:, case.first_expert] += 100
    elif case.chosen == "elsewhere":
        logits[:, local] -= 100
    elif case.chosen == "few":
        logits[:, : case.top_k + 1] += 100
    return logits


def inputs(case: MoeCase, *, layout: str | None, dtype: torch.dtype, seed: int = 1) -> Inputs:
    """Return random inputs on the CPU; layout None: dense weights of `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    local, width, hidden = num_local(case), case.width, case.hidden
    shapes = ((local, 2 * width, hidden), (local, hidden, width))
    if layout is None:
        weights: list[PackedMXFP4 | Tensor] = [
            (torch.randn(shape, generator=generator) * _SIZE).to(dtype) for shape in shapes
        ]
    else:
        weights = [_packed(shape, layout, generator) for shape in shapes]
    biases = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((local, 2 * width), (local, hidden))
    )
    gate_up_bias, down_bias = biases
    x = torch.randn(case.num_tokens, hidden, generator=generator).to(dtype)
    chosen = reference.gate_topk(gate_logits(case), case.top_k)
    return Inputs(x, *chosen, weights[0], gate_up_bias, weights[1], down_bias)


def _packed(shape: tuple[int, int, int], layout: str, generator: torch.Generator) -> PackedMXFP4:
    """Return random codes under two scales, drawn as they lie in memory: packing numbers of
    gpt-oss's widths takes seconds."""
    num_experts, num_rows, width = shape
    groups = (num_experts, num_rows, width // MX_BLOCK)
    blocks = torch.randint(0, 256, (*groups, MX_BLOCK // 2), dtype=torch.uint8, generator=generator)
    # A code's root mean square is 2.9, of these scales it is a fifth.
    scales = torch.randint(124, 126, groups, dtype=torch.uint8, generator=generator)
    return from_natural(blocks, scales, layout)


def num_local(case: MoeCase) -> int:
    return case.num_experts - case.first_expert if case.num_local is None else case.num_local


def expert_weights(
    case: MoeCase, given: Inputs, moe_activation_dtype: MoeActivationDtype = "auto"
) -> ExpertWeights:
    """Return the weights of the inputs."""
    return ExpertWeights(
        *given[3:],
        swiglu_limit=LIMIT,
        swiglu_alpha=ALPHA,
        num_experts=case.num_experts,
        first_expert=case.first_expert,
        moe_activation_dtype=moe_activation_dtype,
    )


def arguments(
    case: MoeCase, given: Inputs, moe_activation_dtype: MoeActivationDtype = "auto"
) -> tuple[Tensor, Tensor, Tensor, ExpertWeights]:
    """Return the arguments of `fused_experts`."""
    return (*given[:3], expert_weights(case, given, moe_activation_dtype))


def operations(case: MoeCase, given: Inputs) -> ExpertOperations:
    """Return the operations of the implementation that is selected for the inputs."""
    return select(expert_weights(case, given), given.x.dtype, given.x.device).run


def float64(case: MoeCase, given: Inputs) -> Tensor:
    """Return [T, H] float64: the definition, without any of the references' operations."""
    gate_up, down = (_dense(weights).double() for weights in (given.gate_up, given.down))
    x = given.x.double()
    out = torch.zeros_like(x)
    for token in range(case.num_tokens):
        for slot in range(case.top_k):
            expert = int(given.topk_ids[token, slot]) - case.first_expert
            if not 0 <= expert < num_local(case):
                continue
            hidden = gate_up[expert] @ x[token] + given.gate_up_bias[expert].double()
            gate, up = hidden[0::2].clamp(max=LIMIT), hidden[1::2].clamp(-LIMIT, LIMIT)
            active = (up + 1) * gate * torch.sigmoid(ALPHA * gate)
            out[token] += float(given.topk_weights[token, slot]) * (
                down[expert] @ active + given.down_bias[expert].double()
            )
    return out


def on_device(given: Inputs, device: torch.device, layout: str | None = None) -> Inputs:
    """Return a copy on the device, packed weights in the same layout, or in another one into which
    they are brought there."""

    def moved(value: PackedMXFP4 | Tensor) -> PackedMXFP4 | Tensor:
        if isinstance(value, Tensor):
            return value.to(device)
        there = PackedMXFP4(value.layout, value.blocks.to(device), value.scales.to(device), value.shape)
        return there if layout is None else from_natural(*to_natural(there), layout)

    return Inputs(*(moved(value) for value in given))


def natural(given: Inputs) -> Inputs:
    """Return the inputs with the weights in the layout that the reference reads."""
    converted = {
        name: from_natural(*to_natural(value))
        for name, value in given._asdict().items()
        if isinstance(value, PackedMXFP4)
    }
    return given._replace(**converted)


def _dense(weights: PackedMXFP4 | Tensor) -> Tensor:
    return unpack(weights, torch.float32) if isinstance(weights, PackedMXFP4) else weights
