"""The C++ kernels on every instruction set that this processor has, against float64, the references
and themselves."""

import ast
import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels.linear
import kernels.moe
from kernels.cpu import dense, experts, linear, native, structures
from kernels.moe import ExpertWeights, gate_topk, reference
from kernels.mxfp4 import NATURAL, ROWS16, PackedMXFP4, choose_layout, from_natural, pack, to_natural, unpack

LIMIT, ALPHA = 7.0, 1.702


def test_the_library_was_built() -> None:
    assert native.isa() in native.ISAS
    assert choose_layout(torch.device("cpu")) == ROWS16


def test_without_the_library_the_references_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # An install without a compiler: there is no file.
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native._loaded.cache_clear()
    try:
        assert native.shared_library() is None
        assert (
            native.why_missing()
            == "the C++ kernels were not built: install a C++ compiler, then Cantata again"
        )
        assert native.isa() is None
        assert choose_layout(torch.device("cpu")) == NATURAL
        x, weight = torch.randn(3, 40).bfloat16(), torch.randn(6, 40).bfloat16()
        assert torch.equal(kernels.linear.linear(x, weight), kernels.linear.reference.linear(x, weight))
    finally:
        native._loaded.cache_clear()


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structures, "INTERFACE_VERSION", 0)
    native._loaded.cache_clear()
    try:
        assert native.shared_library() is None
        assert re.fullmatch(
            r"the C\+\+ kernels in .* are of version \d+, not 0: install Cantata again", native.why_missing()
        )
    finally:
        native._loaded.cache_clear()


