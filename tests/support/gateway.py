"""A gateway in the test's own event loop: real HTTP and gRPC servers over fake engines."""

import asyncio
import datetime
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

from cluster.assembly import connect
from cluster.config import GatewayConfig
from cluster.fleet.client import EngineClient
from cluster.fleet.directory import ReplicaSet
from cluster.fleet.status import FleetStatus
from cluster.fleet.table import Replica
from cluster.frontend.app import build_app
from cluster.frontend.grpc_api import GrpcServer, start_grpc_server
from cluster.frontend.http_server import HttpServer
from cluster.generation import Capacity, ChatDefaults, GenerationService, ModelInfo
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.make_tokenizer import write_bpe_tokenizer
from cluster.state.state import State
from tests.support.fake_engine import FakeEngine

VOCAB_SIZE = 2048
_ENCODINGS: dict[int, HarmonyEncoding] = {}


def make_encoding(folder: Path) -> HarmonyEncoding:
    """Return the small tokenizer; made once a process."""
    if VOCAB_SIZE not in _ENCODINGS:
        write_bpe_tokenizer(folder, VOCAB_SIZE)
        _ENCODINGS[VOCAB_SIZE] = HarmonyEncoding.load(folder, VOCAB_SIZE)
    return _ENCODINGS[VOCAB_SIZE]


def turn(
    encoding: HarmonyEncoding, *, reasoning: str = "", text: str = "", call: tuple[str, str] | None = None
) -> list[int]:
    """Return the token ids that a well-behaved model generates."""
    messages = []
    if reasoning:
        messages.append(f"<|channel|>analysis<|message|>{reasoning}<|end|>")
    if text:
        messages.append(
            f"<|channel|>final<|message|>{text}<|return|>"
            if call is None
            else f"<|channel|>commentary<|message|>{text}<|end|>"
        )
    if call is not None:
        messages.append(
            f"<|channel|>commentary to=functions.{call[0]} <|constrain|>json<|message|>{call[1]}<|call|>"
        )
    return encoding.encode_with_special("<|start|>assistant".join(messages))


@dataclass
class Gateway:
    """The gateway and its clients, as a test uses them."""

    service: GenerationService
    status: FleetStatus
    url: str
    grpc_server: GrpcServer
    http: httpx.AsyncClient
    client: openai.AsyncOpenAI
    http_server: HttpServer

    @property
    def grpc_address(self) -> str:
        return self.grpc_server.address


@asynccontextmanager
async def serving(
    encoding: HarmonyEncoding,
    engines: Sequence[FakeEngine],
    *,
    config: GatewayConfig | None = None,
    capacity: Capacity | None = None,
    defaults: ChatDefaults | None = None,
    state: State | None = None,
    model_name: str = "gpt-oss-test",
    aliases: tuple[str, ...] = (),
) -> AsyncIterator[Gateway]:
    """Yield a gateway over engines that have been started."""
    replicas = ReplicaSet()
    replicas.replace([Replica(f"r{index}", engine.address) for index, engine in enumerate(engines)])
    model = ModelInfo.from_engine(
        engines[0].info(), model_name, created_unix_s=1_750_000_000, aliases=aliases
    )
    connected = connect(
        model,
        encoding,
        replicas,
        EngineClient(),
        capacity=capacity,
        defaults=defaults,
        today=lambda: datetime.date(2026, 1, 2),
    )
    service, status = connected.service, connected.status
    # A refusal has its status also where the machine is slow.
    config = config or GatewayConfig(stream_headers_s=60.0)
    # It listens from here on, so a client that is early waits instead of being refused.
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = HttpServer(build_app(service, status, config, state=state), config, service.metrics)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    grpc_server = await start_grpc_server(service, status.ready, "127.0.0.1:0", config)
    key = config.api_keys[0] if config.api_keys else None
    headers = {"authorization": f"Bearer {key}"} if key else {}
    # Certificates are of no use on loopback and take half a second to load.
    http = httpx.AsyncClient(base_url=url, headers=headers, timeout=30, verify=False)
    client = openai.AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key=key or "none",
        max_retries=0,
        http_client=httpx.AsyncClient(timeout=30, verify=False),
    )
    try:
        yield Gateway(service, status, url, grpc_server, http, client, server)
    finally:
        await client.close()
        await http.aclose()
        await grpc_server.stop(0)
        server.should_exit = True
        server.force_exit = True
        await running
        await service.close()
