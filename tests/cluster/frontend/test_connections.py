"""Limits of a connection: sizes and times of headers, bodies, idle connections and unread answers,
over bare sockets."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import grpc.aio
import pytest

from cluster.config import GatewayConfig
from cluster.frontend import body
from cluster.frontend.http_server import HttpServer, _Protocol
from cluster.harmony.encoding import HarmonyEncoding
from cluster.rpc import inference_pb2 as pb
from cluster.rpc import inference_pb2_grpc
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, serving

SHORT_S = 0.3
QUICK = GatewayConfig(
    keep_alive_timeout_s=SHORT_S,
    header_timeout_s=SHORT_S,
    body_timeout_s=SHORT_S,
    send_timeout_s=SHORT_S,
    max_header_bytes=4096,
)
LIMIT_S = 120
CHAT = json.dumps({"messages": [{"role": "user", "content": "x"}]})
# More than the kernels' buffers hold: 1.5 kB a token.
LARGE = ', "logprobs": true, "top_logprobs": 20, "max_tokens": 10000}'
STREAM = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True})


@pytest.fixture
async def quick(encoding: HarmonyEncoding, engine: FakeEngine) -> AsyncIterator[Gateway]:
    async with serving(encoding, [engine], config=QUICK) as gateway:
        yield gateway


@asynccontextmanager
async def connected(
    gateway: Gateway, *, receive_bytes: int | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = gateway.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
    reader, writer = await asyncio.open_connection(
        sock=connection, limit=2**16 if receive_bytes is None else receive_bytes
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            yield reader, writer
    finally:
        writer.close()


def request(
    content: str,
    *,
    version: str = "1.1",
    length: int | None = None,
    path: str = "/v1/chat/completions",
    extra: str = "",
) -> bytes:
    head = f"POST {path} HTTP/{version}\r\nHost: t\r\nContent-Type: application/json\r\n{extra}"
    return f"{head}Content-Length: {len(content) if length is None else length}\r\n\r\n{content}".encode()


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Read a response with a length."""
    status, headers = await head(reader)
    return status, headers, await reader.readexactly(int(headers["content-length"]))


async def head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    return int(lines[0].split()[1]), headers


async def counted(gateway: Gateway, endpoint: str, status: int | str) -> None:
    """Wait until the answer is counted, a moment after it."""
    registry = gateway.service.metrics.registry
    labels = {"endpoint": endpoint, "status": str(status)}
    await until(lambda: bool(registry.get_sample_value("cantata_gateway_requests_total", labels)))