@pytest.mark.parametrize(
    ("num_experts", "num_rows", "width"), [(1, 16, 32), (3, 48, 96), (2, 160, 64), (5, 16, 320)]
)
def test_the_layout_holds_the_same_weights(num_experts: int, num_rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    blocks = torch.randint(
        0, 256, (num_experts, num_rows, width // 32, 16), dtype=torch.uint8, generator=generator
    )
    scales = torch.randint(
        0, 255, (num_experts, num_rows, width // 32), dtype=torch.uint8, generator=generator
    )
    packed = from_natural(blocks, scales, ROWS16)
    assert packed.layout == ROWS16
    assert packed.shape == (num_experts, num_rows, width)
    assert all(map(torch.equal, to_natural(packed), (blocks, scales)))
    one = packed.expert(num_experts - 1)
    assert torch.equal(unpack(one, torch.float32)[0], unpack(from_natural(blocks, scales), torch.float32)[-1])


def test_rows_that_the_layout_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^blocks must have a multiple of 16 rows"):
        from_natural(
            torch.zeros(1, 24, 1, 16, dtype=torch.uint8), torch.zeros(1, 24, 1, dtype=torch.uint8), ROWS16
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_rows", "width", "num_outputs"),
    [(1, 64, 5), (2, 67, 33), (3, 31, 1), (7, 96, 70), (40, 2, 9), (33, 130, 100), (0, 8, 4)],
)
def test_linear_agrees_with_float64(
    fp32_isa: str, num_rows: int, width: int, num_outputs: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(num_outputs)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((num_rows, width), (num_outputs, width), (num_outputs,))
    )
    expected = x.double() @ weight.double().T
    # fp32 sums of up to 130 products of order 1; then one rounding to bf16.
    tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-4, "rtol": 2**-8}
    torch.testing.assert_close(linear.linear(x, weight, bias).double(), expected + bias.double(), **tolerance)
    torch.testing.assert_close(linear.linear(x, weight, None).double(), expected, **tolerance)


@pytest.mark.usefixtures("_restore_threads")
def test_a_row_of_linear_is_the_same_in_every_batch_and_for_all_threads(fp32_isa: str) -> None:
    x, weight, bias = (
        torch.randn(100, 323).bfloat16(),
        torch.randn(77, 323).bfloat16(),
        torch.randn(77).bfloat16(),
    )
    torch.set_num_threads(1)
    everything = linear.linear(x, weight, bias)
    for threads, rows, first in itertools.product((1, 2, 3), (1, 2, 3, 4, 5, 32, 33, 63), (0, 1, 37)):
        torch.set_num_threads(threads)
        assert torch.equal(
            linear.linear(x[first : first + rows], weight, bias), everything[first : first + rows]
        ), (threads, rows, first)


# Outputs on both sides of a group of 16, of two and of four groups, widths on both sides of 32
# columns and of the slices decoded at a time (256 and 512 columns), rows on both sides of every
# tile.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    ("width", "num_outputs"), [(32, 5), (31, 16), (33, 17), (257, 32), (544, 49), (1056, 15), (64, 100)]
)
def test_packed_layers_agree_with_float64(isa: str, width: int, num_outputs: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    weight, bias, x = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((num_outputs, width), (num_outputs,), (200, width))
    )
    packed = dense.pack(weight, dtype)
    exact = x.double() @ dense.unpack(packed).double().T
    everything = dense.linear(x, packed, bias)
    # fp32 sums of up to 1056 products of order 1, one rounding to bf16.
    torch.testing.assert_close(everything.double(), exact + bias.double(), atol=1e-4, rtol=2**-8)
    torch.testing.assert_close(dense.linear(x, packed, None).double(), exact, atol=1e-4, rtol=2**-8)
    for num_rows in (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 64, 65):
        assert torch.equal(dense.linear(x[5 : 5 + num_rows], packed, bias), everything[5 : 5 + num_rows]), (
            num_rows
        )


@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_packed_layers_are_the_same_for_all_threads(isa: str, dtype: torch.dtype) -> None:
    x, packed = torch.randn(40, 96).bfloat16(), dense.pack(torch.randn(333, 96).bfloat16(), dtype)
    torch.set_num_threads(1)
    alone = dense.linear(x, packed, None)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(dense.linear(x, packed, None), alone)


@pytest.mark.parametrize(("num_rows", "width"), [(1, 32), (15, 33), (16, 64), (50, 95), (33, 7)])
def test_packed_weights_are_the_same_weights(num_rows: int, width: int) -> None:
    weight = torch.randn(num_rows, width).bfloat16()
    assert torch.equal(dense.unpack(dense.pack(weight)), weight.float())
    whole = dense.pack(weight, torch.int8)
    # Half a step, a step being the row's largest magnitude over 127; and the largest is met exactly
    # but for rounding.
    step = weight.float().abs().amax(dim=1, keepdim=True) / 127
    assert ((dense.unpack(whole) - weight.float()).abs() <= 0.5001 * step).all()
    for dtype in (torch.bfloat16, torch.int8):
        pieces = dense.allocate(num_rows, width, dtype)
        for first in range(0, num_rows, 7):
            dense.write_rows(pieces, first, weight[first : first + 7])
        assert torch.equal(pieces.values, dense.pack(weight, dtype).values)
    assert pieces.scales is not None
    assert whole.scales is not None
    assert torch.equal(pieces.scales, whole.scales)


def test_int8_of_zeros_and_of_every_magnitude(isa: str) -> None:
    weight = torch.zeros(3, 256)
    weight[1] = torch.arange(256) - 128
    weight[1, 0] = 127
    weight[2, 9] = -1e-30
    packed = dense.pack(weight.bfloat16(), torch.int8)
    out = dense.linear(torch.eye(256).bfloat16(), packed, None)
    torch.testing.assert_close(out.T.double(), weight.bfloat16().double(), atol=0, rtol=2**-8)


def test_what_packed_layers_refuse() -> None:
    packed = dense.pack(torch.randn(20, 40).bfloat16())
    with pytest.raises(ValueError, match=r"^x must be \[T, 40\]"):
        kernels.linear.linear(torch.randn(2, 39).bfloat16(), packed)
    with pytest.raises(ValueError, match=r"^x must be torch.bfloat16"):
        kernels.linear.linear(torch.randn(2, 40), packed)
    with pytest.raises(ValueError, match=r"^bias must be \[20\]"):
        kernels.linear.linear(torch.randn(2, 40).bfloat16(), packed, torch.zeros(19).bfloat16())
    with pytest.raises(ValueError, match=r"^dtype must be torch.bfloat16 or torch.int8"):
        dense.allocate(2, 2, torch.float16)
    with pytest.raises(ValueError, match=r"^rows must be \[n, 40\]"):
        dense.write_rows(packed, 0, torch.zeros(4, 41).bfloat16())
    with pytest.raises(ValueError, match=r"^first must leave room for 4 of 20 rows, got 17"):
        dense.write_rows(packed, 17, torch.zeros(4, 40).bfloat16())
    with pytest.raises(ValueError, match=r"^rows must be torch.bfloat16"):
        dense.write_rows(packed, 0, torch.zeros(4, 40))


def test_nothing_is_written_past_the_outputs(isa: str) -> None:
    """Memory after the last output and the last token stays as it was."""
    memory = torch.full((6 * 21 + 64,), 7.0).bfloat16()
    packed = dense.pack(torch.randn(21, 64).bfloat16())
    x = torch.randn(6, 64).bfloat16()
    empty = torch.empty

    def in_memory(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return memory[: 6 * 21].view(6, 21) if dtype == torch.bfloat16 else empty(*shape, dtype=dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", in_memory)
        out = dense.linear(x, packed, None)
    assert out.data_ptr() == memory.data_ptr()
    assert (memory[6 * 21 :] == 7).all()
    assert not (out == 7).all()


class Layer:
    """Random weights; `wide` is what they decode to."""

    def __init__(
        self, num_experts: int, hidden: int, intermediate: int, bias_dtype: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator().manual_seed(hidden)
        # Large enough that both sides of the clamp are met.
        self.gate_up = pack(
            torch.randn(num_experts, 2 * intermediate, hidden, generator=generator) * 0.7, ROWS16
        )
        self.down = pack(torch.randn(num_experts, hidden, intermediate, generator=generator) * 0.7, ROWS16)
        self.gate_up_bias = torch.randn(num_experts, 2 * intermediate, generator=generator).to(bias_dtype)
        self.down_bias = torch.randn(num_experts, hidden, generator=generator).to(bias_dtype)

    def part(self, first: int, last: int) -> "Layer":
        layer = object.__new__(Layer)
        ids = torch.arange(first, last)
        layer.gate_up, layer.down = self.gate_up.select(ids), self.down.select(ids)
        layer.gate_up_bias, layer.down_bias = self.gate_up_bias[first:last], self.down_bias[first:last]
        return layer

    def held(self, first_expert: int = 0, num_experts: int | None = None) -> ExpertWeights:
        """Return the layer's experts as those from `first_expert` on, of at least that many in
        all."""
        return ExpertWeights(
            self.gate_up,
            self.gate_up_bias,
            self.down,
            self.down_bias,
            swiglu_limit=LIMIT,
            swiglu_alpha=ALPHA,
            num_experts=num_experts or first_expert + len(self.down_bias),
            first_expert=first_expert,
        )

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, first_expert: int = 0) -> Tensor:
        return experts.fused_experts(x, ids, weights, self.held(first_expert))

    def reference(
        self, x: Tensor, ids: Tensor, weights: Tensor, first_expert: int = 0, num_experts: int | None = None
    ) -> Tensor:
        return reference.fused_experts(x, ids, weights, self.held(first_expert, num_experts))


def choices(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return gate_topk(
        torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)), top_k
    )


# Widths on both sides of the slices that are decoded at a time (256 columns), token counts on both
# sides of each tile.
@pytest.mark.parametrize(
    ("num_experts", "hidden", "intermediate", "top_k"), [(5, 96, 160, 3), (3, 288, 32, 1), (7, 64, 544, 4)]
)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 4, 5, 6, 7, 40, 700])
def test_experts_agree_with_the_reference(
    fp32_isa: str, num_experts: int, hidden: int, intermediate: int, top_k: int, num_tokens: int
) -> None:
    layer = Layer(num_experts, hidden, intermediate)
    x = torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(1))
    ids, weights = choices(num_tokens, num_experts, top_k)
    # fp32 sums in another order; values of order 100.
    torch.testing.assert_close(layer(x, ids, weights), layer.reference(x, ids, weights), atol=2e-3, rtol=1e-5)


