"""The OpenAPI document says what the server takes and answers: requests that schemathesis makes
from it are served, requests that break it are refused, answers have the form it gives.

The same requests in each run; few of them, since making them takes most of the time.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import jsonschema
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from cluster.assembly import connect
from cluster.fleet.client import EngineClient
from cluster.fleet.directory import ReplicaSet
from cluster.fleet.table import Replica
from cluster.frontend.app import build_app
from cluster.generation import ModelInfo, limits
from tests.support.gateway import VOCAB_SIZE, make_encoding
from workers.request import EngineOutput, EngineRequest, TokenLogprobs

MODEL = ModelInfo("m", 4096, VOCAB_SIZE)
USER = {"role": "user", "content": "Hello"}
PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/responses")
PATHS += ("/v1/responses/input_tokens", "/v1/messages", "/v1/messages/count_tokens")
CHUNKS = {
    "/v1/chat/completions": "ChatCompletionChunk",
    "/v1/completions": "TextCompletion",
    "/v1/responses": "ResponseEventBody",
    "/v1/messages": "MessageEvent",
}
CONTRADICTING = ("model", "stream_options", "top_logprobs", "min_tokens", "max_tokens")
CONTRADICTING += ("response_format", "structured_outputs", "tool_choice", "harmony_constraint", "ignore_eos")
CONTRADICTING += ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "parallel_tool_calls")
CONTRADICTING += ("previous_response_id", "conversation", "background", "max_output_tokens")
CONTRADICTING += ("thinking", "output_config", "output_format", "stop_sequences")
CONTRADICTING += ("max_completion_tokens", "tools", "best_of", "echo", "logit_bias", "n", "bad_words")
CONTRADICTING += ("stream", "continue_final_message", "add_generation_prompt", "prompt_logprobs")
CONTRADICTING += ("json_schema", "grammar")
RULES_BETWEEN_FIELDS = (
    "min_tokens .* is more than",
    "max_completion_tokens and max_tokens are the same limit and differ",
    "top_logprobs needs logprobs",
    "stream_options needs stream",
    "echo with logprobs needs n to be 1 in a stream|prompt_logprobs needs stream to be false",
    "prompt_logprobs asks for .* log-probabilities|add_generation_prompt|continue_final_message",
    "best_of is not offered: leave it out or set it to n",
    "n times the .* prompts must be",
    r"content is missing|content\[.*\] is reasoning, which only an assistant message has",
    "tool_call_id|tool message|tool_calls",
    "there is already a tool with the name",
    r"bad_words\[.*\] is part of the headers of messages",
    "requires a call, but tools has no|tools has no .* of that name|contradicts",
    "ask for different forms of the answer|must have exactly one of json",
    r"no earlier message has a call|already has a result|same id|call_id is missing",
    "(previous_response_id|conversation|background) needs stored|refers to a stored item",
    "input is missing|cannot be opened",
    # What a text is: a schema, a regular expression, a grammar.
    "cannot be enforced|is a text that is not JSON|must be a JSON schema|a text that is not empty",
    "special tokens cannot be part|this option is not supported",
    # What a block is: of which role, signed, the result of a call.
    r"blocks cannot be in|Invalid `|thinking\.signature|unexpected `tool_use_id`|`tool_use` ids must be",
    "the final `assistant` message must|tool_choice.name: Field|budget_tokens: Field",
    r"content\.\d+\.name must have",  # a pattern's blanks are not those of Python everywhere
    "logit_bias has token id",  # the names of a JSON object's fields have no range
)
"""Refusals that a schema of single fields cannot foresee."""


class Engines:
    """An EngineClient whose engines answer one token."""

    async def generate(self, replica: Replica, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        scored = request.sampling.prompt_logprobs is not None
        entries = (TokenLogprobs(-1.0),) * (len(request.prompt_token_ids) - 1 if scored else 0)
        yield EngineOutput((5,), finish_reason="length", prompt_logprobs=entries)

    async def close(self) -> None:
        pass


class Server:
    """The app on an event loop of its own."""

    def __init__(self, runner: asyncio.Runner, app: FastAPI) -> None:
        self._runner = runner
        self.app = app

    def post(self, path: str, content: bytes, media_type: str = "application/json") -> httpx.Response:
        async def post() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://t", verify=False) as client:
                return await client.post(path, content=content, headers={"content-type": media_type})

        return self._runner.run(post())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    async def build(folder: Path) -> Any:
        replicas = ReplicaSet()
        replicas.replace([Replica("a", "host:1")])
        return connect(MODEL, make_encoding(folder), replicas, cast(EngineClient, Engines()))

    with asyncio.Runner() as runner:
        gateway = runner.run(build(tmp_path_factory.mktemp("tokenizer")))
        yield Server(runner, build_app(gateway.service, gateway.status))
        runner.run(gateway.service.close())


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    return server.app.openapi()


def whole(value: Any) -> Any:
    """Return JSON with whole numbers written as integers: in lists of token ids 5.0 is refused, and
    a schema cannot tell it from 5."""
    if isinstance(value, dict):
        return {name: whole(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [whole(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_events(response: httpx.Response, document: dict[str, Any], chunk: str) -> None:
    """Check a stream's events; schemathesis would look for the schema of their envelopes."""
    schema = {"$ref": f"#/components/schemas/{chunk}", "components": document["components"]}
    validator = jsonschema.Draft202012Validator(schema)
    *events, rest = response.text.split("\n\n")
    assert rest == ""
    if chunk != "MessageEvent":
        assert events.pop() == "data: [DONE]"
    assert events
    for event in events:
        validator.validate(json.loads(event.partition("data: ")[2]))


