"""Calls to a real gRPC engine: outputs, errors by class, cancellation."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import pytest

from cluster.fleet.client import EngineClient, _Progress
from cluster.fleet.table import Replica
from tests.support.fake_engine import FakeEngine, Script
from workers import errors
from workers.constraint.automaton import AutomatonState, TokenAutomaton
from workers.constraint.codec import Constraint
from workers.constraint.registry import KnownAutomata
from workers.request import EngineOutput, EngineRequest, SamplingParams, TokenLogprobs

REQUEST = EngineRequest("r1", (5, 6), SamplingParams(seed=1, logprobs=1, stop_token_ids=(9,)))


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    engine = await FakeEngine().start()
    yield engine
    await engine.stop()


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = EngineClient()
    yield client
    await client.close()


async def read(
    client: EngineClient, engine: FakeEngine, request: EngineRequest = REQUEST
) -> list[EngineOutput]:
    async with aclosing(client.generate(Replica("r", engine.address), request)) as outputs:
        return [output async for output in outputs]


async def test_outputs_arrive_as_they_were_sent(client: EngineClient, engine: FakeEngine) -> None:
    engine.answer = lambda request: Script([7, 8, 9], per_message=2, num_cached_tokens=16)
    first, last = await read(client, engine)
    assert (first.token_ids, first.finish_reason, first.num_cached_tokens) == ((7, 8), None, 16)
    assert (last.token_ids, last.finish_reason, last.stop_token_id) == ((9,), "stop", 9)
    assert first.logprobs[1].top == ((8, -0.5),)
    assert engine.requests[0].prompt_token_ids == (5, 6)


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequest("top_k is odd", "top_k"),
        errors.ContextLengthExceeded("too long", "prompt"),
        errors.Overloaded("full", 7.0),
        errors.ConstraintNotReady("queued", 7.0),
        errors.DeadlineExceeded("late"),
        errors.EngineDead("dead"),
        errors.CantataError("broken"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_keep_their_class(
    client: EngineClient, engine: FakeEngine, error: errors.CantataError
) -> None:
    engine.answer = lambda request: Script(refusal=error)
    with pytest.raises(type(error)) as caught:
        await read(client, engine)
    assert type(caught.value) is type(error)
    if isinstance(error, errors.InvalidRequest):
        assert isinstance(caught.value, errors.InvalidRequest)
        assert caught.value.param == error.param
    if isinstance(error, errors.Overloaded):
        assert isinstance(caught.value, errors.Overloaded)
        assert caught.value.retry_after_s == 7.0


CONSTRAINT = Constraint.of(TokenAutomaton((AutomatonState((5, 9)),)))
CONSTRAINED = replace(REQUEST, constraint=CONSTRAINT)


def refs(engine: FakeEngine) -> list[tuple[bool, bool]]:
    """Return (is named, is sent) of each message's automaton."""
    return [
        (message.HasField("constraint_ref"), message.constraint_ref.HasField("automaton"))
        for message in engine.messages
    ]


async def test_an_automaton_is_sent_once_and_named_after_that(
    client: EngineClient, engine: FakeEngine
) -> None:
    engine.answer = lambda request: Script([5, 9])
    for _ in range(3):
        assert (await read(client, engine, CONSTRAINED))[-1].token_ids == (9,)
    assert refs(engine) == [(True, True), (True, False), (True, False)]
    assert [request.constraint for request in engine.requests] == [CONSTRAINT] * 3


async def test_an_engine_that_forgot_an_automaton_is_sent_it_within_the_same_call(
    client: EngineClient, engine: FakeEngine
) -> None:
    engine.answer = lambda request: Script([5, 9])
    await read(client, engine, CONSTRAINED)
    engine.automata = KnownAutomata()
    assert [output.token_ids for output in await read(client, engine, CONSTRAINED)] == [(5,), (9,)]
    assert refs(engine) == [(True, True), (True, False), (True, True)]
    assert len(engine.requests) == 2


