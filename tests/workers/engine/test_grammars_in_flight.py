"""Grammars with two plans in flight: the masks of a plan depend on the result of the one before."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jsonschema
import pytest
from tokenizers import Tokenizer

from tests.support.grammars import (
    VOCAB_SIZE,
    PipelinedRank,
    schema_grammar,
    text_automaton,
    write_checkpoint_with_tokenizer,
)
from workers.config import EngineConfig, GrammarConfig, SchedulerConfig
from workers.constraint.codec import Constraint
from workers.engine.engine import Engine
from workers.engine.grammars import GrammarSteps
from workers.engine.masks import MaskThread
from workers.engine.stream import ThreadReader
from workers.model_config import load_model_config
from workers.request import EngineRequest, SamplingParams

LEAD = "Seven tokens or more are forced here.\n"
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}, "flag": {"type": "boolean"}},
    "required": ["count", "flag"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint_with_tokenizer(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def running(checkpoint: Path) -> Iterator[tuple[Engine, PipelinedRank]]:
    rank = PipelinedRank(VOCAB_SIZE)
    config = EngineConfig(checkpoint, max_model_len=512, scheduler=SchedulerConfig(max_num_seqs=64))
    engine = Engine(config, load_model_config(checkpoint), rank, check_integrity=True)
    engine.start()
    yield engine, rank
    engine.shutdown()


def generate(engine: Engine, requests: list[EngineRequest]) -> list[tuple[int, ...]]:
    reader = ThreadReader()
    streams = []
    for request in requests:
        prepared = None if request.constraint is None else engine.prepare(request.constraint).result(60)
        streams.append(engine.submit(request, reader, prepared))
    tokens: dict[int, list[int]] = {stream.seq_id: [] for stream in streams}
    for stream, output in reader.read(streams):
        assert output.error is None
        tokens[stream.seq_id] += output.token_ids
    return [tuple(tokens[stream.seq_id]) for stream in streams]


def test_texts_with_drafts_and_without_beside_free_ones(
    running: tuple[Engine, PipelinedRank], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, rank = running
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    grammars = [schema_grammar(SCHEMA)] * 2
    constraint = Constraint.of(text_automaton(checkpoint, *grammars, lead=LEAD))
    over = tokenizer.token_to_id("<|return|>")
    sampling = SamplingParams(max_tokens=150, seed=0, stop_token_ids=(over,))
    requests = [
        EngineRequest(str(index), (7, index), sampling, constraint=constraint if index % 3 else None)
        for index in range(12)
    ]
    found = generate(engine, requests)
    assert rank.most_in_flight == 2
    assert rank.num_masked > 8 * 10
    right = engine.metrics.registry.get_sample_value("cantata_engine_accepted_draft_tokens_total")
    assert (right or 0) >= 8 * 5
    for request, tokens in zip(requests, found, strict=True):
        text = tokenizer.decode(list(tokens), skip_special_tokens=False)
        if request.constraint is not None and text.endswith("<|return|>"):
            first, _, second = text.removeprefix(LEAD).removesuffix("<|return|>").partition("<|end|>")
            jsonschema.validate(json.loads(first), SCHEMA)
            jsonschema.validate(json.loads(second), SCHEMA)
    assert sum(tokens[-1] == over for tokens in found) >= 8
    monkeypatch.setattr(GrammarSteps, "propose", lambda *arguments: ())
    assert generate(engine, requests) == found
    for cut in (1, 5, 20):
        longer = [pair for pair in zip(requests, found, strict=True) if len(pair[1]) > cut]
        resumed = [replace(request, output_token_ids=tokens[:cut]) for request, tokens in longer]
        assert generate(engine, resumed) == [tokens[cut:] for _, tokens in longer]


def test_masks_that_fail_end_the_engine_by_name(
    running: tuple[Engine, PipelinedRank], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect in computing them, as no text's own failure is one."""
    engine, _ = running

    def broken(*arguments: object) -> object:
        raise ValueError("secret")

    monkeypatch.setattr(MaskThread, "_compute", broken)
    constraint = Constraint.of(text_automaton(checkpoint, schema_grammar(SCHEMA)))
    reader = ThreadReader()
    request = EngineRequest("0", (1,), SamplingParams(max_tokens=9, seed=0), constraint=constraint)
    stream = engine.submit(request, reader, engine.prepare(constraint).result(60))
    (output,) = [output for _, output in reader.read([stream])]
    assert output.finish_reason == "error"
    assert output.error == "the masks of step 0 failed (ValueError); the engine's log has the details"


@pytest.mark.parametrize(("load", "words"), [("start", "about 2 MiB"), ("first_use", "when first used")])
def test_the_tokenizer_is_loaded_when_the_setting_says(
    checkpoint: Path, load: Literal["start", "first_use"], words: str
) -> None:
    config = EngineConfig(checkpoint, max_model_len=512, grammars=GrammarConfig(load, num_threads=3))
    engine = Engine(config, load_model_config(checkpoint), PipelinedRank(VOCAB_SIZE))
    engine.start()
    assert (engine._compiler.tokenizer is not None) == (load == "start")
    assert engine.grammars.startswith("3 threads; tokenizer loaded")
    assert words in engine.grammars
    constraint = Constraint.of(text_automaton(checkpoint, schema_grammar(SCHEMA)))
    engine.prepare(constraint).result(60)
    tokenizer = engine._compiler.tokenizer
    assert tokenizer is not None
    assert engine._compiler.load() is tokenizer, "there is one"
    engine.shutdown()