# 1056 columns are two of the longest slices and a bit; tokens of an expert on both sides of 8, 16,
# 32 and 192.
@pytest.mark.parametrize(
    ("num_experts", "hidden", "intermediate", "top_k"), [(5, 96, 160, 3), (2, 1056, 64, 2), (7, 64, 544, 4)]
)
def test_experts_on_bf16_are_as_exact_as_bf16(
    isa: str, num_experts: int, hidden: int, intermediate: int, top_k: int
) -> None:
    layer = Layer(num_experts, hidden, intermediate, torch.bfloat16)
    x = torch.randn(400, hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids, weights = choices(400, num_experts, top_k)
    everything = layer(x, ids, weights)
    exact = layer.reference(x.float(), ids, weights)
    # Rounded to 8 bits between the projections and at the end: 2^-9 each where it is worst.
    assert (everything.float() - exact).norm() < 0.003 * exact.norm()
    for first, count in ((0, 1), (7, 2), (3, 5), (1, 8), (0, 9), (30, 17), (11, 40), (100, 250)):
        rows = slice(first, first + count)
        assert torch.equal(layer(x[rows], ids[rows], weights[rows]), everything[rows]), (first, count)


@pytest.mark.parametrize(
    "row_scales", [[0], [1], [2], [127], [252], [253], [254], [2, 3, 100, 127, 130, 251, 252], [127, 1]]
)
def test_extreme_scales_in_bf16(isa: str, row_scales: list[int]) -> None:
    """One of 32 columns is read at a time; what is too large or too small for bf16 must be infinite
    or zero, and nothing else changes."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    blocks = (codes[0::2] | (codes[1::2] << 4))[None, None, None].expand(1, 32, 1, 16).contiguous()
    scales = torch.tensor(row_scales * 32, dtype=torch.uint8)[:32]
    down = from_natural(blocks, scales[None, :, None].contiguous(), ROWS16)
    expected = unpack(down, torch.float32)[0]
    gate_up = from_natural(
        torch.zeros(1, 64, 1, 16, dtype=torch.uint8), torch.zeros(1, 64, 1, dtype=torch.uint8), ROWS16
    )
    for tokens in (1, 40):
        for column in range(16):
            bias = torch.full((1, 64), 20.0)
            bias[0, 1::2] = -1.0
            bias[0, 2 * column + 1] = 0.0
            held = ExpertWeights(gate_up, bias, down, torch.zeros(1, 32), 1.0, 100.0, num_experts=1)
            ids, ones = torch.zeros(tokens, 1, dtype=torch.int32), torch.ones(tokens, 1)
            out = experts.fused_experts(torch.zeros(tokens, 32).bfloat16(), ids, ones, held).float()
            if expected.isfinite().all():
                torch.testing.assert_close(out, expected[:, column].expand(tokens, 32), atol=2**-125, rtol=0)
            elif not expected[0, column].isfinite():
                assert not out.isfinite().any()


def test_bf16_activations_and_biases(isa: str) -> None:
    layer = Layer(4, 96, 64, torch.bfloat16)
    x = torch.randn(9, 96).bfloat16()
    ids, weights = choices(9, 4, 2)
    out = layer(x, ids, weights)
    assert out.dtype == torch.bfloat16
    exact = layer.reference(x, ids, weights).float()
    # Rounded to 8 bits at the end by both, and by some between the projections.
    assert (out.float() - exact).norm() < 0.004 * exact.norm()


def test_parts_of_the_experts_add_up(fp32_isa: str) -> None:
    layer = Layer(7, 64, 96)
    x = torch.randn(30, 64)
    ids, weights = choices(30, 7, 3)
    total = torch.zeros_like(x)
    for first, last in ((0, 2), (2, 3), (3, 7)):
        part = layer.part(first, last)
        mine = part(x, ids, weights, first)
        torch.testing.assert_close(mine, part.reference(x, ids, weights, first, 7), atol=2e-3, rtol=1e-5)
        assert not mine[((ids < first) | (ids >= last)).all(dim=1)].any()
        total += mine
    torch.testing.assert_close(total, layer(x, ids, weights), atol=2e-3, rtol=1e-5)


def test_all_tokens_on_one_expert_and_others_empty(fp32_isa: str) -> None:
    layer = Layer(6, 64, 32)
    x = torch.randn(300, 64)
    ids, weights = torch.full((300, 1), 4, dtype=torch.int32), torch.rand(300, 1)
    torch.testing.assert_close(layer(x, ids, weights), layer.reference(x, ids, weights), atol=2e-3, rtol=1e-5)


@pytest.mark.usefixtures("_restore_threads")
def test_a_token_is_the_same_in_every_batch_and_for_all_threads(isa: str) -> None:
    layer = Layer(5, 96, 320)
    x = torch.randn(200, 96)
    ids, weights = choices(200, 5, 3)
    torch.set_num_threads(1)
    everything = layer(x, ids, weights)
    for threads, count, first in itertools.product((1, 2, 3), (1, 2, 3, 5, 8, 64), (0, 1, 100)):
        torch.set_num_threads(threads)
        rows = slice(first, first + count)
        assert torch.equal(layer(x[rows], ids[rows], weights[rows]), everything[rows]), (
            threads,
            count,
            first,
        )


def test_every_code_and_scale_is_decoded_exactly(fp32_isa: str) -> None:
    """One expert whose activations read single weights: limit and gate are such that the activation
    is up + 1."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    for scale in (0, 1, 100, 127, 140):
        blocks = torch.zeros(1, 32, 1, 16, dtype=torch.uint8)
        blocks[0, :, 0] = (codes[0::2] | (codes[1::2] << 4))[None]
        scales = torch.full((1, 32, 1), scale, dtype=torch.uint8)
        down = from_natural(blocks, scales, ROWS16)
        expected = unpack(down, torch.float32)[0]
        # gate = 20 clamps to the limit, so activation = (up + 1) * limit * sigmoid(alpha * limit);
        # up = -1 except in the read column.
        gate_up = from_natural(
            torch.zeros(1, 64, 1, 16, dtype=torch.uint8), torch.zeros(1, 64, 1, dtype=torch.uint8), ROWS16
        )
        for column in range(32):
            bias = torch.full((1, 64), 20.0)
            bias[0, 1::2] = -1.0
            bias[0, 2 * column + 1] = 0.0
            held = ExpertWeights(gate_up, bias, down, torch.zeros(1, 32), 1.0, 100.0, num_experts=1)
            ids, ones = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
            out = experts.fused_experts(torch.zeros(1, 32), ids, ones, held)
            # sigmoid(100) is 1 in fp32.
            torch.testing.assert_close(out[0], expected[:, column], atol=0, rtol=0)


@pytest.mark.parametrize("gate", [-1e4, -90.0, -87.5, -30.0, -1.0, -1e-6, 0.0, 1e-6, 1.0, 6.9, 7.1, 1e4])
def test_the_activation_at_its_extremes(fp32_isa: str, gate: float) -> None:
    layer = Layer(1, 32, 32)
    layer.gate_up_bias = torch.full((1, 64), gate)
    ids, weights = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    x = torch.zeros(1, 32)
    torch.testing.assert_close(layer(x, ids, weights), layer.reference(x, ids, weights), atol=1e-4, rtol=1e-5)


def test_not_a_number_is_not_hidden(isa: str) -> None:
    layer = Layer(2, 32, 64)
    x = torch.zeros(2, 32)
    x[0, 3] = torch.nan
    out = layer(x, *choices(2, 2, 1))
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


def test_the_public_functions_take_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "fused_experts", lambda *args, **kwargs: pytest.fail("the reference ran"))
    layer = Layer(4, 64, 32)
    x = torch.randn(3, 64)
    ids, weights = choices(3, 4, 2)
    assert torch.equal(kernels.moe.fused_experts(x, ids, weights, layer.held()), layer(x, ids, weights))
    with pytest.raises(ValueError, match=r"^topk_ids must be from 0 to 3"):
        kernels.moe.fused_experts(x, ids + 4, weights, layer.held())


