"""The choice of a sequence's replica, at first and after a refusal."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cluster.fleet import dispatch
from cluster.fleet.client import EngineClient
from cluster.fleet.directory import ReplicaSet
from cluster.fleet.dispatch import MAX_ENGINE_DEATHS, RESUME_WAIT_S, Dispatcher
from cluster.fleet.table import LoadTable, Replica, RoutingHint
from cluster.metrics import GatewayMetrics
from tests.support.fake_engine import FakeEngine, Script
from workers import errors
from workers.errors import EngineDead
from workers.kv_cache.prefix_cache import block_hashes, hash_root
from workers.request import EngineOutput, EngineRequest, SamplingParams, TokenLogprobs

REQUEST = EngineRequest("r1", (5, 6), SamplingParams(seed=1, max_tokens=8))


class Cluster:
    """Engines, a dispatcher over them, and what it counts."""

    def __init__(self, engines: list[FakeEngine], client: EngineClient) -> None:
        self.engines = engines
        self.client = client
        self.loads = LoadTable(seed=3)
        self.replicas = [Replica(f"r{index}", engine.address, "1") for index, engine in enumerate(engines)]
        self.metrics = GatewayMetrics()
        self.now = 0.0
        self.set = ReplicaSet(self.loads)
        self.set.replace(self.replicas)
        self.dispatcher = Dispatcher(self.set, client, self.metrics, clock=lambda: self.now)

    async def read(self, deadline: float | None = None) -> list[EngineOutput]:
        stream = self.dispatcher.stream(REQUEST, deadline, RoutingHint())
        async with asyncio.timeout(60), aclosing(stream) as outputs:
            return [output async for output in outputs]

    def retries(self, error: str) -> float:
        return (
            self.metrics.registry.get_sample_value("cantata_gateway_retries_total", {"error": error}) or 0.0
        )

    def resumptions(self) -> float:
        return self.metrics.registry.get_sample_value("cantata_gateway_resumptions_total") or 0.0

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


TOO_LONG = errors.ContextLengthExceeded("too long here", "max_tokens")


async def test_what_is_too_long_for_one_replica_may_fit_another(cluster: Cluster) -> None:
    cluster.engines[0].answer = lambda request: Script(refusal=TOO_LONG)
    cluster.engines[1].answer = lambda request: Script([7], finish="length")
    for _ in range(6):
        assert (await cluster.read())[0].token_ids == (7,)
    assert cluster.num_requests()[0] > 0


@pytest.mark.parametrize("other", [TOO_LONG, errors.Overloaded("full")])
async def test_what_is_too_long_wherever_there_is_room_is_refused(
    cluster: Cluster, other: errors.CantataError
) -> None:
    """If the replica that could take it is full, the client may come again."""
    for engine, refusal in zip(cluster.engines, (TOO_LONG, other), strict=True):
        engine.answer = lambda request, refusal=refusal: Script(refusal=refusal)
    with pytest.raises(type(other)):
        await cluster.read()
    assert cluster.num_requests() == [1, 1]


GONE = errors.EngineDead("gone")
TOKENS = [31, 32, 33, 34, 35, 36]


def goes_on(request: EngineRequest) -> Script:
    """Answer as an engine does: tokens of the request are not sent again."""
    return Script(TOKENS[len(request.output_token_ids) :], num_cached_tokens=1)


def breaks_after(count: int, failure: errors.CantataError) -> Callable[[EngineRequest], Script]:
    return lambda request: replace(goes_on(request), break_after=count, failure=failure, num_cached_tokens=2)


@pytest.mark.parametrize(("count", "num_cached"), [(1, 2), (3, 0), (5, 2)])
async def test_a_stream_goes_on_at_another_replica(cluster: Cluster, count: int, num_cached: int) -> None:
    for engine in cluster.engines:
        engine.answer = lambda request: (
            goes_on(request)
            if request.output_token_ids
            else replace(breaks_after(count, GONE)(request), num_cached_tokens=num_cached)
        )
    outputs = await cluster.read()
    assert [token for output in outputs for token in output.token_ids] == TOKENS
    assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + ["stop"]
    assert {output.num_cached_tokens for output in outputs} == {num_cached}, "the first's count stays"
    first, second = sorted(
        (request for engine in cluster.engines for request in engine.requests),
        key=lambda r: len(r.output_token_ids),
    )
    assert cluster.num_requests() == [1, 1]
    assert second.output_token_ids == tuple(TOKENS[:count])
    assert (second.prompt_token_ids, second.sampling) == (first.prompt_token_ids, first.sampling)
    assert cluster.resumptions() == 1


async def test_a_resumed_request_is_resumed_behind_all_its_output(cluster: Cluster) -> None:
    for engine in cluster.engines:
        engine.answer = lambda request: (
            goes_on if len(request.output_token_ids) > 2 else breaks_after(2, errors.EngineDead("gone"))
        )(request)
    request = replace(REQUEST, output_token_ids=(31,))
    async with aclosing(cluster.dispatcher.stream(request, None, RoutingHint())) as outputs:
        assert [token async for output in outputs for token in output.token_ids] == TOKENS[1:]
    assert {engine.requests[0].output_token_ids for engine in cluster.engines} == {(31,), (31, 32, 33)}


async def test_a_draining_engine_s_abort_in_the_middle_goes_on_elsewhere(cluster: Cluster) -> None:
    def answer(request: EngineRequest) -> Script:
        return goes_on(request) if request.output_token_ids else Script(TOKENS[:3], finish="abort")

    for engine in cluster.engines:
        engine.answer = answer
    # The tokens that come with the abort are computed again.
    assert [token for output in await cluster.read() for token in output.token_ids] == TOKENS


async def test_without_another_replica_the_stream_ends_with_what_happened(cluster: Cluster) -> None:
    for engine in cluster.engines:
        engine.answer = breaks_after(1, errors.EngineDead("gone"))
    seen: list[int] = []

    async def read() -> None:
        async with aclosing(cluster.dispatcher.stream(REQUEST, None, RoutingHint())) as outputs:
            async for output in outputs:
                seen.extend(output.token_ids)

    with pytest.raises(errors.EngineDead):
        await read()
    assert seen == TOKENS[:2]
    assert cluster.num_requests() == [1, 1]


async def test_a_request_that_kills_engines_does_not_get_them_all() -> None:
    engines = [await FakeEngine().start() for _ in range(MAX_ENGINE_DEATHS + 2)]
    client = EngineClient()
    cluster = Cluster(engines, client)
    for engine in engines:
        engine.answer = lambda request: Script([7], break_after=0, failure=errors.EngineDead("gone"))
    with pytest.raises(errors.EngineDead):
        await cluster.read()
    assert sum(cluster.num_requests()) == MAX_ENGINE_DEATHS
    await client.close()
    for engine in engines:
        await engine.stop()


async def test_a_stream_goes_on_at_a_replica_that_was_started_again(cluster: Cluster) -> None:
    """One replica dies under it and comes back at its old address; then the other one dies."""
    num_starts = dict.fromkeys(("r0", "r1"), 1)

    def start(name: str) -> None:
        num_starts[name] += 1
        cluster.replicas = [
            Replica(replica.id, replica.address, f"start {num_starts[replica.id]}")
            for replica in cluster.replicas
        ]
        cluster.set.replace(cluster.replicas)

    def answers(name: str) -> Callable[[EngineRequest], Script]:
        def answer(request: EngineRequest) -> Script:
            if len(request.output_token_ids) == 4:
                return goes_on(request)
            start(name)
            return breaks_after(2, GONE)(request)

        return answer

    for name, engine in zip(("r0", "r1"), cluster.engines, strict=True):
        engine.answer = answers(name)
    assert [token for output in await cluster.read() for token in output.token_ids] == TOKENS
    assert sum(cluster.num_requests()) == 3


async def test_replicas_that_cannot_be_reached_did_not_die_of_the_request() -> None:
    engines = [await FakeEngine().start() for _ in range(MAX_ENGINE_DEATHS + 1)]
    client = EngineClient()
    cluster = Cluster(engines, client)
    for engine in engines[1:]:
        await engine.stop()
    engines[0].answer = goes_on
    cluster.set.failed(cluster.replicas[0])  # the others first
    try:
        assert [token for output in await cluster.read() for token in output.token_ids] == TOKENS
        assert cluster.retries("EngineDead") == MAX_ENGINE_DEATHS
    finally:
        await client.close()
        await engines[0].stop()


async def test_a_stream_that_is_handed_on_by_replicas_that_drain_is_not_given_up() -> None:
    engines = [await FakeEngine().start() for _ in range(MAX_ENGINE_DEATHS + 2)]
    client = EngineClient()
    cluster = Cluster(engines, client)

    def answer(request: EngineRequest) -> Script:
        done = len(request.output_token_ids)
        return (
            goes_on(request) if done > MAX_ENGINE_DEATHS else Script(TOKENS[done : done + 2], finish="abort")
        )

    for engine in engines:
        engine.answer = answer
    assert [token for output in await cluster.read() for token in output.token_ids] == TOKENS
    await client.close()
    for engine in engines:
        await engine.stop()


async def test_a_stream_whose_replica_died_waits_for_room_at_a_full_one(cluster: Cluster) -> None:
    num_refused = 0

    def answer(request: EngineRequest) -> Script:
        nonlocal num_refused
        if not request.output_token_ids:
            return breaks_after(2, GONE)(request)
        num_refused += 1
        return goes_on(request) if num_refused > 3 else Script(refusal=errors.Overloaded("full", 0.0))

    for engine in cluster.engines:
        engine.answer = answer
    assert [token for output in await cluster.read() for token in output.token_ids] == TOKENS
    assert (cluster.resumptions(), cluster.retries("Overloaded")) == (1, 3)


async def test_a_stream_does_not_wait_for_ever_for_room(cluster: Cluster) -> None:
    def answer(request: EngineRequest) -> Script:
        if not request.output_token_ids:
            return breaks_after(2, GONE)(request)
        cluster.now += RESUME_WAIT_S
        return Script(refusal=errors.Overloaded("full", 0.0))

    for engine in cluster.engines:
        engine.answer = answer
    with pytest.raises(errors.Overloaded):
        await cluster.read()


async def test_the_wait_for_room_begins_anew_after_each_replica() -> None:
    """The time that a sequence waited before it found room does not count."""
    engines = [await FakeEngine().start() for _ in range(3)]
    client = EngineClient()
    cluster = Cluster(engines, client)
    full = Script(refusal=errors.Overloaded("full", 0.0))
    answers = [
        (0.0, breaks_after(2, GONE)),
        (0.0, lambda request: full),
        (0.0, lambda request: full),
        (0.6 * RESUME_WAIT_S, breaks_after(1, GONE)),
        (0.6 * RESUME_WAIT_S, lambda request: full),
        (0.0, goes_on),
    ]

    def answer(request: EngineRequest) -> Script:
        passes_s, script = answers.pop(0)
        cluster.now += passes_s
        return script(request)

    for engine in engines:
        engine.answer = answer
    assert [token for output in await cluster.read() for token in output.token_ids] == TOKENS
    assert cluster.resumptions() == 2
    await client.close()
    for engine in engines:
        await engine.stop()


@pytest.mark.parametrize(("asked_s", "waits_s"), [(0.0, 0.05), (3.0, 3.0), (600.0, 5.0)])
async def test_a_full_replica_is_asked_again_when_it_said_within_bounds(
    monkeypatch: pytest.MonkeyPatch, asked_s: float, waits_s: float
) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(dispatch, "asyncio", SimpleNamespace(sleep=sleep))
    tries = dispatch._Tries(lambda: 0.0)
    assert tries.may_go_on(Replica("r", "host:1", "1"), errors.Overloaded("full", asked_s))
    assert await tries.wait_for_room()
    assert waited == [waits_s]


async def test_what_the_router_is_told_of_a_prompt(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its full blocks and what follows them, by which prompts part that are no longer."""

    threads: list[threading.Thread] = []
    hashed = dispatch._hint

    def spied(request: EngineRequest) -> RoutingHint:
        threads.append(threading.current_thread())
        return hashed(request)

    monkeypatch.setattr(dispatch, "_hint", spied)

    async def hint(*tokens: int) -> RoutingHint:
        return await cluster.dispatcher.hint(replace(REQUEST, prompt_token_ids=tokens))

    shared = tuple(range(1, 17))
    first, second = await hint(*shared, 5), await hint(*shared, 6)
    assert first.block_hashes == second.block_hashes
    assert len(first.block_hashes) == 1
    assert first.tail != second.tail
    assert (await hint(5)).tail != first.tail, "it stands for all before it"
    assert (await hint(*shared)).tail not in (b"", first.tail)
    assert set(threads) == {threading.main_thread()}
    long = await hint(*shared * 3000)
    assert (len(long.block_hashes), long.tail) == (2048, b"")
    assert threads[-1] is not threading.main_thread(), "it takes milliseconds"
    cluster.set.replace(cluster.replicas[:1])
    assert (await hint(*shared, 5)).block_hashes == (), "with one replica there is nothing to choose"


