"""Which replica a sequence goes to, and where it goes after a refusal."""

from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from cluster.generation.dispatch import Dispatcher
from cluster.metrics import GatewayMetrics
from cluster.router.client import EngineClient
from cluster.router.table import LoadTable, Replica, StaticReplicas
from tests.support.fake_engine import FakeEngine, Script
from workers import errors
from workers.request import EngineOutput, EngineRequest, SamplingParams

REQUEST = EngineRequest("r1", (5, 6), SamplingParams(seed=1, max_tokens=8))


class Cluster:
    """Two engines, a dispatcher over them, and what it counts."""

    def __init__(self, engines: list[FakeEngine], client: EngineClient) -> None:
        self.engines = engines
        self.loads = LoadTable(seed=3)
        self.replicas = [Replica(f"r{index}", engine.address) for index, engine in enumerate(engines)]
        self.metrics = GatewayMetrics()
        self.now = 0.0
        self.dispatcher = Dispatcher(StaticReplicas(self.replicas, self.loads), client, self.metrics, clock=lambda: self.now)

    async def read(self, deadline: float | None = None) -> list[EngineOutput]:
        async with aclosing(self.dispatcher.stream(REQUEST, deadline)) as outputs:
            return [output async for output in outputs]

    def retries(self, error: str) -> float:
        return self.metrics.registry.get_sample_value("cantata_gateway_retries_total", {"error": error}) or 0.0

    def num_requests(self) -> list[int]:
        return [len(engine.requests) for engine in self.engines]


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    engines = [await FakeEngine().start() for _ in range(2)]
    client = EngineClient()
    cluster = Cluster(engines, client)
    yield cluster
    assert all(cluster.loads.in_flight(replica) == 0 for replica in cluster.replicas), "a release is missing"
    await client.close()
    for engine in engines:
        await engine.stop()


@pytest.mark.parametrize("error", [errors.Overloaded("full"), errors.EngineDead("gone")])
async def test_a_refusal_goes_to_the_other_replica(cluster: Cluster, error: errors.CantataError) -> None:
    cluster.engines[0].answer = lambda request: Script(refusal=error)
    cluster.engines[1].answer = lambda request: Script([7], finish="length")
    for _ in range(6):
        assert (await cluster.read())[0].token_ids == (7,)
    assert len(cluster.engines[1].requests) == 6
    assert cluster.retries(type(error).__name__) == len(cluster.engines[0].requests) > 0
    if isinstance(error, errors.EngineDead):
        assert len(cluster.engines[0].requests) == 1, "a replica that died is avoided for a while"


async def test_the_last_refusal_is_what_the_client_gets(cluster: Cluster) -> None:
    for engine in cluster.engines:
        engine.answer = lambda request: Script(refusal=errors.Overloaded("full", 4.0))
    with pytest.raises(errors.Overloaded) as caught:
        await cluster.read()
    assert caught.value.retry_after_s == 4.0
    assert cluster.num_requests() == [1, 1]


async def test_a_draining_engine_s_abort_before_the_first_token_goes_elsewhere(cluster: Cluster) -> None:
    cluster.engines[0].answer = lambda request: Script([9], finish="abort")
    cluster.engines[1].answer = lambda request: Script([7], finish="length")
    for _ in range(4):
        assert (await cluster.read())[0].token_ids == (7,)


async def test_what_is_wrong_with_the_request_is_not_tried_again(cluster: Cluster) -> None:
    for engine in cluster.engines:
        engine.answer = lambda request: Script(refusal=errors.InvalidRequest("no", "top_k"))
    with pytest.raises(errors.InvalidRequest):
        await cluster.read()
    assert sum(cluster.num_requests()) == 1


async def test_after_the_first_token_nothing_is_tried_again(cluster: Cluster) -> None:
    for engine in cluster.engines:
        engine.answer = lambda request: Script([7, 8], break_after=1, failure=errors.EngineDead("gone"))
    with pytest.raises(errors.EngineDead):
        await cluster.read()
    assert sum(cluster.num_requests()) == 1


async def test_an_engine_s_error_is_generic(cluster: Cluster) -> None:
    for engine in cluster.engines:
        engine.answer = lambda request: Script([7], finish="error")
    with pytest.raises(errors.CantataError) as caught:
        await cluster.read()
    assert type(caught.value) is errors.CantataError
    assert "scripted" not in caught.value.message


async def test_a_deadline_counts_from_the_request_and_not_from_the_try(cluster: Cluster) -> None:
    for engine in cluster.engines:
        engine.answer = lambda request: Script([7], finish="length")
    cluster.now = 10.0
    await cluster.read(deadline=40.0)
    (request,) = [request for engine in cluster.engines for request in engine.requests]
    assert request.deadline_s == pytest.approx(30.0, abs=1.0)
    cluster.now = 41.0
    with pytest.raises(errors.DeadlineExceeded):
        await cluster.read(deadline=40.0)
    assert sum(cluster.num_requests()) == 1
