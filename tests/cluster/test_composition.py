"""Forms of answers, choices of tools, efforts and APIs in all pairs, from random weights, all at a
time with too little memory, and again while one of two engines dies: each answer has the form that
was asked for, and parses without a repair."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest

from cluster.fleet.client import EngineClient
from cluster.fleet.table import Replica
from cluster.generation import ChatDefaults
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.make_tokenizer import write_bpe_tokenizer
from cluster.harmony.parse import HarmonyParser
from cluster.rpc import inference_pb2 as pb
from cluster.rpc import inference_pb2_grpc
from tests.support.gateway import VOCAB_SIZE, Gateway, make_encoding, serving
from tests.support.tiny_model import TINY
from workers.config import CacheConfig, EngineConfig, SchedulerConfig
from workers.engine.server import EngineServer
from workers.model.make_checkpoint import write_checkpoint
from workers.private_folder import PrivateFolder
from workers.rpc.convert import EngineInfo

MAX_TOKENS = 110
MAX_REASONING_TOKENS = 14
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Rom"]},
        "days": {"type": "array", "items": {"type": "boolean"}},
    },
    "required": ["city"],
    "additionalProperties": False,
}
LARK = 'start: "yes" | "no" " "? "thanks"'
PATCH = r"[+-][a-z ]{1,9}"


def is_json(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


FORMS: dict[str, tuple[dict[str, Any], Callable[[str], object]]] = {
    "text": ({}, lambda text: True),
    "json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        is_json,
    ),
    "json_object": (
        {"response_format": {"type": "json_object"}},
        lambda text: isinstance(json.loads(text), dict),
    ),
    "json": ({"structured_outputs": {"json": SCHEMA}}, is_json),
    "regex": ({"structured_outputs": {"regex": PATCH}}, re.compile(PATCH).fullmatch),
    "choice": ({"structured_outputs": {"choice": ["red", "green"]}}, ["red", "green"].__contains__),
    "grammar": ({"structured_outputs": {"grammar": LARK}}, ["yes", "no thanks", "nothanks"].__contains__),
}
CHOICES = ("no tools", "none", "auto", "required", "named", "allowed", "several")
EFFORTS = ("none", "low", "limited")
FACTORS: tuple[tuple[str, ...], ...] = (tuple(FORMS), CHOICES, EFFORTS, ("whole", "stream"), ("http", "grpc"))
TOOLS = {
    "get": is_json,
    "look": lambda text: isinstance(json.loads(text), dict),
    "patch": re.compile(PATCH).fullmatch,
}


@dataclass(frozen=True)
class Cell:
    form: str
    choice: str
    effort: str
    stream: str
    api: str

    @property
    def pairs(self) -> set[tuple[int, str, int, str]]:
        values = (self.form, self.choice, self.effort, self.stream, self.api)
        return {(i, values[i], j, values[j]) for i, j in combinations(range(len(values)), 2)}


def all_pairs() -> list[Cell]:
    """Return cells in which each value of a factor meets each value of each other."""
    everything = [Cell(*values) for values in product(*FACTORS)]
    missing = set().union(*(cell.pairs for cell in everything))
    cells = []
    while missing:
        cell = max(everything, key=lambda cell: len(cell.pairs & missing))
        missing -= cell.pairs
        cells.append(cell)
    return cells


CELLS = all_pairs()


@dataclass
class Answer:
    """What a client has of one cell."""

    content: str
    reasoning: str
    calls: list[tuple[str, str]]
    finish: str
    token_ids: list[int]


class RealEngine:
    """An engine with random weights, and too little memory for all cells at a time."""

    async def start(self, checkpoint: Path, folder: Path, name: str) -> "RealEngine":
        self.server = EngineServer()
        config = EngineConfig(
            checkpoint,
            dtype="float32",
            cache=CacheConfig(memory_bytes=1 << 20),
            scheduler=SchedulerConfig(max_num_seqs=32),
        )
        self.address = await self.server.start(config, f"unix:{folder}/{name}")
        client = EngineClient()
        self._info = await client.info(Replica(name, self.address), 60)
        await client.close()
        return self

    def info(self) -> EngineInfo:
        return self._info

    def metric(self, name: str) -> float:
        return self.server.metrics.registry.get_sample_value(name) or 0.0


@pytest.fixture(scope="module")
def encoding(tmp_path_factory: pytest.TempPathFactory) -> HarmonyEncoding:
    return make_encoding(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def checkpoint(encoding: HarmonyEncoding, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random"
    config = replace(
        TINY, vocab_size=VOCAB_SIZE, max_context_len=4096, stop_token_ids=encoding.stop_token_ids
    )
    write_checkpoint(path, config, seed=3)
    write_bpe_tokenizer(path, VOCAB_SIZE)
    return path


@asynccontextmanager
async def engines(checkpoint: Path, count: int) -> AsyncIterator[list[RealEngine]]:
    folder = PrivateFolder()
    started = [await RealEngine().start(checkpoint, folder.path, f"e{index}") for index in range(count)]
    try:
        yield started
    finally:
        for engine in started:
            await engine.server.stop()
        folder.close()


def bias(encoding: HarmonyEncoding) -> dict[int, float]:
    """Return weights with which turns end."""
    control = (encoding.start, encoding.message, encoding.end, encoding.return_, encoding.call)
    punctuation = {i for text in ('"', "}", "]", '"}') for i in encoding.encode(text)}
    return dict.fromkeys((*control, *punctuation), 5.0)


def http_body(cell: Cell, seed: int, encoding: HarmonyEncoding) -> dict[str, Any]:
    function = {"type": "function", "function": {"name": "get", "parameters": SCHEMA, "strict": True}}
    plain = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
    pattern = {"type": "grammar", "grammar": {"syntax": "regex", "definition": PATCH}}
    custom = {"type": "custom", "custom": {"name": "patch", "format": pattern}}
    get = {"type": "function", "function": {"name": "get"}}
    choices: dict[str, Any] = {
        "named": get,
        "allowed": {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "required",
                "tools": [get, {"type": "custom", "custom": {"name": "patch"}}],
            },
        },
        "several": "required",
    }
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"hello {seed}"}],
        "max_tokens": MAX_TOKENS,
        "seed": seed,
        "logit_bias": {str(i): value for i, value in bias(encoding).items()},
        "return_token_ids": True,
        "harmony_constraint": "headers",
        "stream": cell.stream == "stream",
        **FORMS[cell.form][0],
    }
    if cell.choice != "no tools":
        body |= {"tools": [function, plain, custom], "tool_choice": choices.get(cell.choice, cell.choice)}
    if cell.choice == "several":
        body["max_parallel_tool_calls"] = 3
    if cell.effort == "limited":
        body["max_reasoning_tokens"] = MAX_REASONING_TOKENS
    else:
        body["reasoning_effort"] = cell.effort
    return body


def grpc_request(cell: Cell, seed: int, encoding: HarmonyEncoding) -> pb.ChatRequest:
    request = pb.ChatRequest(
        messages=[pb.Message(role=pb.ROLE_USER, content=f"hello {seed}")],
        max_tokens=MAX_TOKENS,
        seed=seed,
        logit_bias=bias(encoding),
        return_token_ids=True,
        harmony_constraint=pb.HARMONY_CONSTRAINT_HEADERS,
    )
    if cell.form == "json_schema":
        request.response_format.json_schema.CopyFrom(pb.JsonSchemaFormat(name="a", schema=json.dumps(SCHEMA)))
    elif cell.form == "json_object":
        request.response_format.json_object = True
    elif cell.form != "text":
        ((kind, value),) = FORMS[cell.form][0]["structured_outputs"].items()
        value = json.dumps(value) if kind == "json" else value
        request.structured_outputs.CopyFrom(pb.StructuredOutputs(**{kind: value}))
    if cell.choice != "no tools":
        for name in ("get", "look"):
            request.tools.add(name=name, strict=name == "get").parameters.update(SCHEMA)
        grammar = pb.ToolGrammar(syntax=pb.GRAMMAR_SYNTAX_REGEX, definition=PATCH)
        request.tools.add(name="patch", type=pb.TOOL_TYPE_CUSTOM, format=grammar)
        wanted = {"none": pb.TOOL_CHOICE_NONE, "auto": pb.TOOL_CHOICE_AUTO}
        request.tool_choice = wanted.get(cell.choice, pb.TOOL_CHOICE_REQUIRED)
        allowed = {"named": ["get"], "allowed": ["get", "patch"]}
        request.allowed_tools.extend(allowed.get(cell.choice, ()))
    if cell.choice == "several":
        request.max_parallel_tool_calls = 3
    if cell.effort == "limited":
        request.max_reasoning_tokens = MAX_REASONING_TOKENS
    else:
        request.reasoning_effort = (
            pb.REASONING_EFFORT_NONE if cell.effort == "none" else pb.REASONING_EFFORT_LOW
        )
    return request


async def over_http(gateway: Gateway, body: dict[str, Any]) -> Answer:
    if not body["stream"]:
        answer = await gateway.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        message = choice["message"]
        calls = [http_call(call) for call in message.get("tool_calls") or ()]
        reasoning = message.get("reasoning_content") or ""
        content = message["content"] or ""
        return Answer(content, reasoning, calls, choice["finish_reason"], choice["token_ids"])
    found = Answer("", "", [], "", [])
    async with gateway.http.stream("POST", "/v1/chat/completions", json=body) as lines:
        async for line in lines.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                delta = choice["delta"]
                found.content += delta.get("content") or ""
                found.reasoning += delta.get("reasoning_content") or ""
                found.finish = choice["finish_reason"] or found.finish
                found.token_ids += choice.get("token_ids") or []
                for call in delta.get("tool_calls") or ():
                    name, arguments = http_call(call)
                    add_call(found, call["index"], name, arguments)
    return found


def http_call(call: dict[str, Any]) -> tuple[str, str]:
    part = call.get("function") or call.get("custom") or {}
    return part.get("name") or "", part.get("arguments") or part.get("input") or ""


def add_call(found: Answer, index: int, name: str, arguments: str) -> None:
    if index == len(found.calls):
        found.calls.append(("", ""))
    found.calls[index] = found.calls[index][0] + name, found.calls[index][1] + arguments


async def over_grpc(
    stub: inference_pb2_grpc.InferenceStub, request: pb.ChatRequest, *, stream: bool
) -> Answer:
    finishes = {
        pb.FINISH_REASON_STOP: "stop",
        pb.FINISH_REASON_LENGTH: "length",
        pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
    }
    if not stream:
        (choice,) = (await stub.Chat(request)).choices
        calls = [(call.name, call.arguments) for call in choice.message.tool_calls]
        return Answer(
            choice.message.content,
            choice.message.reasoning,
            calls,
            finishes[choice.finish_reason],
            list(choice.token_ids),
        )
    found = Answer("", "", [], "", [])
    async for event in stub.ChatStream(request):
        found.token_ids += event.token_ids
        found.content += event.text.text
        found.reasoning += event.reasoning.text
        if event.WhichOneof("event") == "tool_call":
            add_call(found, event.tool_call.call_index, event.tool_call.name, event.tool_call.arguments)
        if event.WhichOneof("event") == "finish":
            found.finish = finishes[event.finish.reason]
    return found


async def answers_of(gateway: Gateway, encoding: HarmonyEncoding) -> list[Answer]:
    """Return the answers of all cells, asked for at once."""
    async with grpc.aio.insecure_channel(gateway.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        asked = [
            over_http(gateway, http_body(cell, seed, encoding))
            if cell.api == "http"
            else over_grpc(stub, grpc_request(cell, seed, encoding), stream=cell.stream == "stream")
            for seed, cell in enumerate(CELLS)
        ]
        return await asyncio.gather(*asked)


def check(cell: Cell, answer: Answer, encoding: HarmonyEncoding) -> None:
    names = {"no tools": (), "none": (), "named": ("get",), "allowed": ("get", "patch")}
    allowed = names.get(cell.choice, tuple(TOOLS))
    parser = HarmonyParser(encoding, list(TOOLS), several_calls=cell.choice == "several")
    for token_id in answer.token_ids:
        parser.push(token_id)
    parser.finish()
    assert not parser.repairs
    cut = answer.finish == "length"
    whole = answer.calls[:-1] if cut else answer.calls
    assert {name for name, _ in answer.calls} <= set(allowed)
    for name, arguments in whole:
        assert TOOLS[name](arguments), (name, arguments)
    assert len(answer.calls) <= (3 if cell.choice == "several" else 1)
    assert len(set(whole)) == len(whole)
    if cell.choice in ("required", "named", "allowed", "several"):
        assert cut or answer.calls
        assert cell.form == "text" or not answer.content
    if not answer.calls and not cut:
        assert FORMS[cell.form][1](answer.content), answer.content
    assert (answer.finish == "tool_calls") == (bool(answer.calls) and not cut)
    assert cell.effort != "none" or allowed or not answer.reasoning
    if cell.effort == "limited":
        assert parser.num_reasoning_tokens <= MAX_REASONING_TOKENS


async def kill(engine: RealEngine) -> None:
    """End the calls of an engine in the middle of its sequences."""
    before = engine.metric("cantata_engine_output_tokens_total")
    async with asyncio.timeout(120):
        while engine.metric("cantata_engine_output_tokens_total") < before + 200:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.005)
    assert engine.server._server is not None
    await engine.server._server.stop(0)


async def test_every_answer_has_the_form_that_was_asked_for(
    checkpoint: Path, encoding: HarmonyEncoding
) -> None:
    defaults = ChatDefaults(wrap_up="\n\nTime is up.")
    async with (
        engines(checkpoint, 2) as (first, second),
        serving(encoding, [first, second], defaults=defaults) as gateway,
    ):
        answers = await answers_of(gateway, encoding)
        ends: Counter[str] = Counter()
        for cell, answer in zip(CELLS, answers, strict=True):
            try:
                check(cell, answer, encoding)
            except Exception as error:
                raise AssertionError(f"{cell}: {answer}") from error
            ends[answer.finish] += 1
        preemptions = sum(engine.metric("cantata_engine_preemptions_total") for engine in (first, second))
        print(f"{len(CELLS)} cells: {dict(ends)}, {preemptions:.0f} preemptions")
        assert min(ends["stop"], ends["tool_calls"]) >= len(CELLS) / 5
        assert ends["length"] <= len(CELLS) / 3
        assert preemptions > 0
        assert max(len(answer.calls) for answer in answers) > 1

        again, _ = await asyncio.gather(answers_of(gateway, encoding), kill(first))
        resumed = gateway.service.metrics.resumptions._value.get()
        print(f"{resumed:.0f} sequences resumed")
        assert resumed > 0
        for cell, answer, before in zip(CELLS, again, answers, strict=True):
            assert answer == before, cell
