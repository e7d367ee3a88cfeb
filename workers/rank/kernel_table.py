"""The kernels that a loaded model runs on, and the reason for each: the content of the start-up
table, and the basis for the decision whether steps can be captured. The implementations were
selected when the model's layers were loaded; this module only lists them."""

import platform
from collections.abc import Mapping

import torch

from kernels.backend import architecture
from kernels.cpu import native
from kernels.implementation import Implementation
from workers.model.gpt_oss import GptOss

Kernels = Mapping[str, Implementation[object]]
"""Implementations by operation."""


def model_kernels(model: GptOss) -> Kernels:
    """Return the implementation of each operation of a step. Layers are alike, so the first one
    represents all."""
    layer = model.layers[0]
    return {
        "attention": layer.attention.kernels,
        "experts": layer.experts.kernels,
        "dense layers": model.lm_head.kernel,
        "norms, RoPE": model.pointwise,
        "embedding": model.embed,
        "sampling": model.sampling,
    }


def not_capturable(kernels: Kernels) -> list[str]:
    """Return the operations whose implementation cannot be part of a CUDA graph."""
    return [operation for operation, chosen in kernels.items() if not chosen.is_capturable]


def slow_paths(kernels: Kernels, device: torch.device) -> list[str]:
    """Return one sentence for each reason why operations run slower than a user expects."""
    by_reason: dict[str, list[str]] = {}
    for operation, chosen in kernels.items():
        if chosen.is_slow:
            by_reason.setdefault(chosen.why, []).append(operation)
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
    """Return whether a GPU lacks bf16 matrix instructions (Turing and older, AMD's without MFMA or
    WMMA): kernels compile for it, but to one product at a time."""
    if name.startswith("sm_"):
        return int(name.removeprefix("sm_")) < 80
    return name.startswith(("gfx8", "gfx900", "gfx906", "gfx10"))


def describe_device(device: torch.device) -> str:
    """Return the device's name and architecture; for a CPU the instruction set in use and the
    number of compute threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)}, {architecture(device)})"
    kernels = native.isa() or "no C++ kernels"
    return (
        f"{device} ({platform.machine()}, {kernels}, {torch.get_num_threads()} "
        f"thread{'s' * (torch.get_num_threads() > 1)})"
    )
