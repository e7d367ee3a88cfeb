"""Decode by programs against decode operation by operation: the same bits, whatever comes and goes
in the batch."""

from dataclasses import replace
from pathlib import Path

import pytest

from kernels.cpu.program import Program
from tests.support.tiny_model import TINY
from workers.config import Dtype
from workers.engine.llm import LLM, RequestOutput, SamplingParams
from workers.model.make_checkpoint import write_checkpoint
from workers.rank.recorded import cpu_program
from workers.request import TokenLogprobs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All widths are multiples of 32: packed dense layers would pad others with torch."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(path, replace(TINY, head_dim=32), seed=0)
    return path


def generate(
    checkpoint: Path, *, eager: bool, max_num_seqs: int = 6, dtype: Dtype = "float32"
) -> list[RequestOutput]:
    """Nine sequences of which six run at once, so that batches of all sizes are met; some cross
    blocks and the window."""
    sampling = [
        SamplingParams(
            max_tokens=5 + 7 * i,
            temperature=0.8 * (i % 3),
            seed=i,
            ignore_eos=True,
            logprobs=2,
            repetition_penalty=1 + 0.2 * (i % 2),
        )
        for i in range(9)
    ]
    prompts = [[(3 * i + j) % 200 for j in range(1 + 5 * i)] for i in range(9)]
    with LLM(
        checkpoint,
        dtype=dtype,
        max_model_len=128,
        max_num_seqs=max_num_seqs,
        kv_cache_bytes=4 << 20,
        enforce_eager=eager,
    ) as llm:
        return llm.generate(prompts, sampling, use_tqdm=False)


def answers(outputs: list[RequestOutput]) -> list[tuple[tuple[int, ...], tuple[TokenLogprobs, ...] | None]]:
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_programs_give_the_same_bits_as_single_operations(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, dtype: Dtype
) -> None:
    sizes: list[int] = []
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda self: (sizes.append(len(self)), run(self)))
    by_programs = generate(checkpoint, eager=False, dtype=dtype)
    assert len(sizes) > 40, "decode steps did not run as programs"
    num_runs = len(sizes)
    one_by_one = generate(checkpoint, eager=True, dtype=dtype)
    assert len(sizes) == num_runs
    assert answers(by_programs) == answers(one_by_one)


def test_batches_beyond_the_largest_program_run_operation_by_operation(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(generate(checkpoint, eager=True))
    monkeypatch.setattr(cpu_program, "MAX_PROGRAM_SIZE", 2)
    assert answers(generate(checkpoint, eager=False)) == expected


def test_a_model_that_needs_torch_runs_without_programs(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answers(generate(checkpoint, eager=True))
    monkeypatch.setattr(Program, "computed_elsewhere", ("aten.mul.Tensor",), raising=False)
    monkeypatch.setattr(
        Program,
        "__setattr__",
        lambda self, name, value: name == "computed_elsewhere" or object.__setattr__(self, name, value),
    )
    with caplog.at_level("INFO"):
        assert answers(generate(checkpoint, eager=False)) == expected
    assert "operation by operation: aten.mul.Tensor" in caplog.text
