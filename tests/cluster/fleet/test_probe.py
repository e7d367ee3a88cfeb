"""A replica that does not answer: suspect at first, then its streams go on elsewhere."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from cluster.fleet import probe as watch
from cluster.fleet.client import EngineClient
from cluster.fleet.directory import ReplicaSet
from cluster.fleet.dispatch import Dispatcher
from cluster.fleet.probe import Patience
from cluster.fleet.table import Replica, RoutingHint
from cluster.metrics import GatewayMetrics
from tests.support.fake_engine import FakeEngine, Script
from workers.errors import CantataError, DeadlineExceeded, EngineDead
from workers.request import EngineRequest, SamplingParams

TOKENS = [31, 32, 33, 34, 35, 36]
REQUEST = EngineRequest("r1", (5, 6), SamplingParams(seed=1, max_tokens=8))


class Cluster:
    """Two engines and what a gateway knows of them."""

    def __init__(self, engines: list[FakeEngine], patience: Patience) -> None:
        self.engines = engines
        self.replicas = ReplicaSet()
        self.replicas.replace(
            [Replica(f"r{index}", engine.address, "1") for index, engine in enumerate(engines)]
        )
        self.silences: list[tuple[str, bool]] = []
        self.changed = asyncio.Event()
        self.client = EngineClient(self._on_silence, patience)
        self.dispatcher = Dispatcher(self.replicas, self.client, GatewayMetrics())

    def _on_silence(self, replica: Replica, silent: bool) -> None:
        self.replicas.silent(replica, silent)
        self.silences.append((replica.id, silent))
        self.changed.set()

    async def heard(self, count: int) -> list[tuple[str, bool]]:
        """Return the first `count` changes, once they have come."""
        async with asyncio.timeout(20):
            while len(self.silences) < count:
                self.changed.clear()
                await self.changed.wait()
        return self.silences[:count]

    async def read(self) -> list[int]:
        async with aclosing(self.dispatcher.stream(REQUEST, None, RoutingHint())) as outputs:
            return [token async for output in outputs for token in output.token_ids]

    async def chosen(self) -> str:
        replica = await self.replicas.choose(RoutingHint(), frozenset())
        self.replicas.release(replica)
        return replica.id


@pytest.fixture
async def engines(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[FakeEngine]]:
    monkeypatch.setattr(watch, "PROBE_PERIOD_S", 0.01)
    engines = [await FakeEngine().start() for _ in range(2)]
    yield engines
    for engine in engines:
        await engine.stop()


def hang(engine: FakeEngine, gate: asyncio.Event) -> None:
    """Two tokens, then nothing, and no answers, until the gate opens."""
    engine.gate_of_load = gate
    engine.answer = lambda request: Script(TOKENS[len(request.output_token_ids) :], gate=gate, gate_after=2)


async def test_a_silent_replica_gets_no_new_sequences_until_it_answers(engines: list[FakeEngine]) -> None:
    cluster, gate = Cluster(engines, Patience(0.2, 1000.0)), asyncio.Event()
    for engine in engines:
        hang(engine, gate)
    reading = asyncio.create_task(cluster.read())
    ((silent, _),) = await cluster.heard(1)
    hung = next(replica for replica in cluster.replicas.known() if replica.id == silent)
    for _ in range(5):  # the other one has more to do
        await cluster.replicas.choose(RoutingHint(), frozenset({hung.key}))
    assert {await cluster.chosen() for _ in range(10)} == {"r0", "r1"} - {silent}
    gate.set()
    assert await cluster.heard(2) == [(silent, True), (silent, False)]
    assert await reading == TOKENS, "it was only suspect"
    await cluster.client.close()


async def test_streams_of_a_replica_that_stays_silent_go_on_at_another(engines: list[FakeEngine]) -> None:
    cluster, gate = Cluster(engines, Patience(0.2, 0.4)), asyncio.Event()

    def answer(request: EngineRequest) -> Script:
        if request.output_token_ids:
            return Script(TOKENS[len(request.output_token_ids) :])
        return Script(TOKENS, gate=gate, gate_after=2)

    for engine in engines:
        engine.answer = answer
    first = asyncio.create_task(cluster.read())
    arrivals = [asyncio.create_task(engine.arrived(1)) for engine in engines]
    _, others = await asyncio.wait(arrivals, timeout=20, return_when=asyncio.FIRST_COMPLETED)
    for other in others:
        other.cancel()
    (hung,) = [engine for engine in engines if engine.requests]
    hung.gate_of_load = gate
    async with asyncio.timeout(20):
        assert await first == TOKENS
    assert [len(engine.requests) for engine in engines] == [1, 1]
    assert await cluster.chosen() != f"r{engines.index(hung)}"
    await cluster.client.close()
    gate.set()


async def test_a_replica_without_sequences_is_not_asked(engines: list[FakeEngine]) -> None:
    cluster = Cluster(engines, Patience(0.2, 0.4))
    for engine in engines:
        engine.answer = lambda request: Script(TOKENS)
    assert await cluster.read() == TOKENS
    (watching,) = [watch._task for watch in cluster.client._watches.values()]
    assert watching is not None
    async with asyncio.timeout(20):
        await watching
    await cluster.client.close()


class NoCall:
    """A call that is never broken off."""

    def cancel(self) -> bool:
        raise AssertionError("the replica is not lost yet")


@pytest.mark.parametrize("end", [None, EngineDead("refused")], ids=["answers", "is-gone"])
async def test_silence_is_told_once_and_ends_with_any_answer(
    end: CantataError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence also ends after the last sequence has ended: otherwise the replica would be avoided
    for ever."""
    monkeypatch.setattr(watch, "PROBE_PERIOD_S", 0.01)
    late = DeadlineExceeded("no answer")
    answers, silences, call = [late, late, late, end], [], NoCall()

    async def ask(_: float) -> None:
        await asyncio.sleep(0)
        if (answer := answers.pop(0)) is not None:
            raise answer

    def on_silence(is_silent: bool) -> None:
        silences.append(is_silent)
        watching.discard(call)

    watching = watch.ReplicaWatch(ask, on_silence, Patience(1.0, 1000.0))
    watching.add(call)
    assert watching._task is not None
    async with asyncio.timeout(20):
        await watching._task
    assert silences == [True, False]


