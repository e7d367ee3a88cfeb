"""Texts of grammars from random weights: whatever the model is, what it writes is a text of the
grammar, through LLM and the step loop, in every way in which a sequence can be computed."""

import json
import logging
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from cluster.harmony.encoding import HarmonyEncoding
from tests.support.grammars import (
    NUM_TOKENS,
    VOCAB_SIZE,
    schema_grammar,
    text_automaton,
    write_checkpoint_with_tokenizer,
)
from tests.support.tiny_model import TINY_BLOCK_BYTES
from workers.config import EngineConfig, GrammarConfig
from workers.constraint.codec import Constraint
from workers.constraint.compiler import GrammarCompiler, PreparedConstraint
from workers.constraint.grammar import GrammarTokenizer
from workers.constraint.tables import HostTables
from workers.engine import llm_constraints, server
from workers.engine.engine import Engine
from workers.engine.grammars import GrammarSteps
from workers.engine.llm import LLM, SamplingParams, StructuredOutputsParams
from workers.engine.masks import MaskThread
from workers.engine.stream import ThreadReader
from workers.errors import ConstraintNotReady, InvalidRequest
from workers.executor.inline import InlineExecutor
from workers.model_config import load_model_config
from workers.request import EngineOutput, EngineRequest
from workers.rpc.validate import check_request