async def until(condition: Callable[[], bool]) -> None:
    """Wait without a request: the server may close an idle connection under it."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("shape", ["one-value", "many-headers", "url", "trailers", "chunk-extension"])
async def test_headers_have_a_largest_size(quick: Gateway, shape: str) -> None:
    """The bound holds however much is sent; a small request after it is served."""
    piece = b"x" * 65536
    begin = {
        "one-value": b"GET /health HTTP/1.1\r\nHost: t\r\nA: ",
        "many-headers": b"GET /health HTTP/1.1\r\nHost: t\r\n",
        "url": b"GET /",
        "trailers": request("", extra="Transfer-Encoding: chunked\r\n").replace(b"Content-Length: 0\r\n", b"")
        + b"0\r\nA: ",
        "chunk-extension": request("", extra="Transfer-Encoding: chunked\r\n").replace(
            b"Content-Length: 0\r\n", b""
        )
        + b"2;",
    }[shape]
    if shape == "many-headers":
        piece = b"a: b\r\n" * 10_000
    async with connected(quick) as (reader, writer):
        writer.write(begin)
        for _ in range(100):  # 6 MB, or until the server has closed
            writer.write(piece)
            try:
                await writer.drain()
            except ConnectionError:
                break
        if shape not in (
            "trailers",
            "chunk-extension",
        ):  # there the app has the request already, and the answer may be its own
            status, headers, content = await answer(reader)
            assert (status, json.loads(content)["error"]["code"]) == (431, "headers_too_large")
            assert headers["connection"] == "close"
            assert headers["x-request-id"]
        with suppress(ConnectionError):
            assert len(await reader.read()) < 10_000
    if shape not in ("trailers", "chunk-extension"):
        await counted(quick, "unknown", 431)
    assert (await quick.http.get("/health")).status_code == 200


async def test_headers_as_large_as_allowed(gateway: Gateway) -> None:
    assert (await gateway.http.get("/health", headers={"a": "x" * 60_000})).status_code == 200
    assert (await gateway.http.get("/health", headers={"a": "x" * 70_000})).status_code == 431
    body_of_many_reads = CHAT + " " * 2**20  # is no header
    answer = await gateway.http.post(
        "/v1/chat/completions", content=body_of_many_reads, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (b"\r\n", None),
        (b"GET /health HTTP/1.1\r\nHost: t\r\n", 408),
        (b"GET /health HTTP/1.1\r\nA: ", 408),
        (request("", length=100), 408),
        (request("{", length=100), 408),
        # Refused before its body is there: answered at once, closed a while later.
        (request("{", length=100, path="/nowhere"), 404),
    ],
    ids=[
        "nothing",
        "a-line-end",
        "half-of-the-headers",
        "half-a-header",
        "no-body",
        "half-of-the-body",
        "early-answer",
    ],
)
async def test_stalled_requests_are_answered_and_closed(
    quick: Gateway, sent: bytes, status: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.frontend.http_server._LINGER_S", SHORT_S)
    async with connected(quick) as (reader, writer):
        writer.write(sent)
        if status is not None:
            found, headers, content = await answer(reader)
            assert found == status
            assert json.loads(content)["error"]["message"]
            assert status != 408 or headers["connection"] == "close"
        try:
            assert await reader.read() == b""
        except ConnectionResetError:
            assert status == 404


async def test_a_dripping_client_gains_nothing(quick: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte from time to time keeps neither headers nor bodies nor an idle connection going."""
    monkeypatch.setattr("cluster.frontend.http_server._LINGER_S", SHORT_S)
    for sent, drop in (
        (b"GET /health HTTP/1.1\r\nA: ", b"x"),
        (request("{", length=10_000), b" "),
        (request("{", length=10_000, path="/nowhere"), b" "),
        (b"", b"\r\n"),
    ):
        async with connected(quick) as (reader, writer):
            writer.write(sent)
            ended = asyncio.create_task(reader.read())
            while not ended.done():
                writer.write(drop)
                await asyncio.wait([ended], timeout=0.02)
            assert ended.exception() is None or isinstance(ended.exception(), ConnectionError)


async def test_a_slow_body_that_goes_on_is_taken(
    encoding: HarmonyEncoding, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "MIN_BYTES_PER_S", 10)
    async with serving(encoding, [engine], config=QUICK) as gateway, connected(gateway) as (reader, writer):
        content = CHAT + " " * 60
        data = request(content)
        writer.write(data[: -len(content)])
        begin = asyncio.get_running_loop().time()
        for position in range(0, len(content), 10):
            writer.write(content[position : position + 10].encode())
            await asyncio.wait([asyncio.create_task(writer.drain())])
            # slower than body_timeout_s as a whole, faster than the least rate
            await asyncio.sleep(0.05)
        assert asyncio.get_running_loop().time() - begin > SHORT_S
        assert (await answer(reader))[0] == 200


