"""When a stream sends what: its headers within a second, comments while it is silent, late failures
as events. The clock is virtual."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
import orjson
import pytest
from starlette.types import Message

from cluster.assembly import Gateway, connect
from cluster.config import GatewayConfig
from cluster.fleet.client import EngineClient
from cluster.fleet.directory import ReplicaSet
from cluster.fleet.table import Replica
from cluster.frontend.app import build_app
from cluster.frontend.errors import TABLE
from cluster.frontend.grpc_api import InferenceServicer
from cluster.generation import ChatDefaults, ModelInfo
from cluster.harmony.encoding import HarmonyEncoding
from cluster.rpc import inference_pb2 as pb
from cluster.serve.gateway import _Context
from tests.support import virtual_time
from tests.support.gateway import VOCAB_SIZE, make_encoding, turn
from tests.support.virtual_time import now_s
from workers.errors import Cancelled, CantataError, Overloaded
from workers.request import EngineOutput, EngineRequest

USER = {"role": "user", "content": "Hello"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [USER]},
    "/v1/completions": {"prompt": "Hello"},
}
HELLO = pb.ChatRequest(messages=[pb.Message(role=pb.ROLE_USER, content="Hello")])
Step = tuple[float, int | CantataError]
COMMENT, DONE = b": keep-alive\n\n", b"data: [DONE]\n\n"


@dataclass
class Engines:
    """An EngineClient whose engines answer token by token.

    Attributes:
        steps: what a sequence does after how many seconds: a token, or a failure. The last one
            ends it.
        left: when a call was cancelled.
    """

    steps: Sequence[Step]
    left: list[float] = field(default_factory=list)

    async def generate(self, replica: Replica, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        try:
            for index, (wait_s, step) in enumerate(self.steps):
                await asyncio.sleep(wait_s)
                if isinstance(step, CantataError):
                    raise step
                last = index == len(self.steps) - 1
                yield EngineOutput((step,), finish_reason="length" if last else None)
        except (asyncio.CancelledError, GeneratorExit):
            self.left.append(now_s())
            raise

    async def close(self) -> None:
        pass


@asynccontextmanager
async def gateway(encoding: HarmonyEncoding, engines: Engines) -> AsyncIterator[Gateway]:
    replicas = ReplicaSet()
    replicas.replace([Replica("a", "host:1")])
    model = ModelInfo("m", 4096, VOCAB_SIZE)
    # An automaton is made in a thread, for which virtual time does not wait.
    defaults = ChatDefaults(harmony_constraint="off")
    connected = connect(model, encoding, replicas, cast(EngineClient, engines), defaults=defaults)
    yield connected
    await asyncio.sleep(1.0)  # what is shielded from a cancellation ends after the app
    await connected.service.close()
    in_flight = connected.service.metrics.registry.get_sample_value("cantata_gateway_in_flight_requests")
    assert in_flight == 0


class HttpCall:
    """One request to the ASGI app.

    Attributes:
        sent: what the client got, with the time of each message.
        leaves_at: when the client closes its connection.
        stalls_at: from when on it reads nothing.
        cancelled_after: number of turns of the event loop between the message that the client has
            left and the end of the app's task, which Serve cancels.
    """

    def __init__(
        self,
        leaves_at: float | None = None,
        stalls_at: float | None = None,
        cancelled_after: int | None = None,
    ) -> None:
        self.sent: list[tuple[float, Message]] = []
        self.leaves_at = leaves_at
        self.stalls_at = stalls_at
        self.cancelled_after = cancelled_after
        self._gone = asyncio.Event()

    async def run(self, gateway: Gateway, path: str, body: dict[str, Any]) -> "HttpCall":
        """Send the request and read the answer to its end."""
        pending: list[Message] = [{"type": "http.request", "body": orjson.dumps(body), "more_body": False}]

        async def receive() -> Message:
            if pending:
                return pending.pop()
            if self.leaves_at is None:
                await asyncio.get_running_loop().create_future()
            else:
                await asyncio.sleep(self.leaves_at - now_s())
            self._gone.set()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if self.stalls_at is not None and now_s() >= self.stalls_at:
                await asyncio.get_running_loop().create_future()
            self.sent.append((now_s(), message))

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        app = build_app(gateway.service, gateway.status, GatewayConfig())
        serving = asyncio.create_task(app(scope, receive, send))
        if self.cancelled_after is not None:
            await self._gone.wait()
            for _ in range(self.cancelled_after):
                await asyncio.sleep(0)
            serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        return self

    @property
    def status(self) -> tuple[float, int]:
        """When the headers came, and the status."""
        time_s, message = self.sent[0]
        return time_s, message["status"]

    @property
    def parts(self) -> list[tuple[float, bytes]]:
        """The parts of the body."""
        return [(time_s, message["body"]) for time_s, message in self.sent[1:] if message["body"]]

    @property
    def comments(self) -> list[float]:
        """When comments came."""
        return [time_s for time_s, data in self.parts if data == COMMENT]


@pytest.fixture(params=BODIES)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def encoding(tmp_path: Path) -> HarmonyEncoding:
    return make_encoding(tmp_path)


def tokens(encoding: HarmonyEncoding, *waits_s: float) -> list[Step]:
    """Return a text's tokens, one after each wait; markup comes with the first."""
    ids = turn(encoding, text="a b c d e f g h i j k l")
    at = len(encoding.encode_with_special("<|channel|>final<|message|>"))
    waits_before = (waits_s[0], *[0.0] * at, *waits_s[1:])
    return list(zip(waits_before, ids, strict=False))


