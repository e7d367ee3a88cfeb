"""An operation's implementation is selected by `select`, from facts known when a model is loaded,
and the selected object is the one that runs and that the table of kernels prints."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels
from kernels import attention, embedding, linear, moe, pointwise, sampling
from kernels.cpu import dense, native
from kernels.implementation import REFERENCE
from kernels.moe import ExpertWeights
from kernels.moe import reference as moe_reference
from kernels.mxfp4 import NATURAL, ROWS16, pack, unpack

CPU = torch.device("cpu")
PACKAGES = Path(kernels.__file__).parent
ALONE = """
import importlib, os, sys
import torch  # once, for all of them
failed = []
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(f"{name}: {error!r}", flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
sys.exit(len(failed))
"""


def weights(layout: str | None = ROWS16, **changes: object) -> ExpertWeights:
    generator = torch.Generator().manual_seed(0)
    dense = (torch.randn(3, 64, 96, generator=generator), torch.randn(3, 96, 32, generator=generator))
    gate_up, down = dense if layout is None else (pack(part, layout) for part in dense)
    biases = torch.randn(3, 64, generator=generator), torch.randn(3, 96, generator=generator)
    made = ExpertWeights(gate_up, biases[0], down, biases[1], 7.0, 1.702, num_experts=3)
    return replace(made, **changes)  # type: ignore[arg-type]


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 3, generator=generator)
    return (torch.randn(5, 96, generator=generator), *moe.gate_topk(logits, 2))


needs_library = pytest.mark.skipif(native.shared_library() is None, reason="the C++ library was not built")


@needs_library
@pytest.mark.parametrize(
    ("experts", "why"),
    [
        (weights(NATURAL), "the C++ kernels do not take torch.float32 or these weights"),
        (weights(None), "the C++ kernels take MXFP4 only"),
        (
            weights(moe_activation_dtype="mxfp8"),
            "activations rounded to MXFP8, which only Triton's kernel takes",
        ),
        # The biases of both projections are read as one dtype.
        (
            weights(down_bias=torch.zeros(3, 96).bfloat16()),
            "the C++ kernels do not take torch.float32 or these weights",
        ),
    ],
    ids=["layout", "dense", "mxfp8", "biases"],
)
def test_experts_that_the_cpp_kernel_does_not_take_run_on_the_reference(
    experts: ExpertWeights, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe.cpu, "fused_experts", lambda *args: pytest.fail("the C++ kernel ran"))
    chosen = moe.select(experts, torch.float32, CPU)
    assert (chosen.name, chosen.why, chosen.is_slow, chosen.is_capturable) == (REFERENCE, why, True, False)
    expected = moe_reference.fused_experts(*tokens(), experts)
    assert torch.equal(chosen.run.fused_experts(*tokens()), expected)


@needs_library
def test_experts_on_the_cpp_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = weights()
    chosen = moe.select(experts, torch.float32, CPU)
    assert str(chosen) == f"C++ {native.isa()}, MXFP4 layout rows16 (decoded in registers)"
    assert chosen.is_capturable
    assert not chosen.is_slow
    dense = weights(
        None, gate_up=unpack(experts.gate_up, torch.float32), down=unpack(experts.down, torch.float32)
    )
    expected = moe_reference.fused_experts(*tokens(), dense)
    monkeypatch.setattr(moe_reference, "fused_experts", lambda *args: pytest.fail("the reference ran"))
    torch.testing.assert_close(chosen.run.fused_experts(*tokens()), expected, atol=1e-3, rtol=1e-5)


@needs_library
def test_what_was_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model goes on as it was loaded, whatever another one of the process is loaded on later."""
    experts, given = weights(), tokens()
    layer, chosen = linear.select(torch.ones(7, 96)), moe.select(experts, torch.float32, CPU)
    expected = chosen.run.fused_experts(*given), layer.run(given[0])
    monkeypatch.setattr(native._choice, "reference", True)
    monkeypatch.setattr(native._choice, "setting", "cpu_isa")
    monkeypatch.setattr(moe_reference, "fused_experts", lambda *args: pytest.fail("the reference ran"))
    assert torch.equal(chosen.run.fused_experts(*given), expected[0])
    assert torch.equal(layer.run(given[0]), expected[1])
    assert str(pointwise.select(torch.float32, CPU)) == f"{REFERENCE} (cpu_isa is reference)"


@needs_library
def test_a_cache_of_another_dtype_than_attention_was_chosen_for_is_refused() -> None:
    for kv_dtype, name in ((torch.bfloat16, f"C++ {native.isa()}"), (torch.float8_e4m3fn, REFERENCE)):
        chosen = attention.select(torch.bfloat16, kv_dtype, CPU)
        assert chosen.name == name
        assert chosen.is_capturable == (name != REFERENCE)
    run = attention.select(torch.bfloat16, torch.bfloat16, CPU).run
    qkv, cache = torch.zeros(2, 4, 8).bfloat16(), torch.zeros(2, 1, 16, 1, 8, dtype=torch.float8_e4m3fn)
    angles, slots = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^kv_cache must be torch.bfloat16 as activations are, got"):
        run.rope_and_store_kv(qkv, 2, angles, angles, cache, slots)
    ints = torch.tensor([[0]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^kv_cache must be torch.bfloat16 as activations are, got"):
        run.paged_attention(
            qkv[:, :2], cache, *ints, torch.tensor([0, 2], dtype=torch.int32), torch.zeros(2), scale=1.0
        )


@needs_library
def test_operations_of_one_device_are_chosen_alike() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        chosen = [select(dtype, CPU) for select in (pointwise.select, embedding.select)]
        assert {str(one) for one in (*chosen, sampling.select(CPU))} == {str(chosen[0])}
        assert chosen[0].name == f"C++ {native.isa()}"
    half = pointwise.select(torch.float16, CPU)
    assert half.is_slow
    assert half.why == "the C++ kernels do not take torch.float16 or these weights"
    assert linear.select(dense.pack(torch.ones(4, 32).bfloat16())).layout == "packed bfloat16"


def test_every_package_and_its_cpp_modules_can_be_imported_first() -> None:
    """Packages import each other's modules: an order that works may be an accident."""
    modules = [
        ".".join(("kernels", *file.relative_to(PACKAGES).with_suffix("").parts)).removesuffix(".__init__")
        for file in sorted((*PACKAGES.glob("*/__init__.py"), *PACKAGES.glob("cpu/[!_]*.py")))
        if re.search(r"^from kernels\.(?!cpu)", file.read_text(), re.MULTILINE)
    ]
    found = subprocess.run(
        [sys.executable, "-c", ALONE, *modules],
        cwd=PACKAGES.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert (found.returncode, found.stdout) == (0, "")
