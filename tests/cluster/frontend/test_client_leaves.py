"""A client that leaves is cancelled in the engine, wherever its request is, and the limits of the
gateway are freed."""

import asyncio

import pytest

from cluster.generation import Capacity
from cluster.harmony.encoding import HarmonyEncoding
from cluster.rpc import inference_pb2 as pb
from cluster.rpc import inference_pb2_grpc
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, serving, turn


async def http_request(
    gateway: Gateway, body: str, path: str = "/v1/chat/completions"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a bare connection, so that leaving is closing the socket and nothing else."""
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: "
        f"{len(body)}\r\n\r\n"
    )
    writer.write((head + body).encode())
    await writer.drain()
    return reader, writer


async def eventually(gateway: Gateway, *lines: str) -> None:
    """Wait for the gateway's own bookkeeping, which ends a moment after the engine's."""
    async with asyncio.timeout(30):
        page = ""
        while not all(line in page for line in lines):
            page = (await gateway.http.get("/metrics")).text


@pytest.mark.parametrize(
    ("options", "gate_after"),
    [
        ('"stream": true', 0),
        ('"stream": true', 5),
        ('"stream": false', 0),
        ('"stream": false', 5),
        ('"stream": true, "n": 4', 5),
    ],
    ids=["stream-before-the-first-token", "stream", "whole-before-the-first-token", "whole", "four-choices"],
)
async def test_http(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding, options: str, gate_after: int
) -> None:
    ids = turn(encoding, text="one two three four")
    engine.answer = lambda request: Script(ids, gate=asyncio.Event(), gate_after=gate_after)
    num_choices = 4 if '"n": 4' in options else 1
    async with asyncio.timeout(20):
        reader, writer = await http_request(
            gateway, f'{{"messages": [{{"role": "user", "content": "x"}}], {options}}}'
        )
        await engine.arrived(num_choices)
        if "true" in options and gate_after:
            await reader.readuntil(b"data: ")
        writer.close()
        await engine.was_cancelled(num_choices)
    await eventually(
        gateway,
        'cantata_gateway_in_flight_requests{gateway="",process="gateway",replica=""} 0.0',
        'status="499"',
    )


async def test_the_openai_client(gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding) -> None:
    engine.answer = lambda request: Script(turn(encoding, text="one two"), gate=asyncio.Event(), gate_after=5)
    stream = await gateway.client.chat.completions.create(
        model="gpt-oss-test", messages=[{"role": "user", "content": "x"}], stream=True
    )
    await anext(stream)
    await stream.close()
    async with asyncio.timeout(20):
        await engine.was_cancelled(1)


@pytest.mark.parametrize("whole", [True, False])
async def test_grpc(
    gateway: Gateway,
    engine: FakeEngine,
    encoding: HarmonyEncoding,
    whole: bool,
    stub: inference_pb2_grpc.InferenceStub,
) -> None:
    engine.answer = lambda request: Script(turn(encoding, text="one two"), gate=asyncio.Event(), gate_after=5)
    request = pb.ChatRequest(messages=[pb.Message(role=pb.ROLE_USER, content="x")])
    call = stub.Chat(request) if whole else stub.ChatStream(request)
    if not whole:
        await call.read()
    async with asyncio.timeout(20):
        await engine.arrived(1)
        call.cancel()
        await engine.was_cancelled(1)
    await eventually(
        gateway,
        'cantata_gateway_in_flight_requests{gateway="",process="gateway",replica=""} 0.0',
        'status="CANCELLED"',
    )


async def test_requests_over_the_limit_are_refused_until_others_end(
    encoding: HarmonyEncoding, engine: FakeEngine
) -> None:
    gate = asyncio.Event()
    engine.answer = lambda request: Script(turn(encoding, text="x"), gate=gate)
    body = {"messages": [{"role": "user", "content": "x"}]}
    async with serving(encoding, [engine], capacity=Capacity(max_in_flight_requests=3)) as gateway:
        running = [
            asyncio.create_task(gateway.http.post("/v1/chat/completions", json=body)) for _ in range(2)
        ]
        await engine.arrived(2)
        refused = await gateway.http.post("/v1/chat/completions", json={**body, "n": 2})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        running.append(asyncio.create_task(gateway.http.post("/v1/chat/completions", json=body)))
        await engine.arrived(3)
        gate.set()
        assert [response.status_code for response in await asyncio.gather(*running)] == [200, 200, 200]
        assert (await gateway.http.post("/v1/chat/completions", json={**body, "n": 2})).status_code == 200
        never = await gateway.http.post("/v1/chat/completions", json={**body, "n": 4})
        assert (never.status_code, never.json()["error"]["param"]) == (400, "n")


async def test_64_clients_at_a_limit_of_16_lose_nothing(
    encoding: HarmonyEncoding, engine: FakeEngine
) -> None:
    """Streams over HTTP; a client that is refused comes again. More than 16 never run at once."""
    limit, gate, ended = 16, asyncio.Event(), asyncio.Semaphore(0)
    engine.answer = lambda request: Script(turn(encoding, text="x"), gate=gate)
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    num_refused = 0

    async def client(gateway: Gateway) -> str:
        nonlocal num_refused
        while True:
            answer = await gateway.http.post("/v1/chat/completions", json=body)
            if answer.status_code != 429:
                assert answer.status_code == 200
                ended.release()
                return answer.text.splitlines()[-2]
            assert int(answer.headers["retry-after"]) >= 1
            num_refused += 1
            if num_refused == 64 - limit:
                gate.set()  # until then those that were admitted do not end
            if num_refused <= 64 - limit:
                await ended.acquire()

    async with serving(encoding, [engine], capacity=Capacity(max_in_flight_requests=limit)) as gateway:
        last_lines = await asyncio.gather(*(client(gateway) for _ in range(64)))
        page = (await gateway.http.get("/metrics")).text
    assert last_lines == ["data: [DONE]"] * 64
    assert len(engine.requests) == 64, "what is refused does not reach an engine"
    assert 'cantata_gateway_in_flight_requests{gateway="",process="gateway",replica=""} 0.0' in page


async def test_the_deadline_reaches_the_engine_and_is_504(
    encoding: HarmonyEncoding, engine: FakeEngine
) -> None:
    engine.answer = lambda request: Script(turn(encoding, text="x"), gate=asyncio.Event())
    async with serving(encoding, [engine], capacity=Capacity(request_timeout_s=1.0)) as gateway:
        response = await gateway.http.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]}
        )
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert engine.requests[0].deadline_s is not None
    # gRPC sends the time left in whole units, rounded up by a hundredth at most.
    assert 0 < engine.requests[0].deadline_s <= 1.01