async def test_idle_connections_are_kept_for_the_time_that_is_set(quick: Gateway, gateway: Gateway) -> None:
    for server, kept in ((gateway, True), (quick, False)):
        async with connected(server) as (reader, writer):
            for _ in range(2):
                writer.write(b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n")
                assert (await answer(reader))[0] == 200
            if not kept:
                assert await reader.read() == b""


async def test_by_default_longer_than_clients_and_load_balancers_keep_theirs(gateway: Gateway) -> None:
    """Go's client keeps idle connections for 90 s, AWS's load balancers for 60 s."""
    assert GatewayConfig().keep_alive_timeout_s == 120
    async with connected(gateway) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n")
        await answer(reader)
        name = writer.get_extra_info("sockname")
        (connection,) = [
            found for found in gateway.http_server.server_state.connections if found.client == name
        ]
        timer = connection.timeout_keep_alive_task
        assert timer is not None
        assert timer.when() - asyncio.get_running_loop().time() > 100


@pytest.mark.parametrize("read_first", [False, True])
async def test_an_unread_stream_is_cut_off(
    encoding: HarmonyEncoding, engine: FakeEngine, read_first: bool
) -> None:
    """The stream's place in the engine is free again."""
    engine.answer = lambda request: Script([5] * 10**4, per_message=100)
    engine.max_model_len = 10**8
    async with serving(encoding, [engine], config=QUICK) as gateway:
        async with connected(gateway, receive_bytes=4096) as (reader, writer):
            writer.write(request(STREAM[:-1] + LARGE))
            if read_first:
                await reader.readuntil(b"data: ")
            await engine.was_cancelled(1)
            await counted(gateway, "/v1/chat/completions", 499)
            await until_closed(gateway, writer)
        assert gateway.service.metrics.registry.get_sample_value("cantata_gateway_in_flight_requests") == 0


async def until_closed(gateway: Gateway, writer: asyncio.StreamWriter) -> None:
    """Wait until the server has closed the connection of this client, which it has served."""
    name = writer.get_extra_info("sockname")
    connections = gateway.http_server.server_state.connections
    await until(lambda: all(found.client != name for found in connections))


async def test_an_unread_whole_answer_is_dropped(encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    engine.answer = lambda request: Script([5] * 7000, per_message=7000)
    engine.max_model_len = 10**8
    async with (
        serving(encoding, [engine], config=QUICK) as gateway,
        connected(gateway, receive_bytes=4096) as (_, writer),
    ):
        writer.write(request(CHAT[:-1] + LARGE))
        await engine.arrived(1)
        await until_closed(gateway, writer)
        assert gateway.service.num_in_flight == 0


async def test_an_unread_grpc_stream_is_cut_off(encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    engine.answer = lambda request: Script([5] * 10**6, per_message=1000)
    engine.max_model_len = 10**8
    options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    async with (
        serving(encoding, [engine], config=QUICK) as gateway,
        grpc.aio.insecure_channel(gateway.grpc_address, options=options) as channel,
        asyncio.timeout(LIMIT_S),
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        call = stub.ChatStream(pb.ChatRequest(messages=[pb.Message(role=pb.ROLE_USER, content="x")]))
        await call.read()
        await engine.was_cancelled(1)
        await counted(gateway, "Inference/ChatStream", "CANCELLED")
        # The server goes on.
        models = await stub.ListModels(pb.ListModelsRequest())
        assert models.models


@pytest.mark.parametrize("stream", [True, False])
async def test_http_1_0_has_no_chunks(gateway: Gateway, stream: bool) -> None:
    async with connected(gateway) as (reader, writer):
        writer.write(request(STREAM if stream else CHAT, version="1.0"))
        status, headers = await head(reader)
        content = await reader.read()
    assert status == 200
    assert headers["connection"] == "close"
    assert "transfer-encoding" not in headers
    if stream:
        assert "content-length" not in headers
        events = content.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert all(event.startswith("data: ") for event in events[:-1])
        assert json.loads(events[0].removeprefix("data: "))["object"] == "chat.completion.chunk"
    else:
        assert len(content) == int(headers["content-length"])


async def test_what_is_no_http_is_refused_in_the_form_of_all_errors(gateway: Gateway) -> None:
    async with connected(gateway) as (reader, writer):
        writer.write(b"\x16\x03\x01 hello\r\n\r\n")
        status, _, content = await answer(reader)
        assert (status, json.loads(content)["error"]["type"]) == (400, "invalid_request_error")
        assert await reader.read() == b""


async def test_a_websocket_is_not_offered(gateway: Gateway) -> None:
    """It would have none of these bounds."""
    headers = {
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "eHh4eHh4eHh4eHh4eHh4eA==",
    }
    assert (await gateway.http.get("/health", headers=headers)).status_code == 200


async def test_an_offer_of_http_2_is_declined(gateway: Gateway) -> None:
    """The request is answered with its body: Java's client makes the offer with its first
    requests."""
    offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
    content = json.dumps({"prompt": "hello upgrade: \r\nupgrade: x"})
    async with connected(gateway) as (reader, writer):
        for name in ("Upgrade", "upgrade"):
            writer.write(request(CHAT, extra=offer.replace("Upgrade: ", f"{name}: ")))
            assert (await answer(reader))[0] == 200
        data = request(content, path="/tokenize", extra=offer)
        writer.write(data[:60])
        writer.write(data[60:])
        status, _, found = await answer(reader)
    assert status == 200
    assert json.loads(found)["count"] == len(
        gateway.service.prompts.encoding.encode("hello upgrade: \r\nupgrade: x")
    )


@pytest.mark.parametrize(
    "rest", [b"0\r\nA: " + b"x" * 100_000, b"no chunk\r\n"], ids=["trailers", "no-chunk"]
)
async def test_a_request_has_one_answer(gateway: Gateway, rest: bytes) -> None:
    """This holds also if the request was answered before its end and its end is wrong: a proxy may
    take a second answer for another request's."""
    async with connected(gateway) as (reader, writer):
        begin = request("", path="/nowhere", extra="Transfer-Encoding: chunked\r\n").replace(
            b"Content-Length: 0\r\n", b""
        )
        writer.write(begin)
        assert (await answer(reader))[0] == 404
        writer.write(rest)
        assert await reader.read() == b""


async def test_requests_that_are_sent_before_the_last_answer(gateway: Gateway) -> None:
    """They have the time that all have, not that of what is left of an answered one."""
    first, second = b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n", request(CHAT)
    loop, limits = asyncio.get_running_loop(), GatewayConfig()
    for begun, left, wait_s, expected in (
        (second[:-5], second[-5:], limits.body_timeout_s / 2, 200),
        (second[:30], second[30:], limits.header_timeout_s / 2, 200),
        (second[:30], b"", 2 * limits.header_timeout_s, 408),
    ):
        async with connected(gateway) as (reader, writer):
            writer.write(first + begun)
            assert (await answer(reader))[0] == 200
            name = writer.get_extra_info("sockname")
            (connection,) = [
                found for found in gateway.http_server.server_state.connections if found.client == name
            ]
            assert isinstance(connection, _Protocol)
            connection.check(loop.time() + wait_s)
            writer.write(left)
            assert (await answer(reader))[0] == expected


async def test_a_body_that_is_asked_about_and_refused_ends_the_connection(gateway: Gateway) -> None:
    """The client may send it or not: what comes next could be either."""
    async with connected(gateway) as (reader, writer):
        writer.write(request("", length=10**9, extra="Expect: 100-continue\r\n"))
        assert (await answer(reader))[0] == 413
        assert await reader.read() == b""


async def test_many_stalled_connections_are_all_closed(quick: Gateway) -> None:
    async with asyncio.timeout(LIMIT_S):
        host, port = quick.url.removeprefix("http://").split(":")
        stalled = [await asyncio.open_connection(host, int(port)) for _ in range(200)]
        for _, writer in stalled:
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost")
        for reader, writer in stalled:
            data = b""
            # closed without a word, or before the line came, where it had not begun in time
            with contextlib.suppress(ConnectionResetError):
                data = await reader.read()
            assert not data or b" 408 " in data
            writer.close()


def test_uvicorn_calls_what_is_overridden() -> None:
    """Names of its own that it may change: without one of them a bound would be silently gone."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

    from cluster.frontend.http_server import _Protocol

    ours = {
        name for name in vars(_Protocol) if callable(getattr(_Protocol, name)) and not name.startswith("__")
    }
    assert ours - {"check", "_refuse", "_headers_too_large", "_is_answered", "_write_answer"} <= set(
        vars(HttpToolsProtocol)
    )
    assert {"chunked_encoding", "expected_content_length"} <= set(
        RequestResponseCycle.__init__.__code__.co_names
    )
    assert issubclass(HttpServer, object)


async def test_a_body_that_is_no_http_is_refused(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    """The refusal is an answer, without a line in the log: any client can send such a body."""
    chunked = request("", extra="Transfer-Encoding: chunked\r\n").replace(b"Content-Length: 0\r\n", b"")
    async with connected(gateway) as (reader, writer):
        writer.write(chunked + b"2\r\n{}\r\n")
        await until(lambda: any(c.cycle for c in gateway.http_server.server_state.connections))  # type: ignore[union-attr]
        writer.write(b"no length\r\n")
        status, headers, content = await answer(reader)
        assert (status, json.loads(content)["error"]["type"]) == (400, "invalid_request_error")
        assert headers["connection"] == "close"
        assert await reader.read() == b""
    await counted(gateway, "/v1/chat/completions", 499)
    assert not caplog.records
