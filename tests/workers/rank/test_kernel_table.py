"""The table of kernels, and what follows from it."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import attention, embedding, linear, moe, pointwise, sampling
from kernels.cpu import native
from kernels.mxfp4 import NATURAL, WGMMA
from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.model import expert_loader
from workers.model.checkpoint import LoadOptions, load_model
from workers.model.gpt_oss import GptOss
from workers.rank.kernel_table import (
    describe_device,
    model_kernels,
    not_capturable,
    slow_paths,
)

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
OPERATIONS = {"attention", "experts", "dense layers", "norms, RoPE", "embedding", "sampling"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models"))


def loaded(path: Path, dtype: torch.dtype = torch.float32, kv_dtype: torch.dtype | None = None) -> GptOss:
    return load_model(path, TINY, dtype=dtype, device=CPU, options=LoadOptions(kv_dtype=kv_dtype))


@pytest.mark.skipif(native.shared_library() is None, reason="the C++ library was not built")
def test_on_a_cpu_the_cpp_kernels(path: Path) -> None:
    choices = model_kernels(loaded(path))
    assert choices.keys() == OPERATIONS
    assert {choice.name for operation, choice in choices.items() if operation != "embedding"} == {
        f"C++ {native.isa()}"
    }
    assert choices["experts"].layout == "MXFP4 layout rows16"
    assert not not_capturable(choices)
    assert not slow_paths(choices, CPU)
    assert f", {native.isa()}, " in describe_device(CPU)
    fp8 = dict(model_kernels(loaded(path, kv_dtype=torch.float8_e4m3fn)))
    assert (
        str(fp8.pop("attention")) == "torch reference (of an fp8 KV cache, which only Triton's kernel takes)"
    )
    assert all(str(choices[operation]) == str(choice) for operation, choice in fp8.items())


def test_without_the_library_the_references_and_why(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        native, "_loaded", lambda: "the C++ kernels cannot be loaded (wrong ELF class): install Cantata again"
    )
    choices = model_kernels(loaded(path))
    assert not_capturable(choices) == ["attention", "experts"]
    assert str(choices["attention"]) == f"torch reference ({native._loaded()})"
    assert str(choices["experts"]) == f"torch reference, MXFP4 layout natural ({native._loaded()})"
    assert ", no C++ kernels, " in describe_device(CPU)
    assert slow_paths(choices, CPU) == [
        "attention, experts, norms, RoPE, embedding, sampling will be slow, on the torch reference: "
        "the C++ kernels cannot be loaded (wrong ELF class): install Cantata again"
    ]


def on_gpu(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    *,
    layout: str = NATURAL,
    triton: bool = True,
) -> GptOss:
    """Return a model with the fields that `model_kernels` reads, as if its tensors were on a GPU of
    that architecture."""
    monkeypatch.setattr(expert_loader, "choose_layout", lambda device: layout)
    weights = loaded(path, torch.bfloat16).layers[0].experts.weights
    if triton:
        pytest.importorskip("triton")
        from kernels.moe import grouped

        monkeypatch.setattr(grouped, "check_memory", lambda weights, device: None)
    for name, module in list(sys.modules.items()):
        for function, found in (
            ("architecture", architecture),
            ("has_triton", triton),
            ("triton_runs_on", triton),
        ):
            if name.startswith(("kernels.", "workers.rank.")) and hasattr(module, function):
                monkeypatch.setattr(module, function, lambda *args, found=found: found)
    dtype = torch.bfloat16
    layer = SimpleNamespace(
        attention=SimpleNamespace(kernels=attention.select(dtype, dtype, GPU)),
        experts=SimpleNamespace(kernels=moe.select(weights, dtype, GPU)),
    )
    weight = SimpleNamespace(device=GPU, dtype=dtype)
    return SimpleNamespace(  # type: ignore[return-value]
        device=GPU,
        layers=(layer,),
        lm_head=SimpleNamespace(kernel=linear.select(weight)),  # type: ignore[arg-type]
        pointwise=pointwise.select(dtype, GPU),
        embed=embedding.select(dtype, GPU),
        sampling=sampling.select(GPU),
    )


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
    choices = model_kernels(on_gpu(path, monkeypatch, architecture, layout=layout))
    assert choices.keys() == OPERATIONS
    assert str(choices["experts"]) == f"Triton {architecture}, MXFP4 layout {layout} ({why})"
    assert str(choices["attention"]) == str(choices["sampling"]) == f"Triton {architecture} (on a GPU)"
    assert str(choices["dense layers"]) == "cuBLAS (through torch; the gate by Triton)"
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
    assert slow_paths(model_kernels(model), GPU) == [sentence] * slow


def test_a_slow_path_on_a_gpu_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    choices = model_kernels(on_gpu(path, monkeypatch, "sm_100", layout="rows16"))
    assert not_capturable(choices) == ["experts"]
    assert slow_paths(choices, GPU) == [
        "experts will be slow, on the torch reference: no Triton kernel takes these weights with "
        "torch.bfloat16 activations"
    ]
    without = model_kernels(on_gpu(path, monkeypatch, "sm_100", triton=False))
    assert not_capturable(without) == ["attention", "experts"]
    assert slow_paths(without, GPU) == [
        "attention, experts, norms, RoPE, embedding, sampling will be slow, on the torch reference: Triton "
        "is not installed"
    ]
    assert without["attention"].is_slow


def test_what_can_be_captured_is_a_property_not_a_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = dict(model_kernels(on_gpu(path, monkeypatch, "sm_90", layout=WGMMA)))
    choices["embedding"] = replace(choices["embedding"], name="torch reference", is_slow=True)
    assert not_capturable(choices) == []
    choices["experts"] = replace(choices["experts"], is_capturable=False)
    assert not_capturable(choices) == ["experts"]