async def test_calls_are_broken_off_after_as_many_silent_probes_as_a_hang_lasts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "PROBE_PERIOD_S", 0.01)
    asked: list[float] = []
    events: list[object] = []

    async def ask(seconds: float) -> None:
        await asyncio.sleep(0)
        asked.append(seconds)
        if len(asked) <= 7:
            raise DeadlineExceeded("no answer")

    class Broken:
        def cancel(self) -> bool:
            events.append(len(asked))
            watching.discard(self)
            return True

    watching = watch.ReplicaWatch(ask, events.append, Patience(suspect_s=2.0, lost_s=10.0))
    watching.add(Broken())
    watching.add(Broken())
    assert watching._task is not None
    async with asyncio.timeout(20):
        await watching._task
    assert events == [True, 5, 5, False]
    assert asked == [2.0] * 8


async def test_a_replica_that_is_gone_for_good_is_not_asked(engines: list[FakeEngine]) -> None:
    cluster, gate = Cluster(engines, Patience(0.2, 1000.0)), asyncio.Event()
    for engine in engines:
        hang(engine, gate)
    reading = asyncio.create_task(cluster.read())
    ((silent, _),) = await cluster.heard(1)
    (replica,) = [replica for replica in cluster.replicas.known() if replica.id == silent]
    task = cluster.client._watches[replica]._task
    assert task is not None
    await cluster.client.forget(replica)
    async with asyncio.timeout(20):
        await asyncio.wait([task])
    assert task.cancelled()
    assert replica not in cluster.client._watches
    gate.set()
    assert await reading == TOKENS
    await cluster.client.close()