async def test_an_older_engine_is_sent_the_whole_automaton_each_time(
    client: EngineClient, engine: FakeEngine
) -> None:
    engine.capabilities = ()
    engine.answer = lambda request: Script([5, 9])
    for _ in range(2):
        await read(client, engine, CONSTRAINED)
    assert refs(engine) == [(False, False)] * 2
    assert [request.constraint for request in engine.requests] == [CONSTRAINT] * 2


REFUSED = errors.InvalidRequest("the grammar was refused", "constraint.grammars")
OPTIONAL = replace(CONSTRAINED, constraint=replace(CONSTRAINT, optional=True), deadline_s=60.0)


@pytest.mark.parametrize("error", [REFUSED, errors.ConstraintNotReady("queued")])
async def test_an_optional_constraint_that_is_not_ready_is_left_out(
    client: EngineClient, engine: FakeEngine, error: errors.CantataError
) -> None:
    reasons: list[str] = []
    client.on_constraint_left_out = reasons.append
    engine.answer = lambda request: Script([7, 9], refusal=error if request.constraint else None)
    assert [output.token_ids for output in await read(client, engine, OPTIONAL)] == [(7,), (9,)]
    assert reasons == ["engine"]
    assert engine.requests[-1].output_token_ids == ()
    with pytest.raises(type(error)):
        await read(client, engine, CONSTRAINED)


async def test_a_full_engine_is_not_asked_again_without_the_constraint(
    client: EngineClient, engine: FakeEngine
) -> None:
    engine.answer = lambda request: Script(refusal=errors.Overloaded("full"))
    with pytest.raises(errors.Overloaded):
        await read(client, engine, OPTIONAL)
    assert len(engine.requests) == 1


async def test_an_optional_constraint_that_fails_in_a_text_repeats_no_token(
    client: EngineClient, engine: FakeEngine
) -> None:
    """The sequence goes on from the tokens that the reader has."""
    failure = errors.InvalidRequest("the output's grammar failed", "constraint")

    def answer(request: EngineRequest) -> Script:
        if request.constraint is not None:
            return Script([7, 8, 9], break_after=2, failure=failure, num_cached_tokens=3)
        return Script([6, 9], num_cached_tokens=5)

    engine.answer = answer
    known = replace(OPTIONAL, output_token_ids=(4,))
    outputs = await read(client, engine, known)
    assert [output.token_ids for output in outputs] == [(7,), (8,), (6,), (9,)]
    assert [output.num_cached_tokens for output in outputs] == [3, 0, 0, 0]
    assert outputs[-1].finish_reason == "stop"
    first, second = engine.requests
    assert (first.output_token_ids, second.output_token_ids) == ((4,), (4, 7, 8))
    assert (second.constraint, second.sampling) == (None, first.sampling)


def test_what_a_reader_has_is_not_sent_again() -> None:
    progress = _Progress(OPTIONAL)
    first, second = TokenLogprobs(-1.0), TokenLogprobs(-2.0)
    progress.add(EngineOutput(prompt_logprobs=(first,)))
    later = EngineOutput((7,), prompt_logprobs=(first, second), num_cached_tokens=2)
    assert progress.unsent(later) == replace(later, prompt_logprobs=(second,))
    assert progress.unsent(later) == later, "only as many as came"


def test_the_rest_of_a_sequence_has_the_rest_of_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = _Progress(OPTIONAL)
    now = 145.0
    assert progress.rest().deadline_s == 15.0
    now = 160.0
    with pytest.raises(errors.DeadlineExceeded):
        progress.rest()


@pytest.mark.parametrize(
    "request_",
    [
        replace(REQUEST, cache_salt="tenant"),
        replace(REQUEST, adapter="polite"),
        replace(REQUEST, sampling=replace(REQUEST.sampling, prompt_logprobs=0)),
    ],
    ids=["cache_salt", "adapter", "prompt_logprobs"],
)
async def test_what_an_engine_does_not_list_is_not_sent(
    client: EngineClient, engine: FakeEngine, request_: EngineRequest
) -> None:
    engine.capabilities = ()
    with pytest.raises(errors.NoReplica, match="does not support"):
        await read(client, engine, request_)
    assert engine.messages == []


