"""The table of kernels, and what follows from it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.cpu import native
from kernels.mxfp4 import NATURAL
from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.model import checkpoint
from workers.model.checkpoint import load_model
from workers.model.gpt_oss import GptOss
from workers.rank import kernel_table as kernel_choice
from workers.rank.kernel_table import (
    REFERENCE,
    KernelChoice,
    describe_device,
    kernel_choices,
    not_capturable,
    slow_paths,
)

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
OPERATIONS = {"attention", "experts", "dense layers", "norms, RoPE", "embedding", "sampling"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models"))


def loaded(path: Path, dtype: torch.dtype = torch.float32) -> GptOss:
    return load_model(path, TINY, dtype=dtype, device=CPU)


@pytest.mark.skipif(native.shared_library() is None, reason="the C++ library was not built")
def test_on_a_cpu_the_cpp_kernels(path: Path) -> None:
    choices = kernel_choices(loaded(path))
    assert choices.keys() == OPERATIONS
    assert {choice.implementation for operation, choice in choices.items() if operation != "embedding"} == {
        f"C++ {native.isa()}"
    }
    assert choices["experts"].layout == "MXFP4 layout rows16"
    assert not not_capturable(choices)
    assert not slow_paths(choices, CPU)
    assert f", {native.isa()}, " in describe_device(CPU)
    fp8 = kernel_choices(loaded(path), "fp8_e4m3")
    assert (
        str(fp8.pop("attention")) == "torch reference (of an fp8 KV cache, which only Triton's kernel takes)"
    )
    assert choices.items() >= fp8.items()


def test_without_the_library_the_references_and_why(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        native, "_loaded", lambda: "the C++ kernels cannot be loaded (wrong ELF class): install Cantata again"
    )
    choices = kernel_choices(loaded(path))
    assert not_capturable(choices) == ["attention", "experts"]
    assert str(choices["attention"]) == f"torch reference ({native._loaded()})"
    assert str(choices["experts"]) == f"torch reference, MXFP4 layout natural ({native._loaded()})"
    assert ", no C++ kernels, " in describe_device(CPU)
    assert slow_paths(choices, CPU) == [
        "attention, experts, norms, RoPE, embedding, sampling will be slow, on the torch reference: "
        "the C++ kernels cannot be loaded (wrong ELF class): install Cantata again"
    ]


class _OnGpu:
    """A loaded model as if its tensors were on a GPU."""

    def __init__(self, model: GptOss) -> None:
        self.device, self.dtype, self.embedding, self.layers = GPU, model.dtype, model.embedding, model.layers


def on_gpu(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    *,
    layout: str = NATURAL,
    triton: bool = True,
) -> GptOss:
    monkeypatch.setattr(checkpoint, "choose_layout", lambda device: layout)
    monkeypatch.setattr(kernel_choice, "architecture", lambda device: architecture)
    monkeypatch.setattr(kernel_choice, "has_triton", lambda: triton)
    monkeypatch.setattr(kernel_choice, "triton_runs_on", lambda device: triton)
    return _OnGpu(loaded(path, torch.bfloat16))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("architecture", "layout", "why"),
    [
        ("sm_90", "wgmma.v1", "decoded in registers in front of wgmma"),
        ("sm_100", "natural", "decoded by tl.dot_scaled"),
        ("gfx950", "natural", "decoded by tl.dot_scaled"),
        (
            "sm_121",
            "natural",
            "sm_121 is not known to this version: the checkpoint's layout and tiles of its family",
        ),
        (
            "gfx1201",
            "natural",
            "gfx1201 is not known to this version: the checkpoint's layout and tiles of its family",
        ),
    ],
)
def test_on_a_gpu_triton(
    path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, layout: str, why: str
) -> None:
    pytest.importorskip("triton")
    choices = kernel_choices(on_gpu(path, monkeypatch, architecture, layout=layout))
    assert choices.keys() == OPERATIONS
    assert choices["experts"] == KernelChoice(f"Triton {architecture}", why, f"MXFP4 layout {layout}")
    assert choices["attention"] == choices["sampling"] == KernelChoice(f"Triton {architecture}", "on a GPU")
    assert not not_capturable(choices)
    assert not slow_paths(choices, GPU)


@pytest.mark.parametrize(
    ("architecture", "slow"),
    [
        ("sm_75", True),
        ("gfx906", True),
        ("gfx1030", True),
        ("sm_80", False),
        ("sm_137", False),
        ("gfx90a", False),
        ("gfx1201", False),
    ],
)
def test_a_gpu_without_matrix_instructions_is_said(
    path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, slow: bool
) -> None:
    """Triton compiles for these, too, to one product at a time."""
    pytest.importorskip("triton")
    model = on_gpu(path, monkeypatch, architecture)
    sentence = (
        f"attention and experts will be slow: {architecture} has no instructions for products of "
        f"bf16 matrices"
    )
    assert slow_paths(kernel_choices(model), GPU) == [sentence] * slow


def test_a_slow_path_on_a_gpu_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    choices = kernel_choices(on_gpu(path, monkeypatch, "sm_100", layout="rows16"))
    assert not_capturable(choices) == ["experts"]
    assert slow_paths(choices, GPU) == [
        "experts will be slow, on the torch reference: no Triton kernel takes these weights with "
        "torch.bfloat16 activations"
    ]
    without = kernel_choices(on_gpu(path, monkeypatch, "sm_100", triton=False))
    assert not_capturable(without) == ["attention", "experts"]
    assert slow_paths(without, GPU) == [
        "attention, experts, norms, RoPE, embedding, sampling will be slow, on the torch reference: Triton "
        "is not installed"
    ]
    assert not_capturable(
        without | {"attention": replace(without["attention"], implementation="Triton sm_90")}
    ) == ["experts"]
    assert without["attention"].implementation == REFERENCE
