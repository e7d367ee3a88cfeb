"""Responses over a WebSocket: several on one connection, the last one kept, frames that are wrong,
too large or too many, clients that leave or do not read."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import websockets
from openresponses_types.types import WebSocketErrorEvent
from websockets.asyncio.client import ClientConnection, connect

from cluster.config import GatewayConfig
from cluster.frontend.responses import websocket as module
from cluster.harmony.encoding import HarmonyEncoding
from cluster.state.settings import StateConfig, location
from cluster.state.state import open_state
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, serving, turn
from tests.support.response_events import TERMINAL, check_events
from workers.errors import EngineDead


@contextlib.asynccontextmanager
async def connected(gateway: Gateway, key: str | None = None) -> AsyncIterator[ClientConnection]:
    url = gateway.url.replace("http:", "ws:") + "/v1/responses"
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with connect(url, additional_headers=headers, max_size=None, proxy=None) as connection:
        yield connection


async def create(connection: ClientConnection, **body: Any) -> list[dict[str, Any]]:
    """Send a request and return its events, or its error."""
    await connection.send(json.dumps({"type": "response.create", "input": "Hello", **body}))
    return await answer(connection)


async def answer(connection: ClientConnection) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    while not events or events[-1]["type"] not in (*TERMINAL, "error"):
        events.append(json.loads(await asyncio.wait_for(connection.recv(), 60)))
    if events[-1]["type"] == "error":
        WebSocketErrorEvent.model_validate(events[-1])
    else:
        check_events(events)
    return events


def prompt(engine: FakeEngine, encoding: HarmonyEncoding) -> str:
    return encoding.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


async def test_responses_follow_each_other_on_one_connection(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    async with connected(gateway) as connection:
        first = (await create(connection, store=False))[-1]["response"]
        assert first["status"] == "completed"
        second = (await create(connection, previous_response_id=first["id"], input="And now?", store=False))[
            -1
        ]
        assert second["response"]["previous_response_id"] == first["id"]
        shown = prompt(engine, encoding)
        assert "final<|message|>Hello there, wörld 🎉!<|end|><|start|>user<|message|>And now?" in shown
        assert shown.count("<|start|>user") == 2
        third = (await create(connection, previous_response_id=second["response"]["id"]))[-1]["response"]
        assert prompt(engine, encoding).count("<|start|>user") == 3
        alone = (await create(connection))[-1]["response"]
        assert prompt(engine, encoding).count("<|start|>user") == 1
        old = await create(connection, previous_response_id=third["id"])
        assert old[-1]["error"]["code"] == "previous_response_not_found"
        assert old[-1]["error"]["param"] == "previous_response_id"
        lost = await create(connection, previous_response_id=alone["id"])
        assert lost[-1]["error"]["code"] == "previous_response_not_found", "forgotten after the failure"
    async with connected(gateway) as other:
        assert (await create(other, previous_response_id=first["id"]))[-1]["type"] == "error"


async def test_a_short_turn_after_a_long_one_is_work_for_a_thread(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    run = gateway.service.prompts.threads.run

    async def spy(num_chars: int, work: Callable[[], Any]) -> Any:
        sizes.append(num_chars)
        return await run(num_chars, work)

    monkeypatch.setattr(gateway.service.prompts.threads, "run", spy)
    async with connected(gateway) as connection:
        first = (await create(connection, input="long " * 200, store=False))[-1]["response"]
        assert first["status"] == "completed"
        sizes.clear()
        await create(connection, previous_response_id=first["id"], input="And now?", store=False)
    parsed, converted, rendered, *_ = sizes
    assert parsed < 200
    assert min(converted, rendered) > 1000, "they have the history"


async def test_a_tool_loop_on_one_connection(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    ids = turn(encoding, reasoning="I need it.", call=("f", "{}"))
    engine.answer = lambda request: Script(ids)
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}]
    async with connected(gateway) as connection:
        response = (await create(connection, tools=tools))[-1]["response"]
        call = response["output"][-1]
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "1"}
        engine.answer = lambda request: Script(turn(encoding, text="Done."))
        wrong = await create(
            connection, previous_response_id=response["id"], input=[{**output, "call_id": "x"}]
        )
        assert (wrong[-1]["status"], wrong[-1]["error"]["param"]) == (400, "input[0].call_id")
        items = [{"role": "user", "content": "Hello"}, *response["output"], output]
        assert (await create(connection, tools=tools, input=items))[-1]["type"] == "response.completed"
    assert "<|channel|>analysis<|message|>I need it.<|end|>" in prompt(engine, encoding)


async def test_without_generation_the_prompt_is_read_and_kept(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    async with connected(gateway) as connection:
        events = await create(connection, generate=False, input="Context.")
        warmed = events[-1]["response"]
        assert (warmed["status"], warmed["output"]) == ("completed", [])
        assert len(events) == 3
        assert engine.requests[-1].sampling.max_tokens == 1
        assert warmed["usage"]["input_tokens"] == len(engine.requests[-1].prompt_token_ids)
        assert warmed["usage"]["output_tokens"] == 0
        await create(connection, previous_response_id=warmed["id"], input="Question.")
    assert "user<|message|>Context.<|end|><|start|>user<|message|>Question.<|end|>" in prompt(
        engine, encoding
    )


async def test_stored_and_unstored_responses_on_one_connection(
    encoding: HarmonyEncoding, engine: FakeEngine, tmp_path: Path
) -> None:
    settings = StateConfig(url=f"sqlite:///{tmp_path / 'state.sqlite3'}")
    state = await open_state(location(settings, several_hosts=False), settings)
    assert state is not None
    async with serving(encoding, [engine], state=state) as gateway, connected(gateway) as connection:
        stored = (await create(connection))[-1]["response"]
        assert stored["store"] is True
        await create(connection, store=False)
        again = (await create(connection, previous_response_id=stored["id"], input="Again."))[-1]["response"]
        assert again["store"] is True, "older stored responses are there, too"
        assert prompt(engine, encoding).count("<|start|>user") == 2
        unstored = (await create(connection, store=False, input="Apart."))[-1]["response"]
        follow = await create(connection, previous_response_id=unstored["id"], input="More.")
        assert follow[-1]["response"]["store"] is False, "what continues it cannot be stored"
        assert "<|message|>Apart.<|end|>" in prompt(engine, encoding)
        read = await gateway.http.get(f"/v1/responses/{again['id']}")
        assert read.json()["output"] == again["output"]
        assert (await gateway.http.get(f"/v1/responses/{unstored['id']}")).status_code == 404
    await state.close()


@pytest.mark.parametrize(
    ("frame", "param", "words"),
    [
        ("no JSON", None, "not valid JSON"),
        ("[]", None, "must be a JSON object"),
        (b"\xff\xfe", None, "not valid JSON"),
        ('{"input": "x"}', "type", "response.create"),
        ('{"type": "response.cancel"}', "type", "response.create"),
        ('{"type": "response.create"}', "input", "input is missing"),
        ('{"type": "response.create", "input": "x", "generate": 1}', "generate", "true or false"),
        (
            '{"type": "response.create", "input": "x", "background": true}',
            "background",
            "not offered on a WebSocket",
        ),
        ('{"type": "response.create", "input": "x", "model": "other"}', "model", "does not exist"),
        ('{"type": "response.create", "input": "' + "x" * 100_000 + '"}', "input", "maximum context length"),
    ],
)
async def test_a_wrong_frame_is_answered_and_the_connection_goes_on(
    gateway: Gateway, frame: str | bytes, param: str | None, words: str
) -> None:
    async with connected(gateway) as connection:
        await connection.send(frame)
        (error,) = await answer(connection)
        assert error["error"]["param"] == param
        assert words in error["error"]["message"]
        assert 400 <= error["status"] < 500
        assert error["error"]["code"]
        assert (await create(connection))[-1]["type"] == "response.completed"


async def test_an_engine_that_fails_fails_the_response_and_not_the_connection(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    good = engine.answer
    ids = turn(encoding, reasoning="Hm.", text="Hello there.")
    async with connected(gateway) as connection:
        engine.answer = lambda request: Script(ids, break_after=8, failure=EngineDead("The engine died."))
        events = await create(connection)
        assert events[-1]["type"] == "response.failed"
        engine.answer = lambda request: Script(ids, break_after=0, failure=EngineDead("The engine died."))
        (error,) = await create(connection)
        assert error["status"] == 503
        engine.answer = good
        assert (await create(connection))[-1]["type"] == "response.completed"


async def test_a_frame_over_the_limit_closes_the_connection(
    encoding: HarmonyEncoding, engine: FakeEngine
) -> None:
    config = GatewayConfig(max_body_bytes=4096, stream_headers_s=60.0)
    async with serving(encoding, [engine], config=config) as gateway, connected(gateway) as connection:
        await connection.send(json.dumps({"type": "response.create", "input": "x" * 5000}))
        with pytest.raises(websockets.ConnectionClosedError) as closed:
            await asyncio.wait_for(connection.recv(), 60)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009
        assert (await gateway.http.get("/health")).status_code == 200


async def test_too_many_waiting_frames_close_the_connection(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    gate = asyncio.Event()
    engine.answer = lambda request: Script(turn(encoding, text="x"), gate=gate)
    frame = json.dumps({"type": "response.create", "input": "x"})

    async def send_many(connection: ClientConnection) -> None:
        await connection.send(frame)
        await engine.arrived(1)
        for _ in range(module.MAX_QUEUED + 1):
            await connection.send(frame)
        while True:
            await connection.recv()

    async with connected(gateway) as connection:
        with pytest.raises(websockets.ConnectionClosed):
            await asyncio.wait_for(send_many(connection), 60)
    await asyncio.wait_for(engine.was_cancelled(1), 60)
    assert len(engine.requests) == 1
    gate.set()


async def test_a_client_that_leaves_cancels_its_response(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    gate = asyncio.Event()
    engine.answer = lambda request: Script(turn(encoding, text="Hello"), gate=gate, gate_after=4)
    async with connected(gateway) as connection:
        await connection.send(json.dumps({"type": "response.create", "input": "x"}))
        await asyncio.wait_for(connection.recv(), 60)
    await asyncio.wait_for(engine.was_cancelled(1), 60)
    assert gateway.service.num_in_flight == 0
    gate.set()


async def test_a_client_that_never_reads_is_cut_off(encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    """Its first events repeat a tool of more bytes than sockets hold."""
    gate = asyncio.Event()
    engine.answer = lambda request: Script(turn(encoding, text="Hello"), gate=gate, gate_after=4)
    tool = {"type": "function", "name": "f", "description": "x" * 8_000_000}
    body = {"type": "response.create", "input": "x", "tools": [tool], "tool_choice": "none"}
    data = json.dumps(body).encode()
    config = GatewayConfig(send_timeout_s=0.2, stream_headers_s=60.0)
    async with serving(encoding, [engine], config=config) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(
            f"GET /v1/responses HTTP/1.1\r\nhost: {host}\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            f"sec-websocket-key: {'A' * 22}==\r\nsec-websocket-version: 13\r\n\r\n".encode()
        )
        assert b"101" in await reader.readline()
        writer.write(bytes([0x81, 0xFF]) + len(data).to_bytes(8, "big") + bytes(4) + data)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.wait_for(engine.was_cancelled(1), 60)
        assert gateway.service.num_in_flight == 0
        writer.transport.abort()
    gate.set()


async def test_keys(encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    config = GatewayConfig(api_keys=("one",), stream_headers_s=60.0)
    async with serving(encoding, [engine], config=config) as gateway:
        async with connected(gateway, "one") as connection:
            assert (await create(connection))[-1]["type"] == "response.completed"
        for key in (None, "two"):
            with pytest.raises(websockets.InvalidStatus) as refused:
                async with connected(gateway, key):
                    pass
            assert refused.value.response.status_code == 401
            assert json.loads(refused.value.response.body or b"")["error"]["code"] == "invalid_api_key"


async def test_pages_of_foreign_origins_are_refused(encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    listed = "https://chat.example.com"
    config = GatewayConfig(cors_origins=(listed,), stream_headers_s=60.0)
    async with serving(encoding, [engine], config=config) as gateway:
        url = gateway.url.replace("http:", "ws:") + "/v1/responses"
        for origin in (None, gateway.url, gateway.url.replace("http:", "https:"), listed):
            async with connect(url, origin=origin, proxy=None) as connection:  # type: ignore[arg-type]
                assert connection.response is not None
                assert connection.response.status_code == 101
        for origin in ("https://evil.example", "http://127.0.0.1:1", "null", ""):
            with pytest.raises(websockets.InvalidStatus) as refused:
                async with connect(url, additional_headers={"origin": origin}, proxy=None):
                    pass
            assert refused.value.response.status_code == 403, origin
            error = json.loads(refused.value.response.body or b"")["error"]
            assert (error["code"], "gateway.cors_origins" in error["message"]) == ("foreign_origin", True)


async def test_no_more_connections_than_allowed(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 1)
    async with connected(gateway):
        async with connected(gateway) as second:
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await asyncio.wait_for(second.recv(), 60)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1013


async def test_what_all_connections_keep_is_bounded(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_KEPT_BYTES", 100)
    async with connected(gateway) as connection:
        first = (await create(connection))[-1]["response"]
        (error,) = await create(connection, previous_response_id=first["id"])
        assert error["error"]["code"] == "previous_response_not_found"
        monkeypatch.setattr(module, "MAX_KEPT_BYTES", 10_000)
        second = (await create(connection))[-1]["response"]
        assert (await create(connection, previous_response_id=second["id"]))[-1]["type"] == TERMINAL[0]


async def test_an_old_connection_asks_for_a_new_one(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST_S", 0.01)
    async with connected(gateway) as connection:
        (error,) = await answer(connection)
        assert error["error"]["code"] == "websocket_connection_limit_reached"


async def test_other_paths_are_no_websockets(gateway: Gateway) -> None:
    for path in ("/v1/chat/completions", "/v1/responses/x", "/"):
        with pytest.raises(websockets.InvalidStatus):
            async with connect(gateway.url.replace("http:", "ws:") + path, proxy=None):
                pass
    plain = await gateway.http.get("/v1/responses")
    assert plain.status_code == 405