async def test_conversations_stay_with_their_replica(cluster: Cluster) -> None:
    for engine in cluster.engines:
        engine.answer = lambda request: Script([7])
    turns = {number: tuple(range(300 * number, 300 * number + 100)) for number in range(6)}
    homes: dict[int, int] = {}
    for _ in range(4):
        for number, prompt in turns.items():
            before = cluster.num_requests()
            request = replace(REQUEST, prompt_token_ids=prompt)
            hint = await cluster.dispatcher.hint(request)
            async with aclosing(cluster.dispatcher.stream(request, None, hint)) as outputs:
                assert [output async for output in outputs]
            (home,) = [index for index in range(2) if cluster.num_requests()[index] > before[index]]
            assert homes.setdefault(number, home) == home
            turns[number] = (*prompt, *range(50))
    assert set(homes.values()) == {0, 1}


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


async def test_after_close_no_stream_goes_on_elsewhere(cluster: Cluster) -> None:
    """The server closes the connections soon after: a resumed stream would end without an event."""
    for engine in cluster.engines:
        engine.answer = lambda request: Script([7, 8, 9], gate=asyncio.Event(), gate_after=1)
    async with aclosing(cluster.dispatcher.stream(REQUEST, None, RoutingHint())) as outputs:
        assert (await anext(outputs)).token_ids == (7,)
        await cluster.client.close()
        with pytest.raises(errors.EngineDead, match="shutting down"):
            await anext(outputs)
    with pytest.raises(errors.EngineDead, match="shutting down"):
        await cluster.read()
    assert sum(cluster.num_requests()) == 1


