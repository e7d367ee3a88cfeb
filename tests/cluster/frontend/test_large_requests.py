"""Large requests: refused before their text is encoded, by one measure for all of its parts; worked
on beside the event loop."""

import asyncio
import contextlib
import json
import threading
import tracemalloc
from dataclasses import replace
from typing import Any

import grpc.aio
import orjson
import pytest

from cluster.config import GatewayConfig
from cluster.frontend import body, chat, grpc_api
from cluster.frontend.grpc_size import UNCHECKED_BYTES, check_size
from cluster.generation import Prompts
from cluster.generation.threads import INLINE_CHARS, LARGE_CHARS
from cluster.harmony.encoding import HarmonyEncoding
from cluster.rpc import inference_pb2 as pb
from cluster.rpc import inference_pb2_grpc
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import Gateway, serving
from workers.errors import ContextLengthExceeded, InvalidRequest
from workers.grammars import gbnf

LIMIT_S = 60
USER = {"role": "user", "content": "Hello"}
LONG = "word " * 1_000_000


def call(arguments: str) -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": arguments}}],
    }


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


PARTS: dict[str, dict[str, Any]] = {
    "content": {"messages": [{"role": "user", "content": LONG}]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG[:500_000]}] * 10}]},
    "instructions": {"messages": [{"role": "system", "content": LONG}, USER]},
    "reasoning": {
        "messages": [USER, {"role": "assistant", "reasoning": LONG, "tool_calls": call("{}")["tool_calls"]}]
    },
    "arguments": {"messages": [USER, call(LONG)]},
    "result": {"messages": [USER, call("{}"), {"role": "tool", "tool_call_id": "c", "content": LONG}]},
    "description": {"messages": [USER], "tools": [tool(description=LONG)]},
    "parameters": {
        "messages": [USER],
        "tools": [
            tool(parameters={"type": "object", "properties": {"a": {"type": "string", "description": LONG}}})
        ],
    },
    "many-messages": {"messages": [{"role": "user", "content": LONG[:10_000]}] * 500},
}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of characters of each text that is encoded."""
    lengths: list[int] = []
    encode = HarmonyEncoding._encode_chunk

    def spy(self: HarmonyEncoding, text: str) -> list[int]:
        lengths.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(HarmonyEncoding, "_encode_chunk", spy)
    return lengths


async def post(gateway: Gateway, content: dict[str, Any]) -> dict[str, Any] | None:
    """Return the error in the answer; None if there is none."""
    response = await gateway.http.post(
        "/v1/chat/completions", content=orjson.dumps(content), headers={"content-type": "application/json"}
    )
    return response.json().get("error")


@pytest.mark.parametrize("part", PARTS)
async def test_text_that_cannot_fit_is_not_encoded(gateway: Gateway, encoded: list[int], part: str) -> None:
    error = await post(gateway, PARTS[part])
    assert error is not None
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert sum(encoded) == 0


async def test_encoding_stops_where_the_context_ends(
    gateway: Gateway, encoded: list[int], encoding: HarmonyEncoding
) -> None:
    """Texts that might fit by their characters: here no message is long, and all of them are."""
    words = " ".join(map(str, range(300)))
    error = await post(gateway, {"messages": [{"role": "user", "content": words}] * 13})
    assert error is not None
    assert error["code"] == "context_length_exceeded"
    num_tokens = len(encoding.encode(words))
    assert 13 * len(words) < 1024 * encoding.max_token_bytes, "it must not be refused by its characters"
    assert sum(encoded) < (1024 / num_tokens + 2) * len(words) + 2000


async def test_what_fits_is_never_refused_by_its_characters(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    """A prompt of the longest tokens there are, with as many of them as the context takes."""
    texts = [
        encoding.token_bytes(token_id).decode(errors="ignore") for token_id in range(encoding.vocab_size)
    ]
    longest = max((text for text in texts if len(encoding.encode(text * 9)) == 9), key=len)
    assert len(longest) > 8
    sent = await gateway.http.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": longest}]}
    )
    assert sent.status_code == 200
    frame = len(engine.requests[-1].prompt_token_ids) - 1
    for count, fits in ((1023 - frame, True), (1024 - frame, False)):
        text = longest * count
        assert len(encoding.encode(text)) == count
        error = await post(gateway, {"messages": [{"role": "user", "content": text}], "max_tokens": 1})
        assert (error is None) == fits, error
    # Reasoning before the last answer is not in the prompt, however long.
    history = [USER, {"role": "assistant", "content": "Hi", "reasoning": LONG}, USER]
    assert await post(gateway, {"messages": history}) is None


async def test_a_large_chat_holds_up_no_small_one(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, begun = threading.Event(), threading.Event()
    render = Prompts._fitting

    def slow(self: Prompts, request: Any, begins_answer: bool) -> list[int]:
        if any(len(message.content) > LARGE_CHARS for message in request.messages):
            begun.set()
            gate.wait(LIMIT_S)
        return render(self, request, begins_answer)

    monkeypatch.setattr(Prompts, "_fitting", slow)
    large = {"messages": [USER, {"role": "assistant", "content": "x", "reasoning": LONG}, USER]}
    waiting = [asyncio.create_task(post(gateway, large)) for _ in range(4)]
    try:
        async with asyncio.timeout(LIMIT_S):
            await asyncio.to_thread(begun.wait, LIMIT_S)
            for reasoning in ("", "x" * 100_000):  # on the loop, and in a thread
                small = [USER, {"role": "assistant", "content": "x", "reasoning": reasoning}, USER]
                assert await post(gateway, {"messages": small}) is None
        assert not any(task.done() for task in waiting)
    finally:
        gate.set()
    assert await asyncio.gather(*waiting) == [None] * 4


async def test_many_messages_are_read_and_rendered_beside_the_loop(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop stays free however little text the messages have."""
    seen: dict[str, threading.Thread] = {}
    convert, render = chat.chat_messages, Prompts._fitting

    def spied_convert(messages: Any) -> Any:
        seen["convert"] = threading.current_thread()
        return convert(messages)

    def spied_render(self: Prompts, request: Any, begins_answer: bool) -> list[int]:
        seen["render"] = threading.current_thread()
        return render(self, request, begins_answer)

    monkeypatch.setattr(chat, "chat_messages", spied_convert)
    monkeypatch.setattr(Prompts, "_fitting", spied_render)
    gateway.service.served.info = replace(gateway.service.served.info, max_model_len=10**6)
    await post(gateway, {"messages": [{"role": "user", "content": ""}] * 5000})
    assert set(seen) == {"convert", "render"}
    assert threading.main_thread() not in seen.values()