def post(
    encoding: HarmonyEncoding, engines: Engines, path: str, call: HttpCall, **fields: object
) -> HttpCall:
    """Return the finished call of a stream."""

    async def work() -> HttpCall:
        async with gateway(encoding, engines) as connected:
            return await call.run(connected, path, {**BODIES[path], "stream": True, **fields})

    return virtual_time.run(work())


def test_headers_come_after_a_second_and_comments_until_the_first_token(
    encoding: HarmonyEncoding, path: str
) -> None:
    call = post(encoding, Engines(tokens(encoding, 81.8)), path, HttpCall())
    assert call.status == (1.0, 200)
    assert call.comments == [16.0, 31.0, 46.0, 61.0, 76.0]
    rest = [(time_s, data) for time_s, data in call.parts if data != COMMENT]
    assert {time_s for time_s, _ in rest} == {81.8}, "nothing else is sent before the first token"
    assert rest[-1] == (81.8, DONE)
    assert len(rest) > 2


def test_a_quick_first_token_comes_with_the_headers(encoding: HarmonyEncoding, path: str) -> None:
    call = post(encoding, Engines(tokens(encoding, 0.25)), path, HttpCall())
    assert call.status == (0.25, 200)
    assert call.comments == []


def test_a_gap_between_tokens_has_comments(encoding: HarmonyEncoding, path: str) -> None:
    call = post(encoding, Engines(tokens(encoding, 0.5, 10.0, 40.0, 14.9)), path, HttpCall())
    assert call.status == (0.5, 200)
    assert call.comments == [25.5, 40.5], "15 s after what was sent last"
    assert call.parts[-1] == (65.4, DONE)


ERRORS = [kind for kind in TABLE if kind.__module__ == "workers.errors" and kind is not Cancelled]