WAIT_S = 60.0
SAMPLING = SamplingParams(max_tokens=300, temperature=1.0, seed=5)
LEAD = "The answer follows as an object.\n"
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["colour", "count", "flags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint_with_tokenizer(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, dtype="float32", max_num_seqs=64, kv_cache_bytes=1 << 24) as llm:
        yield llm


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


def run(engine: Engine, requests: Sequence[EngineRequest]) -> list[EngineOutput]:
    """Run all requests at once; return each stream's outputs joined."""
    reader = ThreadReader()
    streams = []
    for request in requests:
        prepared = None if request.constraint is None else engine.prepare(request.constraint).result(WAIT_S)
        streams.append(engine.submit(request, reader, prepared))
    parts: dict[int, list[EngineOutput]] = {stream.seq_id: [] for stream in streams}
    for stream, output in reader.read(streams):
        parts[stream.seq_id].append(output)
    return [
        replace(
            parts[stream.seq_id][-1],
            token_ids=tuple(token for part in parts[stream.seq_id] for token in part.token_ids),
            logprobs=tuple(entry for part in parts[stream.seq_id] for entry in part.logprobs),
        )
        for stream in streams
    ]


def random_schema(draw: random.Random, depth: int = 2) -> dict[str, object]:
    """Return a schema whose texts are finite, so that random weights end them."""
    kind = draw.choice(["enum", "integer", "boolean", "string", "array", "object"][: 6 if depth else 4])
    if kind == "enum":
        return {"enum": draw.sample(["red", "green", 'a "quote"', "ü", 7, None, True, 2.5], 3)}
    if kind == "integer":
        return {"type": "integer", "minimum": -5, "maximum": draw.randrange(200)}
    if kind == "string":
        return {"type": "string", "maxLength": draw.randrange(6)}
    if kind == "array":
        return {"type": "array", "items": random_schema(draw, depth - 1), "maxItems": 2, "minItems": 1}
    if kind == "object":
        names = draw.sample(["name", "an id", "Größe", "x"], 2)
        properties = {name: random_schema(draw, depth - 1) for name in names}
        required = names[: draw.randrange(3)]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    return {"type": "boolean"}


def test_random_schemas(llm: LLM, checkpoint: Path) -> None:
    draw = random.Random(3)
    schemas = [random_schema(draw) for _ in range(40)]
    automata = [text_automaton(checkpoint, schema_grammar(schema)) for schema in schemas]
    params = [replace(SAMPLING, seed=index, temperature=index % 3 / 2) for index in range(40)]
    outputs = llm.generate([[1, 2, 3]] * 40, params, constraints=automata, use_tqdm=False)
    num_ended = 0
    for schema, output in zip(schemas, (result.outputs[0] for result in outputs), strict=True):
        # Greedy digits may go on for ever, within max_tokens.
        if output.finish_reason == "stop":
            jsonschema.validate(json.loads(output.text), schema)
            num_ended += 1
    assert num_ended > 30


def test_several_texts_after_a_forced_one(llm: LLM, checkpoint: Path, tokenizer: Tokenizer) -> None:
    letters = LLMatcher.grammar_from_regex("[ab]{3}")
    automaton = text_automaton(checkpoint, letters, schema_grammar(SCHEMA), lead="Now")
    (output,) = llm.generate([[4]], SAMPLING, constraints=automaton, use_tqdm=False)[0].outputs
    text = tokenizer.decode(list(output.token_ids), skip_special_tokens=False)
    lead, _, rest = text.partition("<|end|>")
    assert lead.startswith("Now")
    assert len(lead) == 6
    assert set(lead[3:]) <= {"a", "b"}
    jsonschema.validate(json.loads(rest.removesuffix("<|return|>")), SCHEMA)


def requests_of(checkpoint: Path, num: int = 8) -> list[EngineRequest]:
    """Return requests that share prefixes, with a forced text of several tokens first."""
    constraint = Constraint.of(text_automaton(checkpoint, schema_grammar(SCHEMA), lead=LEAD))
    end = next(iter(constraint_ends(constraint)))
    return [
        EngineRequest(
            str(index),
            tuple(range(40 + index % 3)),
            SamplingParams(max_tokens=120, temperature=1.2, seed=index, logprobs=1, stop_token_ids=(end,)),
            constraint=constraint,
        )
        for index in range(num)
    ]


def constraint_ends(constraint: Constraint) -> tuple[int, ...]:
    tables = HostTables(constraint.body)
    (state,) = [state for state, grammar in enumerate(tables.grammar_of) if grammar is not None]
    return tables.ends[state]


def answers(outputs: Sequence[EngineOutput]) -> list[tuple[tuple[int, ...], str | None, list[float]]]:
    return [
        (output.token_ids, output.finish_reason, [round(entry.logprob, 4) for entry in output.logprobs])
        for output in outputs
    ]


def test_forced_tokens_save_steps_and_change_nothing(
    llm: LLM, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of(checkpoint)
    metrics = llm.engine.metrics.registry
    before = llm.engine.num_steps
    found = answers(run(llm.engine, requests))
    num_steps = llm.engine.num_steps - before
    right = metrics.get_sample_value("cantata_engine_accepted_draft_tokens_total") or 0
    assert right >= 8 * 5, "all that is forced in the text before the grammar but its first token"
    assert right <= (metrics.get_sample_value("cantata_engine_draft_tokens_total") or 0)
    monkeypatch.setattr(GrammarSteps, "propose", lambda *arguments: ())
    before = llm.engine.num_steps
    assert answers(run(llm.engine, requests)) == found
    assert num_steps + 5 <= llm.engine.num_steps - before
    assert {reason for _, reason, _ in found} <= {"stop", "length"}
    assert all(len(logprobs) == len(tokens) for tokens, _, logprobs in found)


def test_preempted_cached_or_resumed_gives_the_same(llm: LLM, checkpoint: Path, tokenizer: Tokenizer) -> None:
    requests = requests_of(checkpoint)
    expected = answers([run(llm.engine, [request])[0] for request in requests])
    for tokens, reason, _ in expected:
        if reason == "stop":
            text = tokenizer.decode(list(tokens)).removeprefix(LEAD)
            jsonschema.validate(json.loads(text), SCHEMA)
    assert sum(reason == "stop" for _, reason, _ in expected) >= 4
    # Blocks for two or three of the eight sequences.
    small = LLM(checkpoint, dtype="float32", max_model_len=180, kv_cache_bytes=44 * TINY_BLOCK_BYTES)
    with small as crowded:
        assert answers(run(crowded.engine, requests)) == expected
        assert (crowded.engine.metrics.registry.get_sample_value("cantata_engine_preemptions_total") or 0) > 0
    draw = random.Random(1)
    for request, (tokens, reason, logprobs) in zip(requests, expected, strict=True):
        num_known = draw.randrange(1, len(tokens) - 1)
        resumed = replace(request, output_token_ids=tokens[:num_known])
        ((rest, end, later),) = answers(run(llm.engine, [resumed]))
        assert (rest, end) == (tokens[num_known:], reason)
        assert later == logprobs[num_known:]


def test_a_text_that_cannot_go_on_ends_its_own_request_alone(
    llm: LLM, checkpoint: Path, tokenizer: Tokenizer
) -> None:
    good, bad = requests_of(checkpoint, 2)
    (expected,) = answers(run(llm.engine, [good]))
    prefix = run(llm.engine, [bad])[0].token_ids
    # Output of another engine that is no text of the grammar.
    start = len(tokenizer.encode(LEAD).ids)
    broken = replace(bad, output_token_ids=(*prefix[:start], 5, 5, 5))
    reader = ThreadReader()
    ready = llm.engine.prepare(bad.constraint).result(WAIT_S)  # type: ignore[arg-type]
    streams = [llm.engine.submit(request, reader, ready) for request in (broken, good)]
    tokens: list[int] = []
    for stream, output in reader.read(streams):
        if stream is streams[0]:
            assert output.finish_reason == "error"
            assert output.token_ids == ()
            assert output.error is not None
            assert output.error.startswith("the output's grammar failed: ")
            assert isinstance(stream.failure, InvalidRequest)
        else:
            tokens += output.token_ids
    assert tuple(tokens) == expected[0]
    failed = llm.engine.metrics.registry.get_sample_value("cantata_engine_failed_grammars_total")
    assert failed == 1


def test_an_abort_while_masks_are_computed(
    llm: LLM, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, gate = threading.Event(), threading.Event()
    compute = MaskThread._compute

    def slow(self: MaskThread, *arguments: object) -> object:
        entered.set()
        assert gate.wait(WAIT_S)
        return compute(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(MaskThread, "_compute", slow)
    first, second = requests_of(checkpoint, 2)
    reader = ThreadReader()
    ready = llm.engine.prepare(first.constraint).result(WAIT_S)  # type: ignore[arg-type]
    stream = llm.engine.submit(first, reader, ready)
    assert entered.wait(WAIT_S)
    llm.engine.abort(stream)
    gate.set()
    assert [output.finish_reason for _, output in reader.read([stream])][-1] == "abort"
    monkeypatch.undo()
    assert run(llm.engine, [second])[0].finish_reason in ("stop", "length")


def test_a_refused_grammar_names_the_reason_and_is_not_logged(
    llm: LLM, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    automaton = text_automaton(checkpoint, schema_grammar({"type": "object", "secret_word": 1, "allOf": 5}))
    with pytest.raises(InvalidRequest, match="the grammar was refused: ") as caught:
        llm.generate([[1]], SAMPLING, constraints=automaton, use_tqdm=False)
    assert caught.value.param == "constraints"
    assert "secret_word" not in caplog.text


def test_a_grammar_that_takes_long_to_compile_holds_up_no_other_stream(
    llm: LLM, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compilation does not end before 32 other streams have."""
    gate, entered = threading.Event(), threading.Event()
    compile_ = GrammarTokenizer.compile
    slow = schema_grammar({"type": "object", "title": "slow"})

    def patched(self: GrammarTokenizer, grammar: str) -> object:
        if grammar == slow:
            entered.set()
            assert gate.wait(WAIT_S)
        return compile_(self, grammar)

    monkeypatch.setattr(GrammarTokenizer, "compile", patched)
    constraint = Constraint.of(text_automaton(checkpoint, slow))
    waiting = llm.engine.prepare(constraint)
    again = llm.engine.prepare(constraint)
    assert entered.wait(WAIT_S)
    assert {output.finish_reason for output in run(llm.engine, requests_of(checkpoint, 32))} <= {
        "stop",
        "length",
    }
    assert not waiting.done()
    gate.set()
    assert isinstance(waiting.result(WAIT_S), PreparedConstraint)
    assert again is waiting, "compiled once for all that wait"


def test_a_grammar_is_compiled_once_whatever_the_automaton(checkpoint: Path) -> None:
    compiled: list[bool] = []
    compiler = GrammarCompiler(
        checkpoint, VOCAB_SIZE, GrammarConfig(), lambda seconds, succeeded: compiled.append(succeeded)
    )
    grammar = schema_grammar(SCHEMA)
    for lead in ("a", "b", "c"):
        compiler.prepare(Constraint.of(text_automaton(checkpoint, grammar, lead=lead))).result(WAIT_S)
    assert compiled == [True]
    compiler.close()


def test_a_failure_that_is_not_the_grammars_is_not_kept(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler(checkpoint, VOCAB_SIZE, GrammarConfig())
    constraint = Constraint.of(text_automaton(checkpoint, schema_grammar(SCHEMA)))

    def no_memory(*arguments: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(GrammarTokenizer, "compile", no_memory)
        with pytest.raises(MemoryError):
            compiler.prepare(constraint).result(WAIT_S)
    assert compiler.prepare(constraint).result(WAIT_S).grammars
    compiler.close()


def test_compiled_grammars_are_kept_within_the_bound(checkpoint: Path) -> None:
    compiler = GrammarCompiler(checkpoint, VOCAB_SIZE, GrammarConfig(cache_bytes=3 << 20))
    constraints = [
        Constraint.of(text_automaton(checkpoint, schema_grammar({"enum": [index]}))) for index in range(5)
    ]
    for constraint in constraints:
        compiler.prepare(constraint).result(WAIT_S)
    assert compiler._compiled.num_bytes <= 3 << 20
    assert len(compiler._compiled._kept) == 2
    compiler.close()


def test_a_grammar_that_names_special_tokens_gets_none(llm: LLM, checkpoint: Path) -> None:
    """Control tokens belong to the automaton alone."""
    lark = LLMatcher.grammar_from_lark('start: "a" (<|start|> "b")? "c"')
    automaton = text_automaton(checkpoint, lark)
    prepared = llm.engine.prepare(Constraint.of(automaton)).result(WAIT_S)
    assert set(prepared.tables.texts) == {0}
    plain = text_automaton(checkpoint, LLMatcher.grammar_from_lark('start: "a" "b"? "c"'))
    assert not llm.engine.prepare(Constraint.of(plain)).result(WAIT_S).tables.texts
    params = [replace(SAMPLING, seed=seed) for seed in range(20)]
    outputs = llm.generate([[1]] * 20, params, constraints=automaton, use_tqdm=False)
    assert {result.outputs[0].text for result in outputs} == {"ac"}


def test_token_texts_are_those_of_the_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """Neither special tokens nor ids without a token are text, nor the byte 0xFF, which no text in
    UTF-8 has; every other token has its bytes."""
    encoding = HarmonyEncoding.load(checkpoint, VOCAB_SIZE)
    grammar = GrammarTokenizer(checkpoint, VOCAB_SIZE)
    text = np.unpackbits(grammar.texts, bitorder="little")
    assert len(text) >= VOCAB_SIZE
    assert [i for i in range(len(text)) if text[i]] == [
        i for i in range(NUM_TOKENS) if b"\xff" not in (encoding.token_bytes(i) or b"\xff")
    ]
    for token_id in np.flatnonzero(text):
        assert grammar.tokenizer.decode_bytes([int(token_id)]) == encoding.token_bytes(int(token_id))


def test_the_tokenizer_is_loaded_beside_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    compiler = GrammarCompiler(checkpoint, VOCAB_SIZE, GrammarConfig())
    with compiler.loading():
        pass
    assert compiler.tokenizer is not None
    without = GrammarCompiler(tmp_path, VOCAB_SIZE, GrammarConfig())
    with without.loading():
        pass  # served without grammars
    assert without.tokenizer is None


@pytest.mark.parametrize("load", ["start", "first_use"])
def test_an_engine_loads_it_when_it_is_set_to(checkpoint: Path, load: Literal["start", "first_use"]) -> None:
    config = EngineConfig(checkpoint, dtype="float32", grammars=GrammarConfig(load=load))
    model = load_model_config(checkpoint)
    engine = Engine(config, model, InlineExecutor(config, model))
    try:
        engine.start()
        assert (engine._compiler.tokenizer is not None) == (load == "start")
    finally:
        engine.shutdown()


async def test_a_request_waits_for_its_grammar_for_a_bounded_time(
    llm: LLM, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over gRPC and offline; the compilation goes on for others."""
    never: Future[PreparedConstraint] = Future()
    monkeypatch.setattr(llm.engine._compiler, "prepare", lambda constraint: never)
    monkeypatch.setattr(server, "COMPILE_TIMEOUT_S", 0.01)
    monkeypatch.setattr(llm_constraints, "COMPILE_TIMEOUT_S", 0.01)
    servicer = server.EngineServicer.__new__(server.EngineServicer)
    servicer._engine = llm.engine
    (request,) = requests_of(checkpoint, 1)
    with pytest.raises(ConstraintNotReady, match="not ready within"):
        await servicer._prepared(request)
    assert not never.cancelled()
    automaton = text_automaton(checkpoint, schema_grammar(SCHEMA))
    with pytest.raises(ConstraintNotReady, match="not ready within"):
        llm.generate([[1]], SAMPLING, constraints=automaton, use_tqdm=False)
    assert await servicer._prepared(replace(request, constraint=None)) is None


FORMS: list[tuple[StructuredOutputsParams, Callable[[str], object]]] = [
    (StructuredOutputsParams(json=SCHEMA), lambda text: jsonschema.validate(json.loads(text), SCHEMA)),
    (StructuredOutputsParams(json='{"enum": [7, null]}'), lambda text: ("7", "null").index(text)),
    (StructuredOutputsParams(regex="[a-c]{2}"), lambda text: re.fullmatch("[a-c]{2}", text) or 1 / 0),
    (StructuredOutputsParams(choice=["yes", "no"]), lambda text: ("yes", "no").index(text)),
    (StructuredOutputsParams(grammar='start: "x" | "y"'), lambda text: ("x", "y").index(text)),
    (StructuredOutputsParams(json_object=True), lambda text: text.startswith("{") or 1 / 0),
]


def test_the_forms_of_sampling_parameters(llm: LLM) -> None:
    """One batch has them all, each twice, beside a prompt without one; as vLLM has them."""
    params = [replace(SAMPLING, structured_outputs=form, seed=3) for form, _ in FORMS]
    free, *answers = llm.generate([[1, 2, 3]] * 13, [SAMPLING, *params, *params], use_tqdm=False)
    assert free.outputs[0].token_ids
    for (form, check), *pair in zip(FORMS, answers[:6], answers[6:], strict=True):
        first, again = (output.outputs[0] for output in pair)
        check(first.text)
        assert first.finish_reason == "stop" or form.json_object, form
        assert again.token_ids == first.token_ids


def test_one_form_for_several_answers(llm: LLM) -> None:
    params = replace(SAMPLING, structured_outputs=StructuredOutputsParams(choice=["yes", "no"]), n=8)
    (result,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    assert {answer.text for answer in result.outputs} == {"yes", "no"}


@pytest.mark.parametrize(
    ("form", "param"),
    [
        (StructuredOutputsParams(), "structured_outputs"),
        (StructuredOutputsParams(regex="a", choice=["b"]), "structured_outputs"),
        (StructuredOutputsParams(json="{"), "structured_outputs.json"),
        (StructuredOutputsParams(json={"uniqueItems": True}), "structured_outputs.json"),
        (StructuredOutputsParams(regex="(?=a)"), "structured_outputs.regex"),
        (StructuredOutputsParams(choice=[]), "structured_outputs.choice"),
        (StructuredOutputsParams(grammar="start: unknown"), "structured_outputs.grammar"),
        ({"regex": "a"}, "structured_outputs"),
    ],
)  # fmt: skip
def test_forms_that_are_refused(llm: LLM, form: StructuredOutputsParams, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llm.generate([[1]], replace(SAMPLING, structured_outputs=form), use_tqdm=False)
    assert caught.value.param == param


def test_what_contradicts_a_form(llm: LLM, checkpoint: Path) -> None:
    form = replace(SAMPLING, structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(InvalidRequest) as caught:
        llm.generate([[1]], replace(form, ignore_eos=True), use_tqdm=False)
    assert caught.value.param == "ignore_eos"
    automaton = text_automaton(checkpoint, schema_grammar(SCHEMA))
    with pytest.raises(InvalidRequest, match="a prompt has a constraint and"):
        llm.generate([[1]], form, constraints=automaton, use_tqdm=False)
    with pytest.raises(InvalidRequest, match="is for LLM"):
        check_request(EngineRequest("a", (1,), form), VOCAB_SIZE)
