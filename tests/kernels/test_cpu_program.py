"""Programs: what was recorded runs again on what then lies at its addresses, and what could not be
repeated is refused."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from kernels.attention import rope_and_store_kv
from kernels.cpu import native
from kernels.cpu.pointwise import converted
from kernels.cpu.program import ProgramMemory, record
from kernels.embedding import embed
from kernels.linear import linear
from kernels.moe import gate_topk
from kernels.pointwise import add_rms_norm, rms_norm, yarn_cos_sin

ROPE = {
    "theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
TABLE, WEIGHT, NORM = torch.randn(50, 24), torch.randn(40, 24), torch.randn(24)


def model(ids: Tensor) -> Tensor:
    x = embed(ids, TABLE)
    _, normed = add_rms_norm(x, rms_norm(x, NORM, 1e-5), NORM, 1e-5)
    return linear(normed, WEIGHT)[:, :30].view(-1, 30)


def test_a_program_computes_what_it_recorded_from_new_inputs() -> None:
    inputs = torch.tensor([3, 7, 49])
    program, result = record(ProgramMemory(), lambda: model(inputs))
    assert program.computed_elsewhere == ()
    assert len(program) == 4
    assert torch.equal(result, model(inputs))
    for ids in ([0, 1, 2], [5, 5, 5]):
        inputs.copy_(torch.tensor(ids))
        program.run()
        assert torch.equal(result, model(inputs))


def test_programs_share_their_memory_and_run_in_any_order() -> None:
    memory = ProgramMemory()
    inputs = torch.tensor([3, 7, 49, 1, 2])
    parts = [inputs[:count] for count in (5, 1, 3)]
    programs = [record(memory, lambda part=part: model(part)) for part in parts]
    assert len({result.data_ptr() for _, result in programs}) < 3 or memory.num_bytes == 1 << 24
    size = memory.num_bytes
    for index in (0, 2, 1, 1, 0):
        inputs.copy_(torch.randint(0, 50, (5,)))
        program, result = programs[index]
        program.run()
        assert torch.equal(result, model(parts[index]))
    assert memory.num_bytes == size


def test_what_another_thread_runs_meanwhile_is_not_recorded() -> None:
    inputs, others = torch.tensor([3, 7]), torch.tensor([1, 2, 4])

    def forward() -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(model, others).result()
        return model(inputs)

    program, result = record(ProgramMemory(), forward)
    assert len(program) == 4
    program.run()
    assert torch.equal(result, model(inputs))


def test_what_torch_computes_is_named_and_such_a_program_does_not_run() -> None:
    x = torch.randn(3, 24)
    program, result = record(ProgramMemory(), lambda: rms_norm(x * 2, NORM, 1e-5))
    assert program.computed_elsewhere == ("aten.mul.Tensor",)
    assert torch.equal(result, rms_norm(x * 2, NORM, 1e-5)), "the recording itself is a valid run"
    with pytest.raises(AssertionError, match=r"aten\.mul"):
        program.run()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("copies", "views"),
    [
        (lambda x: x.to(torch.bfloat16), lambda x: x.to(torch.float32)),
        (lambda x: x.t().contiguous(), lambda x: x.contiguous()),
        (lambda x: x.t().reshape(-1), lambda x: x.reshape(-1)),
        (lambda x: x.t().flatten(), lambda x: x.flatten()),
        (lambda x: x.clone(), lambda x: x[1:].view(-1)),
        (lambda x: x.float() + 0, lambda x: x.unbind(0)[0]),
    ],
)
def test_a_view_that_copies_is_no_view(
    copies: Callable[[Tensor], Tensor], views: Callable[[Tensor], Tensor], inference: bool
) -> None:
    x = torch.randn(3, 4)
    with torch.inference_mode(inference):
        assert record(ProgramMemory(), lambda: copies(x))[0].computed_elsewhere != ()
        assert record(ProgramMemory(), lambda: views(x))[0].computed_elsewhere == ()


def test_a_layer_of_another_dtype_converts_within_the_program() -> None:
    x, weight = torch.randn(3, 24).bfloat16(), torch.randn(7, 24)
    program, out = record(ProgramMemory(), lambda: linear(x, weight))
    assert program.computed_elsewhere == ()
    x.copy_(torch.randn(3, 24))
    program.run()
    assert torch.equal(out, linear(x, weight))


def test_an_index_that_became_bad_is_refused_with_the_operation() -> None:
    qkv, angles, cache = torch.randn(2, 4, 8), torch.rand(2, 4), torch.zeros(2, 1, 16, 1, 8)
    slots = torch.tensor([1, 2])
    program, _ = record(ProgramMemory(), lambda: rope_and_store_kv(qkv, 2, angles, angles, cache, slots))
    slots[1] = 16
    with pytest.raises(IndexError, match="rope_and_store, operation 0"):
        program.run()


def test_observers_hear_of_each_operation_of_a_run() -> None:
    inputs = torch.tensor([3, 7])
    program, _ = record(ProgramMemory(), lambda: model(inputs))
    heard: list[tuple[str, float]] = []
    with native.observing(lambda name, arguments, seconds: heard.append((name, seconds))):
        program.run()
    assert [name for name, _ in heard] == ["embed", "norm", "norm", "linear"]
    assert all(0 < seconds < 10 for _, seconds in heard)
    program.run()
    assert len(heard) == 4


def test_memory_is_aligned_and_grows_by_what_is_asked() -> None:
    memory = ProgramMemory()
    small, next_one = memory.take((3, 5), torch.bfloat16), memory.take((7,), torch.int32)
    assert small.shape == (3, 5)
    assert small.is_contiguous()
    assert next_one.data_ptr() - small.data_ptr() == 64
    large = memory.take((1 << 23,), torch.float32)
    assert large.shape == (1 << 23,)
    assert memory.num_bytes == (1 << 24) + (1 << 25)
    memory.rewind()
    assert memory.take((1,), torch.uint8).data_ptr() == small.data_ptr()


@pytest.mark.parametrize("count", [0, 1, 15, 16, 1000, 70_000])
def test_conversions_are_those_of_torch(count: int) -> None:
    x = torch.randn(count) * 10.0 ** torch.randint(-40, 38, (count,)).float()
    x[: min(count, 4)] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-45])[: min(count, 4)]
    half = converted(x, torch.bfloat16)
    # NaN stays NaN; its bits are open.
    assert torch.equal(half.nan_to_num(nan=0.0), x.bfloat16().nan_to_num(nan=0.0))
    assert torch.equal(half.isnan(), x.isnan())
    assert torch.equal(converted(half, torch.float32).nan_to_num(nan=0.0), half.float().nan_to_num(nan=0.0))
    assert converted(x, torch.float32) is x


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding(dtype: torch.dtype) -> None:
    weight = torch.randn(9, 33).to(dtype)
    ids = torch.tensor([4, 12, 3, 13, 8, 2**40, 4])
    rows = embed(ids, weight, 4)
    expected = torch.stack(
        [weight[id - 4] if 4 <= id < 13 else torch.zeros(33, dtype=dtype) for id in ids.tolist()]
    )
    assert torch.equal(rows, expected)
    assert embed(ids, weight[:0], 4).tolist() == torch.zeros(7, 33).tolist()


@pytest.mark.usefixtures("implementation")
def test_angles_of_a_position_do_not_depend_on_the_others() -> None:
    positions = torch.cat((torch.arange(100), torch.tensor([4095, 4096, 131071])))
    everything = yarn_cos_sin(positions, 64, **ROPE)
    for row in (0, 1, 63, 99, 102):
        alone = yarn_cos_sin(positions[row : row + 1], 64, **ROPE)
        assert all(torch.equal(one[0], many[row]) for one, many in zip(alone, everything, strict=True))


def test_a_gate_is_recorded() -> None:
    logits = torch.randn(4, 8)
    program, ids = record(ProgramMemory(), lambda: gate_topk(logits, 2)[0])
    logits.copy_(torch.randn(4, 8))
    program.run()
    assert torch.equal(ids, gate_topk(logits, 2)[0])


def test_copies_that_torch_makes_are_noticed_whatever_they_are_called() -> None:
    x = torch.randn(4, 8)
    for copy in (
        lambda: x.to(torch.bfloat16),
        lambda: x.T.contiguous(),
        lambda: x.T.reshape(-1),
        lambda: x + 1,
    ):
        with torch.inference_mode():
            program, _ = record(ProgramMemory(), copy)
        assert program.computed_elsewhere
    with torch.inference_mode():
        program, _ = record(ProgramMemory(), lambda: x.to(torch.float32).contiguous().reshape(-1)[3:])
    assert not program.computed_elsewhere


def test_recording_does_not_import_torchs_compiler() -> None:
    """It would take the first request two seconds."""
    code = (
        "import sys, torch; from kernels.cpu.program import ProgramMemory, record; from kernels.pointwise "
        "import rms_norm\n"
        "x, weight = torch.zeros(3, 24), torch.ones(24)\n"
        "program, _ = record(ProgramMemory(), lambda: rms_norm(x, weight, 1e-5).view(-1))\n"
        "print(len(program), sorted({'torch._dynamo', 'sympy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout == "1 []\n", result.stderr