class WrongSecret(errors.CantataError):
    """The error of an engine that was started at another engine's port."""

    status = "UNAUTHENTICATED"


async def test_another_engine_at_the_address_is_no_failure_of_the_request(
    client: EngineClient, engine: FakeEngine
) -> None:
    engine.answer = lambda request: Script(refusal=WrongSecret("who are you"))
    with pytest.raises(errors.EngineDead) as caught:
        await read(client, engine)
    assert not caught.value.under_request


async def test_an_address_without_a_listener_is_engine_dead_within_seconds(client: EngineClient) -> None:
    gone = await FakeEngine().start()
    await gone.stop()
    async with asyncio.timeout(30):
        with pytest.raises(errors.EngineDead) as caught:
            await read(client, gone)
    assert gone.address not in caught.value.message


async def test_a_stream_cut_by_shutdown_is_engine_dead(client: EngineClient, engine: FakeEngine) -> None:
    engine.answer = lambda request: Script([7, 8], gate=asyncio.Event(), gate_after=1)
    async with aclosing(client.generate(Replica("r", engine.address), REQUEST)) as outputs:
        assert (await anext(outputs)).token_ids == (7,)
        await engine.stop()
        with pytest.raises(errors.EngineDead):
            await anext(outputs)


async def test_calls_whose_channel_is_closed_are_engine_dead(
    client: EngineClient, engine: FakeEngine
) -> None:
    engine.answer = lambda request: Script([7, 8], gate=asyncio.Event())
    engine.gate_of_load = asyncio.Event()
    replica = Replica("r", engine.address)
    calls = [asyncio.create_task(read(client, engine)), asyncio.create_task(client.load(replica, 30.0))]
    async with asyncio.timeout(30):
        await engine.arrived(1)
        await client.forget(replica)
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [errors.EngineDead, errors.EngineDead]


async def test_cancelling_the_reader_cancels_the_engine(client: EngineClient, engine: FakeEngine) -> None:
    engine.answer = lambda request: Script([7, 8], gate=asyncio.Event())
    reader = asyncio.create_task(read(client, engine))
    async with asyncio.timeout(30):
        await engine.arrived(1)
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader
        await engine.was_cancelled(1)
    assert set(engine.cancelled) == {"r1"}


async def test_the_deadline_is_the_call_s(client: EngineClient, engine: FakeEngine) -> None:
    engine.answer = lambda request: Script([7], gate=asyncio.Event())
    with pytest.raises(errors.DeadlineExceeded):
        await read(client, engine, EngineRequest("r2", (5,), SamplingParams(seed=1), deadline_s=0.1))


async def test_info_load_and_metrics(client: EngineClient, engine: FakeEngine) -> None:
    replica = Replica("r", engine.address)
    assert (await client.info(replica, 1.0)).model_name == "fake"
    assert (await client.load(replica, 1.0)).accepting
    assert "cantata_engine_preemptions_total" in await client.metrics(replica, 1.0)
    await client.forget(replica)
    assert (await client.load(replica, 1.0)).accepting


async def test_each_call_carries_the_secret_of_its_replica(client: EngineClient) -> None:
    engine = await FakeEngine(secret="a secret of some length", answer=lambda request: Script([7])).start()
    for secret, is_known in (("", False), ("another secret of some length", False), (engine.secret, True)):
        replica = Replica("r", engine.address, secret=secret)

        async def generate(replica: Replica = replica) -> object:
            async with aclosing(client.generate(replica, REQUEST)) as outputs:
                return [output.token_ids async for output in outputs]

        calls = (generate(), client.info(replica, 20), client.load(replica, 20), client.metrics(replica, 20))
        for call in calls:
            with contextlib.nullcontext() if is_known else pytest.raises(errors.EngineDead):
                assert await call
    assert len(engine.requests) == 1
    await engine.stop()