def test_weights_of_another_layout_run_on_the_reference() -> None:
    layer = Layer(4, 64, 32)
    x = torch.randn(3, 64)
    ids, weights = choices(3, 4, 2)

    def natural(packed: PackedMXFP4) -> PackedMXFP4:
        return from_natural(*to_natural(packed))

    held = replace(layer.held(), gate_up=natural(layer.gate_up), down=natural(layer.down))
    out = kernels.moe.fused_experts(x, ids, weights, held)
    assert torch.equal(out, layer.reference(x, ids, weights))


_THREADS = """
import os, sys
import torch
from kernels.cpu import dense
x, packed = torch.ones(4, 64).bfloat16(), dense.pack(torch.ones(256, 64).bfloat16())
for num_threads in map(int, sys.argv[1:]):
    torch.set_num_threads(num_threads)  # has threads of its own
    before = set(os.listdir("/proc/self/task"))
    dense.linear(x, packed, None)
    new = sorted(set(os.listdir("/proc/self/task")) - before, key=int)
    print([sorted(os.sched_getaffinity(int(thread))) for thread in new])
"""
CORES = sorted(os.sched_getaffinity(0))


def test_threads_are_pinned_where_there_is_one_for_each_core() -> None:
    """Those of the pool besides the caller's; in a process of their own."""
    numbers = (len(CORES), len(CORES) + 2)
    out = subprocess.run(
        [sys.executable, "-c", _THREADS, *map(str, numbers)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    as_many, more = (ast.literal_eval(line) for line in out.splitlines())
    assert as_many == [[core] for core in CORES[1:]]
    assert more == [CORES] * (len(CORES) + 1)


_FORK = """
import os, torch
from kernels.cpu import dense
x, packed = torch.ones(4, 64).bfloat16(), dense.pack(torch.ones(256, 64).bfloat16())
expected = torch.full((4, 256), 64.0).bfloat16()
torch.set_num_threads(4)
assert torch.equal(dense.linear(x, packed, None), expected)
child = os.fork()
if child == 0:
    for threads in (4, 2):
        torch.set_num_threads(threads)
        assert torch.equal(dense.linear(x, packed, None), expected)
        print(threads, flush=True)
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_computes_with_as_many_and_with_fewer_threads() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _FORK], capture_output=True, text=True, check=False, timeout=120
    )
    assert (run.returncode, run.stdout) == (0, "4\n2\n"), run.stderr
