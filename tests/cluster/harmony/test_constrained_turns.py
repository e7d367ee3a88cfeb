"""Turns of a model with random weights, through a whole engine: with the constraint they need no
repair, and without it almost all do."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from cluster.harmony.automaton import TurnAutomata
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.parse import HarmonyParser
from cluster.harmony.turn_grammar import ToolBody, TurnGrammar
from tests.support.gateway import VOCAB_SIZE, make_encoding
from tests.support.tiny_model import TINY
from workers.constraint.automaton import NO_LIMITS, ConstraintLimits
from workers.constraint.codec import Constraint
from workers.engine.llm import LLM
from workers.engine.stream import ThreadReader
from workers.model.make_checkpoint import write_checkpoint
from workers.request import EngineOutput, EngineRequest, SamplingParams

NUM_TURNS = 170
WAIT_S = 60.0
NAMES = ("get", "get_weather", "mcp.server-1")
BODIES = tuple(map(ToolBody, NAMES))
GRAMMARS = {
    "no tools": TurnGrammar(),
    "auto": TurnGrammar(BODIES, "allowed"),
    "required": TurnGrammar(BODIES, "required"),
    "limited": TurnGrammar(BODIES, "allowed", wrap_up=" Time is up."),
}
LIMITS = {"limited": ConstraintLimits(max_counted_tokens=4, max_length=12)}


@pytest.fixture(scope="module")
def encoding(tmp_path_factory: pytest.TempPathFactory) -> HarmonyEncoding:
    return make_encoding(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def llm(encoding: HarmonyEncoding, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("models") / "random"
    write_checkpoint(
        path, replace(TINY, vocab_size=VOCAB_SIZE, stop_token_ids=encoding.stop_token_ids), seed=3
    )
    # Less memory than 64 sequences need: some are preempted and computed again.
    with LLM(path, dtype="float32", kv_cache_bytes=1 << 20, max_num_seqs=64) as llm:
        yield llm


def turns(
    llm: LLM, encoding: HarmonyEncoding, constraint: Constraint | None, limits: ConstraintLimits = NO_LIMITS
) -> list[EngineOutput]:
    """Return what the model writes after random prompts, at most 40 tokens each. Control tokens are
    made so likely that turns end."""
    control = (
        encoding.channel,
        encoding.message,
        encoding.end,
        encoding.return_,
        encoding.call,
        encoding.start,
    )
    sampling = SamplingParams(
        max_tokens=40,
        temperature=1.0,
        logit_bias=tuple((token_id, 6.0) for token_id in control),
        stop_token_ids=encoding.stop_token_ids,
    )
    reader = ThreadReader()
    prepared = None if constraint is None else llm.engine.prepare(constraint).result(WAIT_S)
    prompt = tuple(encoding.encode_with_special("<|start|>user<|message|>a<|end|><|start|>assistant"))
    streams = [
        llm.engine.submit(
            EngineRequest(
                str(seed),
                (seed % 200, *prompt),
                replace(sampling, seed=seed),
                constraint=constraint,
                constraint_limits=limits,
            ),
            reader,
            prepared,
        )
        for seed in range(NUM_TURNS)
    ]
    tokens: dict[int, list[int]] = {stream.seq_id: [] for stream in streams}
    last: dict[int, EngineOutput] = {}
    for stream, output in reader.read(streams):
        tokens[stream.seq_id] += output.token_ids
        last[stream.seq_id] = output
    return [replace(last[stream.seq_id], token_ids=tuple(tokens[stream.seq_id])) for stream in streams]


def parsed(encoding: HarmonyEncoding, output: EngineOutput, tools: tuple[str, ...]) -> HarmonyParser:
    parser = HarmonyParser(encoding, tools)
    for token_id in output.token_ids:
        parser.push(token_id)
    return parser


@pytest.mark.parametrize("name", GRAMMARS)
def test_constrained_turns_need_no_repair(llm: LLM, encoding: HarmonyEncoding, name: str) -> None:
    grammar = GRAMMARS[name]
    constraint = Constraint.of(TurnAutomata(encoding, VOCAB_SIZE).of(grammar))
    before = llm.engine.metrics.registry.get_sample_value("cantata_engine_preemptions_total") or 0
    ends: Counter[object] = Counter()
    limits = LIMITS.get(name, NO_LIMITS)
    max_reasoning = NUM_TURNS * 40
    if limits.max_counted_tokens is not None:
        max_reasoning = limits.max_counted_tokens + len(encoding.encode(grammar.wrap_up))
    for output in turns(llm, encoding, constraint, limits):
        parser = parsed(encoding, output, NAMES)
        in_header = parser.message is None and not parser.turn_over
        parser.finish()
        assert parser.repairs.total() == 0, (parser.repairs, output.token_ids)
        assert parser.num_reasoning_tokens <= max_reasoning
        assert parser.turn_over == (output.finish_reason == "stop")
        if output.finish_reason == "length":
            ends["length in a header" if in_header else "length in a body"] += 1
        else:
            ends[output.stop_token_id] += 1
    wanted = {"length in a header", "length in a body"}
    wanted |= {encoding.return_} if grammar.calls != "required" else set()
    wanted |= {encoding.call} if grammar.calls != "forbidden" else set()
    assert ends.keys() == wanted
    assert min(ends[end] for end in wanted if end != "length in a header" or name != "limited") >= 5, ends
    after = llm.engine.metrics.registry.get_sample_value("cantata_engine_preemptions_total") or 0
    assert after > before or name == "limited"  # whose turns are short


def test_the_same_turns_without_it_do(llm: LLM, encoding: HarmonyEncoding) -> None:
    repaired = sum(
        parsed(encoding, output, NAMES).repairs.total() > 0 for output in turns(llm, encoding, None)
    )
    assert repaired > NUM_TURNS * 0.9
