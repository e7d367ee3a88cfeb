"""Random bodies of requests: whatever is in them, no library's exception becomes an answer 500."""

import asyncio
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import orjson
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.assembly import Gateway, connect
from cluster.fleet.client import EngineClient
from cluster.fleet.directory import ReplicaSet
from cluster.frontend.app import build_app
from cluster.frontend.grpc_api import InferenceApi
from cluster.generation import GenerationService, ModelInfo
from cluster.rpc import inference_pb2 as pb
from tests.support.gateway import VOCAB_SIZE, make_encoding
from workers.errors import CantataError
from workers.rpc.convert import error_to_metadata

CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}], "name": "anna"},
        {
            "role": "assistant",
            "reasoning": "Hm.",
            "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "3"},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "A tool.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "a": {
                            "type": "string",
                            "enum": ["x"],
                            "pattern": "^x$",
                            "default": "x",
                            "examples": ["x"],
                            "title": "A",
                        },
                        "b": {
                            "oneOf": [
                                {"type": "integer", "default": 3},
                                {"type": ["null", "array"], "items": {"type": "number"}},
                            ]
                        },
                    },
                    "patternProperties": {"^z": {"nullable": True}},
                    "required": ["a"],
                },
            },
        }
    ],
    "temperature": 1.0,
    "max_tokens": 5,
    "logit_bias": {"5": 1.0},
    "stop": ["a"],
    "stop_token_ids": [5],
    "seed": 1,
    "chat_template_kwargs": {"current_date": "2026-01-02", "model_identity": "I", "reasoning_effort": "low"},
    "stream_options": {"include_usage": True},
    "stream": True,
}
COMPLETION: dict[str, Any] = {
    "prompt": ["<|start|>a", "b"],
    "logprobs": 1,
    "echo": False,
    "n": 2,
    "min_tokens": 1,
    "max_tokens": 3,
}
ODD_TEXTS = [
    "",
    "\0",
    "\n",
    "ü" * 300,
    "<|end|>",
    "a{99999999999999999999}",
    "(" * 3000,
    "\u2028",
    "9" * 5000,
    "2026-W01-1",
    " " * 3000,
]
ODD_NUMBERS = [0, -1, 2**31, 2**63, 2**64 - 1, -(2**63), 1e308, -0.0, 1e-320]
TEXTS = st.sampled_from(ODD_TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(ODD_NUMBERS)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, entry in entries:
        yield from places(entry, (*path, key))


@st.composite
def changed(draw: st.DrawFn, body: dict[str, Any]) -> dict[str, Any]:
    """Return the body with other JSON in one to three places, or under a new name."""
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(list(places(body))))
        node = body
        for part in parents:
            node = node[part]
        new = draw(JSON)
        if isinstance(node, dict) and draw(st.booleans()):
            node[draw(TEXTS)] = new
        else:
            node[last] = new
    return body


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def gateway(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Yield a gateway without engines: a correct request gets 503."""

    async def build(folder: Path) -> Gateway:
        model = ModelInfo("m", 1024, VOCAB_SIZE)
        return connect(model, make_encoding(folder), ReplicaSet(), EngineClient())

    gateway = runner.run(build(tmp_path_factory.mktemp("tokenizer")))
    yield gateway
    runner.run(gateway.service.close())


@pytest.fixture(scope="module")
def service(gateway: Gateway) -> GenerationService:
    return gateway.service


@pytest.fixture(scope="module")
def app(gateway: Gateway) -> FastAPI:
    return build_app(gateway.service, gateway.status)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    request=st.tuples(st.just("/v1/chat/completions"), changed(CHAT))
    | st.tuples(st.just("/v1/completions"), changed(COMPLETION))
    | st.tuples(st.just("/tokenize"), changed({"messages": CHAT["messages"], "tools": CHAT["tools"]}))
)
def test_http(runner: asyncio.Runner, app: FastAPI, request: tuple[str, dict[str, Any]]) -> None:
    path, body = request

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://t", verify=False) as client:
            return await client.post(
                path, content=orjson.dumps(body), headers={"content-type": "application/json"}
            )

    response = runner.run(post())
    assert response.status_code in (200, 400, 404, 503), (body, response.text)
    if response.status_code == 400:
        error = response.json()["error"]
        assert error["param"] or "Unknown field" in error["message"], error
        assert len(response.content) < 3000


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=changed(CHAT["tools"][0]["function"]["parameters"]), text=TEXTS, name=TEXTS, call_id=TEXTS)
def test_grpc(
    runner: asyncio.Runner,
    service: GenerationService,
    schema: dict[str, Any],
    text: str,
    name: str,
    call_id: str,
) -> None:
    request = pb.ChatRequest(
        messages=[pb.Message(role=pb.ROLE_USER, content=text)], tools=[pb.Tool(name="f", description=text)]
    )
    request.messages.add(role=pb.ROLE_ASSISTANT).tool_calls.add(id="c", name=name, arguments=text)
    request.messages.add(role=pb.ROLE_TOOL, tool_call_id=call_id, content=text)
    request.tools[0].parameters.update(schema)
    with pytest.raises(CantataError) as caught:
        runner.run(InferenceApi(service, 100).chat(request))
    assert caught.value.status in ("INVALID_ARGUMENT", "UNAVAILABLE")
    for _, value in error_to_metadata(caught.value):
        assert value.isascii()
        assert value.isprintable()


def test_a_long_id_of_a_client_comes_back_cut(runner: asyncio.Runner, service: GenerationService) -> None:
    """gRPC sends a status within 8 KiB, or the client sees another error."""
    message = pb.Message(role=pb.ROLE_TOOL, tool_call_id="i" * 100_000, content="x")
    with pytest.raises(CantataError) as caught:
        runner.run(InferenceApi(service, 100).chat(pb.ChatRequest(messages=[message])))
    assert len(caught.value.message) < 1100
    assert grpc.StatusCode[caught.value.status] is grpc.StatusCode.INVALID_ARGUMENT