async def test_prompts_with_different_salts_have_nothing_in_common(cluster: Cluster) -> None:
    """Engines share no KV between them, so that the router must not expect it."""
    prompt = tuple(range(40))
    hints = [
        dispatch._hint(replace(REQUEST, prompt_token_ids=prompt, cache_salt=salt, adapter=adapter))
        for adapter in (None, "a")
        for salt in (None, "a", "b")
    ]
    for hashes in zip(*((*hint.block_hashes, hint.tail) for hint in hints), strict=True):
        assert len(set(hashes)) == len(hints)
    for hint, root in zip(
        hints, (hash_root(a, s) for a in (None, "a") for s in (None, "a", "b")), strict=True
    ):
        assert list(hint.block_hashes) == block_hashes(prompt, root=root), "as the engines hash them"


async def test_prompt_logprobs_come_once_though_the_replica_dies_among_them(cluster: Cluster) -> None:
    entries = tuple(TokenLogprobs(-float(position)) for position in range(1, 6))
    died = EngineDead("gone")

    class Client:
        num_calls = 0

        async def generate(self, replica: Replica, request: EngineRequest) -> AsyncIterator[EngineOutput]:
            self.num_calls += 1
            if self.num_calls == 1:
                yield EngineOutput(prompt_logprobs=entries[:2])
                yield EngineOutput(prompt_logprobs=entries[2:3])
                raise died
            yield EngineOutput(prompt_logprobs=entries[:1])
            yield EngineOutput(prompt_logprobs=entries[1:4])
            yield EngineOutput((7,), prompt_logprobs=entries[4:])
            if self.num_calls == 2:
                raise died
            yield EngineOutput((8,), finish_reason="length")

    dispatcher = Dispatcher(cluster.set, Client(), cluster.metrics)  # type: ignore[arg-type]
    cluster.set.replace([*cluster.replicas, Replica("r2", "nowhere:1")])
    async with aclosing(dispatcher.stream(REQUEST, None, RoutingHint())) as outputs:
        found = [output async for output in outputs]
    assert sum((output.prompt_logprobs for output in found), ()) == entries
    assert [output.token_ids for output in found if output.token_ids] == [(7,), (7,), (8,)]
