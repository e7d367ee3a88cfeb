"""The part of `benchmarks/gpu_check.py` that times each launch alone, in the interpreter: which
launches, and their bytes."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from benchmarks import gpu_parts
from benchmarks.decode_batches import Batch, decode_batch, random_caches
from benchmarks.gpu_parts import Options, measure_kernels
from benchmarks.gpu_report import report
from benchmarks.gpu_timing import Timing
from benchmarks.launch_recorder import recording_launches
from benchmarks.random_model import random_model
from kernels.cpu import linear as cpu_linear
from kernels.linear import reference as linear_reference
from kernels.mxfp4 import NATURAL
from tests.support.gpu_parts import measured
from tests.support.tiny_model import TINY

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense layers are one call of a BLAS each, and indices go unchecked."""
    monkeypatch.setattr(cpu_linear, "can_run", lambda x: False)
    monkeypatch.setattr(linear_reference, "linear", functional.linear)
    for name, module in list(sys.modules.items()):
        if name.startswith("kernels.") and hasattr(module, "checks_indices"):
            monkeypatch.setattr(module, "checks_indices", lambda: False)


def test_every_launch_of_a_layer_has_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "preset_config", lambda name: TINY)
    card = {"bandwidth": 1e9, "gemm": {"dtype": "bf16", "size": 8192, "flops_per_s": 1e12}, "l2_bytes": 5_000}
    monkeypatch.setattr(gpu_parts, "_card", lambda device: card)
    calls = []

    def timed(works: list[Callable[[], object]], device: torch.device) -> Timing:
        calls.extend(work() for work in works)
        return Timing(0.001, 0.002)

    monkeypatch.setattr(gpu_parts, "timed", timed)
    options = Options(CPU, None, "tiny", batch_sizes=(3,), contexts=(40,), steps=2, prompts=())
    found = measured(measure_kernels, options)
    (batch,) = found["batches"]
    by_window = {
        window: [row for row in batch["launches"] if row["window"] == window] for window in (24, None)
    }
    matmuls = [("expert_matmul_natural", 0), ("expert_matmul_natural", 1)]
    expected = [
        ("linear", 0),
        ("_rope_and_store", 0),
        ("_attend", 0),
        ("linear", 1),
        ("add_rms_norm_kernel", 0),
    ]
    expected += [("narrow_linear_kernel", 0), ("choose_experts", 0), *matmuls, ("add_slots_rms_norm", 0)]
    for rows in by_window.values():
        assert [(row["name"], row["occurrence"]) for row in rows] == expected
    assert len(calls) == 2 * len(expected) + len(batch["around"])
    qkv = by_window[None][0]
    assert qkv["bytes"] == 2 * ((3 * 96) + 96 * (6 + 6) * 8 + (6 + 6) * 8 + 3 * (6 + 6) * 8)
    assert qkv["share"] == pytest.approx(qkv["bytes"] / 1e9 / 0.001)
    assert qkv["bytes"] > 2 * 5_000
    assert {row["name"] for row in by_window[None] if row["in_l2"]} >= {
        "add_rms_norm_kernel",
        "narrow_linear_kernel",
    }
    assert not qkv["in_l2"]
    assert [row["name"] for row in batch["around"]][:3] == ["yarn_kernel", "embed_kernel", "rms_norm_kernel"]
    text = report({"kernels": found})
    assert "| all | **layer, 10 launches** |" in text
    (gate,) = (row for row in by_window[None] if row["name"] == "narrow_linear_kernel")
    assert f"| all | gate | 1000.0 | 2000.0 | {gate['bytes'] / 1e6:.2f} | {gate['share']:.0%} in L2 |" in text
    assert "`in L2`: what these launches read in turn fits into twice the second-level cache (0 MB)" in text
    assert (
        "A copy reads and writes 1 GB/s, a bf16 product of 8192 x 8192 matrices reaches 1.00 TFLOP/s." in text
    )
    assert "| 24 | experts, gate_up |" in text


def test_a_recorded_launch_does_the_same_again() -> None:
    model = random_model(TINY, CPU, NATURAL, dtype=torch.float32)
    batch = Batch(2, 30)
    caches, inputs = random_caches(model, [batch], 0), decode_batch(model, batch)
    with torch.inference_mode(), recording_launches(compute=True) as recorded:
        hidden = model.forward(inputs, caches)
    launch = [launch for launch in recorded if launch.name == "add_slots_rms_norm"][-1]
    residual, normed = launch.tensors[0], launch.tensors[4]
    assert normed.data_ptr() == hidden.data_ptr()
    before = residual.clone()
    with torch.inference_mode():
        normed.fill_(torch.nan)
        launch.again()
    assert normed.isfinite().all()
    assert not torch.equal(residual, before), "the residual takes the sum again"