@pytest.mark.parametrize("where", ["content", "reasoning", "arguments", "description", "schema"])
async def test_each_long_text_is_rendered_beside_the_loop(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """One that alone makes the request larger than what the loop renders itself."""
    text = "x" * (INLINE_CHARS + 1)
    chats: dict[str, list[dict[str, Any]]] = {
        "content": [{"role": "user", "content": text}],
        "reasoning": [{"role": "assistant", "content": "x", "reasoning": text}, USER],
        "arguments": [
            USER,
            call(json.dumps({"a": text})),
            {"role": "tool", "tool_call_id": "c", "content": "1"},
        ],
    }
    tools = {
        "description": tool(description=text),
        "schema": tool(parameters={"type": "object", "description": text}),
    }
    seen: list[threading.Thread] = []
    render = Prompts._fitting

    def spied(self: Prompts, request: Any, begins_answer: bool) -> list[int]:
        seen.append(threading.current_thread())
        return render(self, request, begins_answer)

    monkeypatch.setattr(Prompts, "_fitting", spied)
    gateway.service.served.info = replace(gateway.service.served.info, max_model_len=10**6)
    content: dict[str, Any] = {"messages": chats.get(where, [USER])}
    if where in tools:
        content["tools"] = [tools[where]]
    await post(gateway, content)
    assert len(seen) == 1
    assert seen[0] is not threading.main_thread()


async def test_messages_have_a_largest_number(
    encoding: HarmonyEncoding, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before they are looked at one by one."""
    part = {"type": "text", "text": ""}
    async with serving(encoding, [engine], config=GatewayConfig(max_messages=10)) as gateway:
        for messages in (
            [USER] * 10,
            [USER, {"role": "user", "content": [part] * 8}],
            [USER] * 8 + [call("{}")],
        ):
            assert await post(gateway, {"messages": messages}) is None
        monkeypatch.setattr(body, "check", None)
        for messages in (
            [USER] * 11,
            [USER, {"role": "user", "content": [part] * 9}],
            [USER] * 9 + [call("{}")],
        ):
            error = await post(gateway, {"messages": messages})
            assert error is not None
            assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
            assert "11 entries" in error["message"]
            assert "gateway.max_messages" in error["message"]
        async with grpc.aio.insecure_channel(gateway.grpc_address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            hello = pb.Message(role=pb.ROLE_USER, content="x")
            assert (await stub.Chat(pb.ChatRequest(messages=[hello] * 10))).choices
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Chat(pb.ChatRequest(messages=[hello] * 11))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "11 entries" in (caught.value.details() or "")
    assert GatewayConfig().max_messages == 10_000


@pytest.mark.parametrize(
    ("field", "setting"),
    [
        (b"\x12\x00", "max_messages"),  # an empty message
        (b"\x12\x02\x22\x00", "max_messages"),  # one with an empty call
        (b"\x1a\x00", "max_json_values"),  # an empty tool
        (b"\x7a\x00", "max_json_values"),  # an empty stop string
        (b"\x48\x01", "max_json_values"),  # top_k
        (b"\x1a\x04\x1a\x02\x0a\x00", "max_json_values"),  # a tool with an entry in its schema
        (b"\xfa\x01\x00", "max_json_values"),  # unknown
    ],
)
async def test_grpc_messages_have_a_largest_number_of_fields(
    encoding: HarmonyEncoding,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    field: bytes,
    setting: str,
) -> None:
    """Counted before they are parsed, which takes hundreds of bytes for each."""
    monkeypatch.setattr(grpc_api, "decoded", None)
    config = GatewayConfig(max_messages=1000, max_json_values=5000)
    async with (
        serving(encoding, [engine], config=config) as gateway,
        grpc.aio.insecure_channel(gateway.grpc_address) as channel,
    ):
        data = field * UNCHECKED_BYTES
        whole = channel.unary_unary("/cantata.inference.v1.Inference/Chat")(data)
        stream = channel.unary_stream("/cantata.inference.v1.Inference/ChatStream")(data)
        for answer in (whole, stream):
            assert await answer.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert f"(gateway.{setting})" in await answer.details()


def test_large_grpc_messages_within_the_bounds_pass() -> None:
    text = "x" * UNCHECKED_BYTES
    request = pb.ChatRequest(
        messages=[pb.Message(role=pb.ROLE_USER, content=text, tool_calls=[pb.ToolCall(arguments="{}")])] * 5,
        temperature=0.5,
        stop_token_ids=range(1000),
    )
    data = request.SerializeToString()
    # 10 top-level fields at most, and 5 in each message with its call
    check_size(data, max_messages=10, max_fields=32)
    with pytest.raises(ContextLengthExceeded):
        check_size(data, max_messages=9, max_fields=32)
    with pytest.raises(ContextLengthExceeded):
        check_size(data, max_messages=10, max_fields=20)
    for broken in (data + b"\x12", data[:-3], data + b"\xff" * 12, data + b"\x0b", data + b"\x12\xff\x7f"):
        check_size(broken, max_messages=11, max_fields=32)


def test_an_unknown_group_hides_no_messages() -> None:
    """A parser skips a group that it does not know, and goes on with what follows."""
    message = pb.ChatRequest(messages=[pb.Message(content="x" * UNCHECKED_BYTES)] * 3).SerializeToString()
    for group in (b"\xa3\x06\xa4\x06", b"\xa3\x06\x08\x01\xa4\x06"):
        data = group + message
        assert len(pb.ChatRequest.FromString(data).messages) == 3
        check_size(data, max_messages=3, max_fields=20)
        with pytest.raises(ContextLengthExceeded):
            check_size(data, max_messages=2, max_fields=20)


async def test_bodies_have_a_largest_number_of_values(
    encoding: HarmonyEncoding, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted before they are parsed, which would keep all other requests waiting."""
    async with serving(encoding, [engine], config=GatewayConfig(max_json_values=1000)) as gateway:
        # Of the other braces, brackets and commas of this body there are few.
        assert await post(gateway, {"messages": [{"role": "user", "content": "," * 950}]}) is None
        monkeypatch.setattr(body, "decode", None)
        for content in ("," * 1000, [{}] * 500, [[]] * 500, [0] * 1000, dict.fromkeys(map(str, range(1000)))):
            error = await post(gateway, {"messages": [{"role": "user", "content": content}]})
            assert error is not None
            assert error["code"] == "context_length_exceeded"
            assert "this server takes 1000 (gateway.max_json_values)" in error["message"]


def test_the_longest_chat_of_tiny_tool_calls_is_within_the_default() -> None:
    """The chat has the maximum number of messages, and texts of JSON with a brace, bracket or comma
    for each of 131072 tokens."""
    config = GatewayConfig()
    turn = [call("{}"), {"role": "tool", "tool_call_id": "c", "content": "1"}]
    messages: list[dict[str, Any]] = turn * (config.max_messages // 3) + [
        {"role": "user", "content": "[{}]," * 32_768}
    ]
    data = orjson.dumps({"model": "m", "messages": messages})
    assert sum(data.count(mark) for mark in (b"{", b"[", b",")) < 0.8 * config.max_json_values
    body.check_num_values(data, config.max_json_values)


async def test_large_fields_that_are_objects_are_bounded_as_well(gateway: Gateway) -> None:
    error = await post(
        gateway, {"messages": [USER], "logit_bias": dict.fromkeys(map(str, range(100_000)), 1)}
    )
    assert error is not None
    assert (error["code"], error["param"]) == ("context_length_exceeded", "logit_bias")


async def test_a_long_schema_over_grpc_is_rendered_beside_the_loop(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    render = Prompts._fitting

    def spied(self: Prompts, request: Any, begins_answer: bool) -> list[int]:
        threads.append(threading.current_thread())
        return render(self, request, begins_answer)

    monkeypatch.setattr(Prompts, "_fitting", spied)
    request = pb.ChatRequest(messages=[pb.Message(role=pb.ROLE_USER, content="x")], tools=[pb.Tool(name="f")])
    request.tools[0].parameters.update({"type": "object", "$comment": "x" * (INLINE_CHARS + 1)})
    async with grpc.aio.insecure_channel(gateway.grpc_address) as channel:
        assert (await inference_pb2_grpc.InferenceStub(channel).Chat(request)).choices
    assert threads
    assert threading.main_thread() not in threads


def test_the_search_for_a_wrong_value_takes_no_path_for_each_value() -> None:
    """Paths as long as the nesting, for each of the values, took 4 s and 60 MB for this body."""
    data = b'{"b":NaN,"a":' + b"[" * 900 + b",".join([b"1"] * 8000) + b"]" * 900 + b"}"
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match="b must be a finite number"):
            body.decode(data)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


async def test_gbnf_is_converted_beside_the_loop(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short grammar, too, can take long."""
    threads: list[threading.Thread] = []
    convert = gbnf.gbnf_to_lark

    def spied(text: str) -> str:
        threads.append(threading.current_thread())
        return convert(text)

    monkeypatch.setattr(gbnf, "gbnf_to_lark", spied)
    text = 'root ::= "a"'
    form = {"structured_outputs": {"grammar": text}}
    for path, content in (
        ("chat/completions", {"messages": [USER], "grammar": text}),
        ("completions", {"prompt": "a", **form}),
        ("responses", {"input": "a", **form}),
    ):
        for data in (orjson.dumps(content), orjson.dumps(content).replace(b"::=", rb"\u003a:\u003D")):
            await gateway.http.post(f"/v1/{path}", content=data, headers={"content-type": "application/json"})
    async with grpc.aio.insecure_channel(gateway.grpc_address) as channel:
        request = pb.ChatRequest(messages=[pb.Message(role=pb.ROLE_USER, content="x")])
        request.structured_outputs.grammar = text
        with contextlib.suppress(grpc.aio.AioRpcError):
            await inference_pb2_grpc.InferenceStub(channel).Chat(request)
    assert len(threads) == 7
    assert threading.main_thread() not in threads