def cases(
    document: dict[str, Any], path: str, mode: GenerationMode, check: Callable[[Case, Any], None], count: int
) -> None:
    """Call `check` with requests to the path, always the same ones."""
    operation = schemathesis.openapi.from_dict(document)[path]["POST"]

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Case) -> None:
        check(case, case.body)
        if mode is GenerationMode.POSITIVE:
            # Without the fields that contradict each other nearly always.
            body = {name: value for name, value in case.body.items() if name not in CONTRADICTING}
            if path.startswith("/v1/responses"):
                body["input"] = [USER]  # which is not required, since it may be stored
            body |= {"max_tokens": 16} if path == "/v1/messages" else {}
            check(case, {**body, "messages": [USER]} if body.get("messages") else body)

    run()


@pytest.mark.parametrize("path", PATHS)
def test_what_it_allows_is_served(server: Server, document: dict[str, Any], path: str) -> None:
    statuses = []

    def check(case: Case, body: Any) -> None:
        response = server.post(path, json.dumps(whole(body)).encode())
        statuses.append(response.status_code)
        if response.status_code == 400:
            error = response.json()["error"]
            assert error.get("code") == "context_length_exceeded" or any(
                re.search(rule, error["message"]) for rule in RULES_BETWEEN_FIELDS
            ), error
        else:
            assert response.status_code in (200, 404), response.text  # 404: another model's name
        if response.headers["content-type"].startswith("text/event-stream"):
            check_events(response, document, CHUNKS[path])
        else:
            case.validate_response(response, excluded_checks=[positive_data_acceptance])

    cases(document, path, GenerationMode.POSITIVE, check, 10)
    assert 200 in statuses


@pytest.mark.parametrize("path", PATHS)
def test_what_it_forbids_is_refused(server: Server, document: dict[str, Any], path: str) -> None:
    def check(case: Case, body: Any) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = server.post(path, content, case.media_type or "application/json")
        if path == "/tokenize" and isinstance(body, dict) and body.get("prompt") is not None:
            return  # the fields of chats are not looked at then
        assert 400 <= response.status_code < 500, response.text
        case.validate_response(response)

    cases(document, path, GenerationMode.NEGATIVE, check, 8)


