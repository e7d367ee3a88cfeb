"""The requests that the service sends to engines, without servers."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import pytest

from cluster.assembly import connect
from cluster.fleet import dispatch
from cluster.fleet.client import EngineClient
from cluster.fleet.directory import ReplicaSet
from cluster.fleet.table import Replica
from cluster.generation import (
    Capacity,
    ChatRequest,
    CompletionRequest,
    Generation,
    GenerationService,
    ModelInfo,
)
from cluster.harmony.message import Message
from tests.support.gateway import VOCAB_SIZE, make_encoding
from workers.errors import CantataError, InvalidRequest, ModelNotFound, Overloaded
from workers.request import EngineOutput, EngineRequest, SamplingParams


class Client:
    """An EngineClient whose engines answer one token, or fail."""

    def __init__(self) -> None:
        self.requests: list[EngineRequest] = []
        self.failure: CantataError | None = None
        self.closed = False

    async def generate(self, replica: Replica, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        self.requests.append(request)
        if self.failure is not None:
            raise self.failure
        yield EngineOutput((5,), finish_reason="length")

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
async def service(client: Client, tmp_path: Path) -> AsyncIterator[GenerationService]:
    replicas = ReplicaSet()
    replicas.replace([Replica("a", "host:1"), Replica("b", "host:2")])
    model, engines = ModelInfo("m", 4096, VOCAB_SIZE), cast(EngineClient, client)
    gateway = connect(model, make_encoding(tmp_path), replicas, engines, capacity=Capacity(8, None))
    yield gateway.service
    await gateway.service.close()
    assert client.closed


def in_flight(service: GenerationService) -> float:
    value = service.metrics.registry.get_sample_value("cantata_gateway_in_flight_requests")
    assert value is not None
    return value


async def read(generation: Generation) -> None:
    async with aclosing(generation):
        async for _ in generation:
            pass


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return a list that grows by each prompt that is hashed."""
    prompts: list[tuple[int, ...]] = []
    make: Callable[[EngineRequest], Any] = dispatch._hint

    def spy(request: EngineRequest) -> Any:
        prompts.append(request.prompt_token_ids)
        return make(request)

    monkeypatch.setattr(dispatch, "_hint", spy)
    return prompts


async def test_each_prompt_is_hashed_once(
    service: GenerationService, client: Client, hashed: list[tuple[int, ...]]
) -> None:
    sampling = SamplingParams(max_tokens=1, n=4, seed=-1)
    await read(await service.chat(ChatRequest((Message("user", "Hi"),), sampling, num_bytes=2)))
    assert len(client.requests) == 4
    assert hashed == [client.requests[0].prompt_token_ids]
    assert [request.sampling.seed for request in client.requests] == [2**64 - 1, 0, 1, 2]
    hashed.clear()
    client.requests.clear()
    prompts = ((1, 2, 3), (4, 5, 6))
    await read(await service.complete(CompletionRequest(prompts, sampling)))
    assert [request.prompt_token_ids for request in client.requests] == [prompts[0]] * 4 + [prompts[1]] * 4
    assert hashed == list(prompts)
    assert len({request.request_id for request in client.requests}) == 8


async def test_every_way_out_gives_the_place_back(service: GenerationService, client: Client) -> None:
    user, two = (Message("user", "Hi"),), SamplingParams(max_tokens=1, n=2)
    generation = await service.chat(ChatRequest(user, two, num_bytes=2))
    assert in_flight(service) == 2
    await read(generation)
    assert in_flight(service) == 0
    await generation.aclose()
    assert in_flight(service) == 0
    with pytest.raises(InvalidRequest):
        await service.chat(ChatRequest((), two, num_bytes=0))
    with pytest.raises(ModelNotFound):
        await service.chat(ChatRequest(user, two, model="other", num_bytes=2))
    with pytest.raises(InvalidRequest):
        await service.complete(CompletionRequest(((VOCAB_SIZE,),), two))
    client.failure = CantataError("broken")
    with pytest.raises(CantataError, match="broken"):
        await service.complete(CompletionRequest(((1,),), two))
    assert in_flight(service) == 0
    client.failure = None
    held = await service.complete(CompletionRequest(((1,), (2,), (3,)), two))
    with pytest.raises(Overloaded):
        await service.chat(ChatRequest(user, SamplingParams(max_tokens=1, n=3), num_bytes=2))
    assert in_flight(service) == 6
    await held.aclose()
    assert in_flight(service) == 0
