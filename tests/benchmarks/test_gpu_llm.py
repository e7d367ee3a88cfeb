"""The part of a GPU check that generates: which answers agree, and that it runs where there is no
GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_llm
from benchmarks.gpu_llm import NUM_PROMPTS, TOLERANCE, Agreement, Answer, compare, measure_llm
from benchmarks.gpu_parts import Options
from benchmarks.gpu_report import report
from benchmarks.random_model import random_model
from kernels.mxfp4 import choose_layout
from tests.support.gpu_parts import measured
from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.engine.llm import LLM
from workers.executor.inline import InlineExecutor
from workers.request import TokenLogprobs

CPU = torch.device("cpu")
OPTIONS = Options(CPU, None, "tiny", batch_sizes=(), contexts=(), steps=4, prompts=())


def answer(*steps: tuple[int, float, dict[int, float]]) -> Answer:
    return [
        (token, TokenLogprobs(logprob, ((token, logprob), *others.items())))
        for token, logprob, others in steps
    ]


FIRST = answer((5, -1.0, {6: -1.2, 7: -1.8}), (8, -2.0, {9: -2.1}), (3, -1.0, {4: -1.1}))


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (FIRST, Agreement(1, 1, 0, 0, 0.0)),
        (answer((5, -1.1, {}), (8, -1.8, {}), (3, -1.0, {})), Agreement(1, 1, 0, 0, 0.2)),
        (answer((5, -1.0, {}), (8, -2.3, {}), (3, -1.0, {})), Agreement(1, 0, 0, 1, 0.3)),
        (answer((5, -1.1, {}), (9, -2.0, {}), (77, -9.0, {})), Agreement(1, 0, 1, 0, 0.1)),
        (answer((7, -1.0, {}), (8, -2.0, {}), (3, -1.0, {})), Agreement(1, 0, 0, 1, 0.0)),
        (answer((5, -1.0, {}), (77, -2.0, {}), (3, -1.0, {})), Agreement(1, 0, 0, 1, 0.0)),
    ],
    ids=["equal", "rounded", "too far", "near tie", "no near tie", "not among the alternatives"],
)
def test_which_answers_agree(second: Answer, expected: Agreement) -> None:
    found = compare([FIRST], [second])
    assert found == replace(expected, worst=pytest.approx(expected.worst))
    assert TOLERANCE == 0.25


def test_an_exact_tie_parts_sequences_that_agree() -> None:
    tie = answer((5, -1.0, {6: -1.0}))
    assert compare([tie], [answer((6, -1.0, {5: -1.0}))]) == Agreement(1, 0, 1, 0, 0.0)


def test_it_runs_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU every way gives the same answers, bit for bit."""
    found = measured(measure_llm, OPTIONS)
    assert "failures" not in found
    assert [(row["way"], row["sequences"], row["tokens"]) for row in found["ways"]] == [
        *(("eager", 1, 4), ("eager", NUM_PROMPTS, 4 * NUM_PROMPTS)),
        *(("recorded steps", 1, 4), ("recorded steps", NUM_PROMPTS, 4 * NUM_PROMPTS)),
    ]
    assert all(row["tokens_per_s"] == row["tokens"] / row["seconds"] for row in found["ways"])
    expected = {"sequences": NUM_PROMPTS, "same": NUM_PROMPTS, "near_ties": 0, "others": 0, "worst": 0.0}
    assert [row["what"] for row in found["agreements"]] == [
        "recorded steps = eager",
        "batch = one by one",
        "a second engine = the first",
        "after the second engine was closed = before",
    ]
    assert all(row | expected == row for row in found["agreements"])
    assert "llm, recorded steps, 16 sequences: " in capsys.readouterr().out
    text = report({"llm": found})
    assert "| eager | 16 | 64 |" in text
    assert f"- batch = one by one: of {NUM_PROMPTS} sequences {NUM_PROMPTS} the same" in text


def test_answers_that_differ_and_engines_that_do_not_start_are_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The eager engine's answers are of prompts turned round; the other one does not start at
    all."""
    start = InlineExecutor.start

    def failing(executor: InlineExecutor) -> object:
        if not executor._config.enforce_eager:
            raise RuntimeError("operation not permitted when stream is capturing")
        return start(executor)

    with monkeypatch.context() as patches:
        patches.setattr(InlineExecutor, "start", failing)
        found = measured(measure_llm, OPTIONS)
    assert [row["way"] for row in found["ways"]] == ["eager", "eager"]
    (failure,) = found["failures"]
    assert failure == {
        "what": "recorded steps",
        "error": "RuntimeError: operation not permitted when stream is capturing",
    }
    generate = LLM.generate

    def turned(llm: LLM, prompts: list[list[int]], *args: object, **options: object) -> object:
        eager = llm._executor._config.enforce_eager  # type: ignore[attr-defined]
        return generate(llm, prompts[::-1] if eager else prompts, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(LLM, "generate", turned)
    found = measured(measure_llm, OPTIONS)
    (failure,) = found["failures"]
    assert failure["what"] == "recorded steps = eager"
    assert "of 16 sequences differ by more than 0.25 nats" in failure["error"]


def test_a_checkpoint_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_checkpoint(tmp_path)
    monkeypatch.setattr(gpu_llm, "_MAX_MODEL_LEN", TINY.max_context_len)
    found = measured(measure_llm, replace(OPTIONS, model=path, preset=None, steps=2))
    assert "failures" not in found
    assert found["model"] == str(path)


def test_small_branches_leave_most_of_what_passes_by() -> None:
    models = [
        random_model(TINY, CPU, choose_layout(CPU), dtype=torch.float32, branch_exponent=exponent)
        for exponent in (0, -3)
    ]
    one, eighth = (model.layers[0] for model in models)
    assert torch.equal(one.attention.output.weight / 8, eighth.attention.output.weight)  # type: ignore[operator, arg-type]
    assert torch.equal(one.experts.weights.down_bias / 8, eighth.experts.weights.down_bias)
    assert torch.equal(one.experts.weights.down.scales.int() - 3, eighth.experts.weights.down.scales.int())  # type: ignore[union-attr]
    assert torch.equal(one.experts.weights.gate_up.scales, eighth.experts.weights.gate_up.scales)  # type: ignore[union-attr]
