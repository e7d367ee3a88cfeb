"""Which kernels a loaded model runs on, and why: what the start-up table shows and what decides
whether steps can be captured.

The choice itself is made where it applies, by the public function of each operation
(`kernels/*/__init__.py`) and by the layout that the weights were loaded in
(`kernels.mxfp4.choose_layout`); here the same questions are asked once, for a table.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kernels.backend import architecture, has_triton, triton_runs_on
from kernels.cpu import attention as cpu_attention
from kernels.cpu import experts as cpu_experts
from kernels.cpu import linear as cpu_linear
from kernels.cpu import native
from kernels.linear import PackedWeight
from kernels.mxfp4 import WGMMA, PackedMXFP4
from workers.config import KVDtype
from workers.model.gpt_oss import GptOss

REFERENCE = "torch reference"
"""Right everywhere and slow; experts and attention read sizes back to the host."""


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """What runs an operation.

    Attributes:
        implementation: `Triton sm_90`, `C++ avx512`, `cuBLAS`, REFERENCE.
        why: a clause for the user.
        layout: of the weights; empty where there is nothing to choose.
    """

    implementation: str
    why: str
    layout: str = ""

    def __str__(self) -> str:
        return f"{self.implementation}{', ' + self.layout if self.layout else ''} ({self.why})"


def kernel_choices(model: GptOss, kv_dtype: KVDtype | None = None) -> dict[str, KernelChoice]:
    """By operation.

    Args:
        kv_dtype: of the KV cache; None: the model's.
    """
    device = model.device
    if triton_runs_on(device):
        where = "in Triton's interpreter" if device.type == "cpu" else "on a GPU"
        rest = KernelChoice(f"Triton {architecture(device)}", where)
    elif device.type == "cuda":
        rest = KernelChoice(REFERENCE, "Triton is not installed")
    elif cpu_attention.can_run(model.embedding):
        rest = KernelChoice(f"C++ {native.isa()}", _why_this_isa())
    else:
        rest = KernelChoice(REFERENCE, _why_not_cpp(model.dtype))
    attention = rest
    if kv_dtype == "fp8_e4m3" and not triton_runs_on(device):
        attention = KernelChoice(REFERENCE, "of an fp8 KV cache, which only Triton's kernel takes")
    return {
        "attention": attention,
        "experts": _experts(model),
        "dense layers": _linear(model),
        "norms, RoPE": rest,
        "embedding": rest,
        "sampling": rest,
    }


def not_capturable(choices: Mapping[str, KernelChoice]) -> list[str]:
    """Operations of the model whose kernel reads sizes back to the host, which no CUDA graph can
    hold."""
    return [
        operation for operation in ("attention", "experts") if choices[operation].implementation == REFERENCE
    ]


def slow_paths(choices: Mapping[str, KernelChoice], device: torch.device) -> list[str]:
    """A sentence for each reason why operations run in a way that nobody wants without knowing."""
    by_reason: dict[str, list[str]] = {}
    for operation, choice in choices.items():
        if choice.implementation == REFERENCE:
            by_reason.setdefault(choice.why, []).append(operation)
    sentences = [
        f"{', '.join(operations)} will be slow, on the torch reference: {why}"
        for why, operations in by_reason.items()
    ]
    if device.type == "cuda" and _has_no_bf16_matrices(name := architecture(device)):
        sentences.append(
            f"attention and experts will be slow: {name} has no instructions for products of bf16 matrices"
        )
    return sentences


def _has_no_bf16_matrices(name: str) -> bool:
    """Turing and older, and AMD's without MFMA or WMMA: kernels compile for them, to one product at
    a time."""
    if name.startswith("sm_"):
        return int(name.removeprefix("sm_")) < 80
    return name.startswith(("gfx8", "gfx900", "gfx906", "gfx10"))


def describe_device(device: torch.device) -> str:
    """Its name and architecture; of a CPU the instruction set in use and how many threads
    compute."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)}, {architecture(device)})"
    kernels = native.isa() or "no C++ kernels"
    return (
        f"{device} ({platform.machine()}, {kernels}, {torch.get_num_threads()} "
        f"thread{'s' * (torch.get_num_threads() > 1)})"
    )


def _experts(model: GptOss) -> KernelChoice:
    experts = model.layers[0].experts
    gate_up, down = experts.gate_up, experts.down
    packed = isinstance(gate_up, PackedMXFP4)
    layout = (
        f"MXFP4 layout {gate_up.layout}"
        if isinstance(gate_up, PackedMXFP4)
        else f"dense {gate_up.dtype}".replace("torch.", "")
    )
    if triton_runs_on(model.device):
        from kernels.moe import grouped, tile_choice

        name = architecture(model.device)
        if not grouped.can_run(model.embedding, gate_up, down, experts.mxfp8_activations):
            return KernelChoice(
                REFERENCE, f"no Triton kernel takes these weights with {model.dtype} activations", layout
            )
        if not packed:
            why = "the checkpoint's weights are not quantised"
        elif experts.mxfp8_activations:
            why = "activations rounded to MXFP8, scaled blocks are multiplied as they are"
        elif isinstance(gate_up, PackedMXFP4) and gate_up.layout == WGMMA:
            why = "decoded in registers in front of wgmma"
        elif name in tile_choice.ARCHITECTURES or name == "cpu":
            why = "decoded by tl.dot_scaled"
        else:
            why = f"{name} is not known to this version: the checkpoint's layout and tiles of its family"
        return KernelChoice(f"Triton {name}", why, layout)
    if model.device.type == "cuda":
        return KernelChoice(REFERENCE, "Triton is not installed", layout)
    if experts.mxfp8_activations:
        return KernelChoice(
            REFERENCE, "activations rounded to MXFP8, which only Triton's kernel takes", layout
        )
    if (
        isinstance(gate_up, PackedMXFP4)
        and isinstance(down, PackedMXFP4)
        and cpu_experts.can_run(model.embedding, gate_up, down, experts.gate_up_bias.dtype)
    ):
        return KernelChoice(f"C++ {native.isa()}", "decoded in registers", layout)
    return KernelChoice(
        REFERENCE, _why_not_cpp(model.dtype) if packed else "the C++ kernels take MXFP4 only", layout
    )


def _linear(model: GptOss) -> KernelChoice:
    if model.device.type == "cuda":
        return KernelChoice(
            "hipBLASLt" if torch.version.hip else "cuBLAS",
            "through torch; the gate by Triton" if has_triton() else "through torch",
        )
    if cpu_linear.can_run(model.embedding):
        weight = model.lm_head.weight
        layout = (
            f"packed {str(weight.values.dtype).removeprefix('torch.')}"
            if isinstance(weight, PackedWeight)
            else ""
        )
        return KernelChoice(f"C++ {native.isa()}", "a row's result does not depend on its batch", layout)
    return KernelChoice("torch", _why_not_cpp(model.dtype))


def _why_this_isa() -> str:
    setting = native.chosen_by()
    return "the widest instructions of this processor" if setting is None else f"as {setting} says"


def _why_not_cpp(dtype: torch.dtype) -> str:
    if native.shared_library() is None:
        return native.why_missing()
    return f"the C++ kernels do not take {dtype} or these weights"
