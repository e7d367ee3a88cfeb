"""The requests that the service sends to engines, without servers."""

import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
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
    Journal,
    ModelInfo,
)
from cluster.generation import running as running_module
from cluster.generation import service as service_module
from cluster.harmony.message import Message
from tests.support.gateway import VOCAB_SIZE, make_encoding, turn
from workers.errors import CantataError, InvalidRequest, ModelNotFound, Overloaded
from workers.request import EngineOutput, EngineRequest, SamplingParams


class Client:
    """An EngineClient whose engines answer one token, or fail, or do as told.

    Attributes:
        play: makes the outputs of a request.
    """

    def __init__(self) -> None:
        self.requests: list[EngineRequest] = []
        self.play: Callable[[], Iterable[EngineOutput]] = lambda: [EngineOutput((5,), finish_reason="length")]
        self.failure: CantataError | None = None
        self.closed = False

    async def generate(self, replica: Replica, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        self.requests.append(request)
        if self.failure is not None:
            raise self.failure
        for output in self.play():
            yield output

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


async def test_latencies_are_those_of_tokens(
    service: GenerationService, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seconds to the first two tokens; then one token after 0.015 s, three after 0.12 s."""
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], time=time.time)
    monkeypatch.setattr(running_module, "time", clock)
    monkeypatch.setattr(service_module, "time", clock)

    def play() -> Iterator[EngineOutput]:
        for after_s, num_tokens in ((2.0, 2), (0.015, 1), (0.5, 0), (0.12 - 0.5, 3), (4.0, 0)):
            now[0] += after_s
            yield EngineOutput((5,) * num_tokens, finish_reason="length" if after_s == 4 else None)

    client.play = play
    await read(await service.complete(CompletionRequest(((1, 2, 3),), SamplingParams(max_tokens=9))))
    value = service.metrics.registry.get_sample_value
    gaps = "cantata_gateway_inter_token_latency_seconds"
    assert value(f"{gaps}_count") == 4
    assert value(f"{gaps}_sum") == pytest.approx(0.135)
    assert [value(f"{gaps}_bucket", {"le": bound}) for bound in ("0.01", "0.02", "0.03", "0.05")] == [
        0,
        1,
        1,
        4,
    ]
    first, whole = "cantata_gateway_time_to_first_token_seconds", "cantata_gateway_request_duration_seconds"
    assert [value(f"{first}_{part}") for part in ("count", "sum")] == [1, pytest.approx(2.0)]
    assert [value(f"{whole}_{part}") for part in ("count", "sum")] == [1, pytest.approx(6.135)]


async def test_a_journal_has_each_output_and_another_service_goes_on_after_it(
    service: GenerationService, client: Client
) -> None:
    encoding = service.prompts.encoding
    ids = turn(encoding, reasoning="Hm.", text="Hello there.")
    request = ChatRequest((Message("user", "Hi"),), num_bytes=2, per_token=True)
    kept: list[EngineOutput] = []

    async def keep(output: EngineOutput) -> None:
        kept.append(output)

    def plays(after: int) -> list[EngineOutput]:
        outputs = [EngineOutput((id,)) for id in ids[after:]]
        return [*outputs[:-1], EngineOutput((ids[-1],), finish_reason="stop", stop_token_id=ids[-1])]

    async def events(begun: EngineOutput) -> list[object]:
        kept.clear()
        client.requests.clear()
        generation = await service.chat(request, journal=Journal(keep, begun))
        async with aclosing(generation):
            return [event async for event in generation]

    client.play = lambda: plays(0)
    whole = await events(EngineOutput())
    assert [output.token_ids for output in kept] == [(id,) for id in ids]
    for taken in (1, 4, len(ids) - 1):
        client.play = lambda taken=taken: plays(taken)
        assert await events(EngineOutput(tuple(ids[:taken]))) == whole
        assert client.requests[0].output_token_ids == tuple(ids[:taken])
        assert [output.token_ids for output in kept] == [(id,) for id in ids[taken:]]
    # It had ended, and only its end was not said: nothing runs again.
    ended = EngineOutput(tuple(ids), finish_reason="stop", stop_token_id=ids[-1])
    assert await events(ended) == whole
    assert not client.requests
