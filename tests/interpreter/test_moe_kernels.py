"""The mixture of experts by Triton kernels, in the interpreter, against float64 and the reference."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.moe import fused_experts, gate_topk, gated_experts, reference, routing
from kernels.moe.matmul_wgmma import DECODE, decode
from kernels.mxfp4 import NATURAL, WGMMA, PackedMXFP4, from_natural, unpack
from tests.interpreter.guards import guarded
from tests.interpreter.interpreter import Array, emulates_asm, recorded_launches
from tests.support.moe_cases import ALPHA, DENSE_CASES, LIMIT, PACKED_CASES, Inputs, MoeCase, float64, gate_logits, inputs, natural, options
from tests.support.ptx import run_ptx


@emulates_asm("mxfp4x8_bf16")
def run_decode(operands: Sequence[Array], pack: int) -> Sequence[Array]:
    """The assembly itself, on numpy arrays."""
    words, scales = operands
    assert pack == 4
    word = np.ascontiguousarray(words).view(np.uint32)
    even, odd = np.moveaxis(np.ascontiguousarray(scales).view(np.uint32).reshape(*word.shape, 2), -1, 0)
    registers = run_ptx(DECODE.value, 4, (word, even, odd))
    return [np.stack(pair, axis=-1).view(np.uint16).reshape(words.shape) for pair in (registers[:2], registers[2:])]


def guarded_inputs(given: Inputs) -> Inputs:
    def copy(value: PackedMXFP4 | Tensor) -> PackedMXFP4 | Tensor:
        if isinstance(value, Tensor):
            return guarded(value)
        return PackedMXFP4(value.layout, guarded(value.blocks), guarded(value.scales), value.shape)

    return Inputs(*(copy(value) for value in given))


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest entry: sums of hundreds of terms cancel."""
    assert found.isfinite().all()
    largest = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected, atol=tolerance * largest, rtol=0)


def run(case: MoeCase, values: Inputs) -> Tensor:
    return fused_experts(*guarded_inputs(values), **options(case))


@pytest.mark.parametrize("layout", [NATURAL, WGMMA])
@pytest.mark.parametrize("case", PACKED_CASES, ids=str)
def test_packed_experts_in_bf16(case: MoeCase, layout: str) -> None:
    values = inputs(case, layout=layout, dtype=torch.bfloat16)
    found = run(case, values)
    assert found.dtype == torch.bfloat16
    # Activations, each expert's result and the sum are rounded to bf16.
    assert_near(found, float64(case, values), 2**-7)


@pytest.mark.parametrize("layout", [NATURAL, WGMMA])
@pytest.mark.parametrize("case", PACKED_CASES[1::3], ids=str)
def test_packed_experts_in_fp32_are_the_reference(case: MoeCase, layout: str) -> None:
    values = inputs(case, layout=layout, dtype=torch.float32)
    found = run(case, values)
    assert_near(found, float64(case, values), 1e-6)
    torch.testing.assert_close(found, reference.fused_experts(*natural(values), **options(case)), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float32, 1e-6)])
@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
def test_dense_experts(case: MoeCase, dtype: torch.dtype, tolerance: float) -> None:
    values = inputs(case, layout=None, dtype=dtype)
    assert_near(run(case, values), float64(case, values), tolerance)
