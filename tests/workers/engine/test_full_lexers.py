"""Texts of one grammar fill its lexer together: they go on with a fresh one."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from llguidance import LLMatcher, LLParserLimits
from tokenizers import Tokenizer

from tests.support.grammars import (
    VOCAB_SIZE,
    PipelinedRank,
    schema_grammar,
    text_automaton,
    write_checkpoint_with_tokenizer,
)
from tests.support.waiting import until
from workers.config import CacheConfig, EngineConfig, SchedulerConfig
from workers.constraint import compiler, grammar
from workers.constraint.codec import Constraint
from workers.engine.engine import Engine
from workers.engine.grammars import GrammarSteps
from workers.engine.stream import ThreadReader
from workers.errors import InvalidRequest
from workers.executor.base import Executor
from workers.executor.inline import InlineExecutor
from workers.model_config import load_model_config
from workers.request import EngineRequest, FinishReason, SamplingParams

WAIT_S = 60.0
NAMES = sorted({"".join(random.Random(seed).choices("abcdefgh", k=30)) for seed in range(60)})
FULL = "the output's grammar failed: lexer error: too many states: "


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint_with_tokenizer(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def requests(checkpoint: Path) -> list[EngineRequest]:
    constraint = Constraint.of(text_automaton(checkpoint, schema_grammar({"enum": NAMES})))
    over = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).token_to_id("<|return|>")
    sampling = SamplingParams(max_tokens=60, seed=0, stop_token_ids=(over,))
    return [
        EngineRequest(str(seed), (5, seed), replace(sampling, seed=seed), constraint=constraint)
        for seed in range(24)
    ]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The grammars compiled so far."""
    texts: list[str] = []
    compile_ = grammar.GrammarTokenizer.compile

    def counted(self: grammar.GrammarTokenizer, text: str) -> LLMatcher:
        texts.append(text)
        return compile_(self, text)

    monkeypatch.setattr(grammar.GrammarTokenizer, "compile", counted)
    return texts


def limit_states(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    limits = LLParserLimits(max_lexer_states=number, verbose_errors=False)
    monkeypatch.setattr(grammar, "parser_limits", lambda: limits)


@pytest.fixture(params=["in flight", "inline"])
def engine(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    config = EngineConfig(
        checkpoint,
        dtype="float32",
        max_model_len=512,
        cache=CacheConfig(1 << 24),
        scheduler=SchedulerConfig(max_num_seqs=64),
    )
    model = load_model_config(checkpoint)
    executor: Executor = PipelinedRank(VOCAB_SIZE)
    if request.param == "inline":
        executor = InlineExecutor(config, model)
    engine = Engine(config, model, executor)
    engine.start()
    yield engine
    engine.shutdown()


def run(
    engine: Engine, requests: Sequence[EngineRequest]
) -> list[tuple[tuple[int, ...], FinishReason | None, str | None]]:
    """Run all requests at once; return the tokens, reason and error of each."""
    reader = ThreadReader()
    streams = [
        engine.submit(
            request,
            reader,
            None if request.constraint is None else engine.prepare(request.constraint).result(WAIT_S),
        )
        for request in requests
    ]
    tokens: dict[int, list[int]] = {stream.seq_id: [] for stream in streams}
    ends: dict[int, tuple[FinishReason, str | None]] = {}
    for stream, output in reader.read(streams):
        tokens[stream.seq_id] += output.token_ids
        if output.finish_reason is not None:
            ends[stream.seq_id] = output.finish_reason, output.error
            assert (output.error is None) == (stream.failure is None)
            assert stream.failure is None or isinstance(stream.failure, InvalidRequest)
    return [(tuple(tokens[stream.seq_id]), *ends[stream.seq_id]) for stream in streams]


@pytest.mark.parametrize("drafts", [True, False])
def test_texts_go_on_where_they_have_filled_the_lexer(
    engine: Engine,
    checkpoint: Path,
    requests: list[EngineRequest],
    compiled: list[str],
    monkeypatch: pytest.MonkeyPatch,
    drafts: bool,
) -> None:
    """The tokens are those of a lexer without a bound."""
    if not drafts:
        monkeypatch.setattr(GrammarSteps, "propose", lambda *arguments: ())
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    limit_states(monkeypatch, 200)
    found = run(engine, requests)
    assert {json.loads(tokenizer.decode(list(tokens))) for tokens, _, _ in found} <= set(NAMES)
    assert {(reason, error) for _, reason, error in found} == {("stop", None)}
    assert len(compiled) > 3
    assert len(set(compiled)) == 1
    num_compiled = len(compiled)
    assert [run(engine, [request]) for request in requests[:12]] == [[each] for each in found[:12]]
    assert len(compiled) - num_compiled < 8, "texts share a lexer"
    prepared = engine.prepare(requests[0].constraint).result(WAIT_S)  # type: ignore[arg-type]
    limit_states(monkeypatch, 50_000)
    assert engine._compiler.renew(prepared.grammars[0])
    assert run(engine, requests) == found


@pytest.mark.parametrize("engine", ["inline"], indirect=True)
def test_a_text_that_fills_a_lexer_alone_ends_its_request_alone(
    engine: Engine, requests: list[EngineRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_states(monkeypatch, 30)
    failed, went = run(engine, [requests[0], replace(requests[1], constraint=None)])
    assert failed[1:] == ("error", FULL + "30 >= 30")
    assert went[1] in ("length", "stop")


@pytest.mark.parametrize("engine", ["inline"], indirect=True)
def test_a_grammar_that_compiles_slowly_gets_a_fresh_lexer_for_later_texts(
    engine: Engine, requests: list[EngineRequest], compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step loop does not wait for the compilation."""
    monkeypatch.setattr(compiler, "MAX_RENEWAL_S", -1.0)
    limit_states(monkeypatch, 200)
    (prepared,) = {engine.prepare(request.constraint).result(WAIT_S) for request in requests}  # type: ignore[arg-type]
    full = prepared.grammars[0].matcher
    errors = {error for _, _, error in run(engine, requests)}
    assert FULL + "200 >= 200" in errors
    until(lambda: not prepared.grammars[0].is_renewed, WAIT_S)
    assert prepared.grammars[0].matcher is not full
    assert len(compiled) >= 2
    limit_states(monkeypatch, 50_000)
    assert [reason for _, reason, _ in run(engine, requests[:1])] == ["stop"]