CHAT: dict[str, Any] = {"messages": [USER]}
EDGES: list[tuple[str, str, Any, Any]] = [
    *(
        (path, name, edge, wrong)
        for name, (low, high) in {**limits.NUMBERS, **limits.INTEGERS}.items()
        for path in PATHS[:2]
        for edge, wrong in ((low, low - 1), (high, high + 1))
        if name not in ("logit_bias", "logprobs", "min_tokens", "priority", "seed")
    ),
    ("/v1/completions", "logprobs", 0, -1),
    ("/v1/completions", "logprobs", 20, 21),
    ("/v1/completions", "min_tokens", 0, -1),
    ("/v1/completions", "priority", -(2**63), -(2**63) - 1),
    ("/v1/completions", "seed", -(2**63), -(2**63) - 1),
    ("/v1/completions", "seed", 2**64 - 1, 2**64),
    ("/v1/completions", "max_tokens", 0, -1),
    ("/v1/chat/completions", "max_tokens", 1, 0),
    ("/v1/completions", "logit_bias", {"0": -100}, {"0": -100.5}),
    ("/v1/completions", "logit_bias", {"5": 100}, {"5": 101}),
    ("/v1/completions", "logit_bias", {"5": 1}, {"-5": 1}),
    ("/v1/completions", "stop", "x", ""),
    ("/v1/completions", "stop", ["x"] * 64, ["x"] * 65),
    ("/v1/completions", "stop", ["x" * 1024], ["x", ""]),
    ("/v1/completions", "stop", "x" * 1024, "x" * 1025),
    ("/v1/completions", "stop_token_ids", [0, VOCAB_SIZE - 1], [-1]),
    ("/v1/completions", "stop_token_ids", [5] * 128, [5] * 129),
    ("/v1/completions", "allowed_token_ids", [0], []),
    ("/v1/completions", "allowed_token_ids", [VOCAB_SIZE - 1], [VOCAB_SIZE]),
    ("/v1/completions", "bad_words", ["no"], [" "]),
    ("/v1/completions", "bad_words", ["no"] * 64, ["no"] * 65),
    ("/v1/completions", "truncate_prompt_tokens", -1, -2),
    ("/v1/completions", "truncate_prompt_tokens", 1, 0),
    ("/v1/completions", "cache_salt", "x", ""),
    ("/v1/completions", "cache_salt", "x" * 256, "x" * 257),
    ("/v1/completions", "suffix", "", "x"),
    ("/v1/completions", "prompt", "x", ""),
    ("/v1/completions", "prompt", ["x"], []),
    ("/v1/completions", "prompt", [[5]], [[]]),
    ("/v1/completions", "prompt", [0, VOCAB_SIZE - 1], [-1]),
    ("/v1/completions", "prompt", [[0]], [[VOCAB_SIZE]]),
    ("/v1/chat/completions", "messages", [USER], []),
    ("/v1/chat/completions", "tool_choice", "none", "sometimes"),
    *(
        ("/v1/chat/completions", name, edge, wrong)
        for name, (low, high) in limits.CHAT_INTEGERS.items()
        for edge, wrong in ((low, low - 1), (high, high + 1))
    ),
    ("/v1/chat/completions", "thinking_token_budget", -1, -2),
    ("/v1/chat/completions", "reasoning_effort", "max", "most"),
    ("/v1/chat/completions", "response_format", {"type": "json_object"}, {"type": "structural_tag"}),
    ("/v1/chat/completions", "functions", None, []),
    ("/v1/chat/completions", "chat_template_kwargs", {"current_date": "2026-01-02"}, {"current_date": "x"}),
    ("/v1/responses", "input", [USER], []),
    ("/v1/responses", "max_output_tokens", 1, 0),
    ("/v1/responses", "max_tool_calls", 1, 0),
    ("/v1/responses", "metadata", {"k" * 64: "v" * 512}, {"k" * 65: ""}),
    ("/v1/responses", "metadata", {str(n): "" for n in range(16)}, {str(n): "" for n in range(17)}),
    ("/v1/responses", "prompt", None, {"id": "x"}),
    ("/v1/responses", "reasoning", {"effort": "max", "max_tokens": 0}, {"effort": "most"}),
    ("/v1/responses", "temperature", 2, 2.1),
    ("/v1/responses", "top_logprobs", 20, 21),
    ("/tokenize", "prompt", "x", None),
    ("/detokenize", "tokens", [0, VOCAB_SIZE - 1], [-1]),
    ("/detokenize", "tokens", [], [VOCAB_SIZE]),
]
"""A path, a field of its body, a value that is taken, and one that is not."""


@pytest.mark.parametrize(("path", "name", "edge", "wrong"), EDGES)
def test_it_states_each_range(
    server: Server, document: dict[str, Any], path: str, name: str, edge: Any, wrong: Any
) -> None:
    reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = {**reference, "components": document["components"]}
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    rests = {
        "/v1/chat/completions": CHAT,
        "/v1/completions": {"prompt": "x"},
        "/v1/responses": {"input": "x"},
    }
    rest = rests.get(path, {})
    for value, is_taken in ((edge, True), (wrong, False)):
        body = {**rest, name: value}
        assert validator.is_valid(body) is is_taken, value
        response = server.post(path, json.dumps(body).encode())
        assert response.status_code == (200 if is_taken else 400), response.text


def test_a_body_to_tokenize_has_a_prompt_or_messages(server: Server, document: dict[str, Any]) -> None:
    schema = {"$ref": "#/components/schemas/TokenizeRequest", "components": document["components"]}
    for body, is_taken in (
        ({}, False),
        ({"prompt": "x", "messages": [USER]}, False),
        ({"prompt": "x", "messages": None}, True),
        ({"prompt": None, "messages": [USER]}, True),
    ):
        assert jsonschema.Draft202012Validator(schema).is_valid(body) is is_taken
        assert server.post("/tokenize", json.dumps(body).encode()).status_code == (200 if is_taken else 400)