@pytest.mark.parametrize("kind", ERRORS)
def test_a_refusal_within_the_first_second_has_its_status_and_a_later_one_its_type_and_code(
    encoding: HarmonyEncoding, kind: type[CantataError], path: str
) -> None:
    calls = {}
    for wait_s, stream in itertools.product((0.9, 100.0), (True, False)):
        engines = Engines([(wait_s, kind("A sentence."))])
        calls[wait_s, stream] = post(encoding, engines, path, HttpCall(), stream=stream)
    error = orjson.loads(calls[0.9, True].parts[0][1])["error"]
    row = TABLE[kind]
    assert (error["type"], error["code"]) == (row.type, row.code)
    assert calls[0.9, True].status == (0.9, row.http_status)
    assert calls[0.9, False].status == (0.9, row.http_status)
    assert calls[100.0, False].status == (100.0, row.http_status), "without stream, at any time"
    late = calls[100.0, True]
    assert late.status == (1.0, 200)
    (_, event), end = [(time_s, data) for time_s, data in late.parts if data != COMMENT]
    assert end == (100.0, DONE)
    said = orjson.loads(event.removeprefix(b"data: "))["error"]
    assert (said["type"], said["param"], said["code"]) == (error["type"], error["param"], error["code"])
    assert late.sent[-1][1]["more_body"] is False


def test_a_failure_after_tokens_ends_the_stream_with_its_event(encoding: HarmonyEncoding, path: str) -> None:
    steps = [*tokens(encoding, 0.5, 0.0, 0.0), (20.0, CantataError("broken"))]
    call = post(encoding, Engines(steps), path, HttpCall())
    assert call.status == (0.5, 200)
    assert orjson.loads(call.parts[-2][1].removeprefix(b"data: "))["error"]["code"] == "internal_error"
    assert call.parts[-1] == (20.5, DONE)


