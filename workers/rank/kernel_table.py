"""Which kernels a loaded model runs on, and why: what the start-up table shows and what decides
whether steps can be captured. The model's layers hold the implementations that were chosen when
they were loaded; here they are only listed."""

import platform
from collections.abc import Mapping

import torch

from kernels import sampling
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
        "sampling": sampling.select(model.device),
    }


def not_capturable(kernels: Kernels) -> list[str]:
    """Operations whose implementation no CUDA graph can hold."""
    return [operation for operation, chosen in kernels.items() if not chosen.is_capturable]


def slow_paths(kernels: Kernels, device: torch.device) -> list[str]:
    """A sentence for each reason why operations run slower than a user expects."""
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