def test_the_waiting_time_for_a_status_covers_the_whole_admission(
    encoding: HarmonyEncoding, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that waits for its turn to be tokenized does not hold the headers back either."""

    async def work() -> HttpCall:
        async with gateway(encoding, Engines(tokens(encoding, 0.0))) as connected:
            prompts = connected.service.prompts
            chat, completion = prompts.chat, prompts.completion

            async def slow_chat(request: Any) -> Any:
                await asyncio.sleep(30.0)
                return await chat(request)

            async def slow_completion(prompt: Any, param: str) -> Any:
                await asyncio.sleep(30.0)
                return await completion(prompt, param)

            monkeypatch.setattr(prompts, "chat", slow_chat)
            monkeypatch.setattr(prompts, "completion", slow_completion)
            return await HttpCall().run(connected, path, {**BODIES[path], "stream": True})

    call = virtual_time.run(work())
    assert call.status == (1.0, 200)
    assert call.comments == [16.0]
    assert call.parts[-1] == (30.0, DONE)


@pytest.mark.parametrize("leaves_at", [0.5, 5.0, 101.0], ids=["before-headers", "before-token", "in-a-gap"])
def test_a_client_that_leaves_is_noticed_at_once(
    encoding: HarmonyEncoding, leaves_at: float, path: str
) -> None:
    engines = Engines(tokens(encoding, 100.0, 0.0, 50.0))
    call = post(encoding, engines, path, HttpCall(leaves_at=leaves_at))
    assert engines.left == [leaves_at]
    assert max((time_s for time_s, _ in call.sent), default=0.0) <= leaves_at


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("leaves_at", [0.5, 5.0, 101.0], ids=["before-headers", "before-token", "in-a-gap"])
def test_nor_is_its_request_left_behind_by_a_server_that_cancels_it_too(
    encoding: HarmonyEncoding, leaves_at: float, stream: bool, path: str
) -> None:
    for num_turns in range(12):
        engines = Engines(tokens(encoding, 100.0, 0.0, 50.0))
        call = HttpCall(leaves_at=leaves_at, cancelled_after=num_turns)
        post(encoding, engines, path, call, stream=stream)
        assert engines.left == [leaves_at], num_turns


@pytest.mark.parametrize("stalls_at", [2.0, 101.0], ids=["before-token", "in-a-gap"])
def test_a_client_that_stops_reading_is_cut_off_also_while_there_are_no_tokens(
    encoding: HarmonyEncoding, stalls_at: float, path: str
) -> None:
    engines = Engines(tokens(encoding, 100.0, 0.0, 1000.0))
    call = post(encoding, engines, path, HttpCall(stalls_at=stalls_at))
    first_unread = 16.0 if stalls_at == 2.0 else 115.0
    assert engines.left == [first_unread + GatewayConfig().send_timeout_s]
    assert max(time_s for time_s, _ in call.sent) < stalls_at


class GrpcCall:
    """A call's context; what the client got, with the time of each message."""

    def __init__(self) -> None:
        self.sent: list[tuple[float, str]] = []

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return ()

    async def send_initial_metadata(self, metadata: object) -> None:
        await asyncio.sleep(0)
        self.sent.append((now_s(), "metadata"))

    async def write(self, event: pb.ChatEvent) -> None:
        self.sent.append((now_s(), event.WhichOneof("event") or ""))

    async def abort(self, code: grpc.StatusCode, details: str, trailing: object) -> None:
        self.sent.append((now_s(), code.name))
        raise Cancelled(details)


def chat_stream(encoding: HarmonyEncoding, engines: Engines, leaves_at: float | None = None) -> GrpcCall:
    call = GrpcCall()

    async def work() -> None:
        async with gateway(encoding, engines) as connected:
            servicer = InferenceServicer(connected.service, GatewayConfig())
            serving = asyncio.create_task(servicer.ChatStream(HELLO, cast(Any, call)))
            await asyncio.wait({serving}, timeout=leaves_at)
            serving.cancel()
            with contextlib.suppress(Cancelled, asyncio.CancelledError):
                await serving

    virtual_time.run(work())
    return call


def test_grpc_sends_its_metadata_after_a_second(encoding: HarmonyEncoding) -> None:
    call = chat_stream(encoding, Engines(tokens(encoding, 81.8)))
    assert call.sent[:2] == [(1.0, "metadata"), (81.8, "text")]
    assert call.sent[-1] == (81.8, "usage")


def test_grpc_sends_its_metadata_with_a_quick_first_message(encoding: HarmonyEncoding) -> None:
    call = chat_stream(encoding, Engines(tokens(encoding, 0.25, 50.0)))
    assert call.sent[0] == (0.25, "text")
    assert "metadata" not in dict(call.sent).values()


@pytest.mark.parametrize(("wait_s", "before"), [(0.9, []), (5.0, [(1.0, "metadata")])])
def test_grpc_has_its_status_at_any_time(
    encoding: HarmonyEncoding, wait_s: float, before: list[tuple[float, str]]
) -> None:
    call = chat_stream(encoding, Engines([(wait_s, Overloaded("A sentence."))]))
    assert call.sent == [*before, (wait_s, "RESOURCE_EXHAUSTED")]


@pytest.mark.parametrize("leaves_at", [0.5, 5.0, 101.0], ids=["before-metadata", "before-token", "in-a-gap"])
def test_a_grpc_client_that_leaves_is_noticed_at_once(encoding: HarmonyEncoding, leaves_at: float) -> None:
    engines = Engines(tokens(encoding, 100.0, 0.0, 50.0))
    chat_stream(encoding, engines, leaves_at)
    assert engines.left == [leaves_at]


def test_serve_sends_metadata_with_the_first_message_only(encoding: HarmonyEncoding) -> None:
    async def work() -> list[tuple[float, str]]:
        async with gateway(encoding, Engines(tokens(encoding, 81.8))) as connected:
            servicer = InferenceServicer(connected.service, GatewayConfig())
            context = _Context(cast(Any, GrpcCall()))
            serving = asyncio.create_task(context.run(servicer.ChatStream(HELLO, cast(Any, context))))
            sent: list[tuple[float, str]] = []
            while (event := await context.written.get()) is not None:
                sent.append((now_s(), event.WhichOneof("event") or ""))
            await serving
            return sent

    sent = virtual_time.run(work())
    assert sent[0] == (81.8, "text")
    assert sent[-1] == (81.8, "usage")
