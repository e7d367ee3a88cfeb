"""Background responses: made without a client, read again from any event on, cancelled, and taken
over from a gateway that has ended."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from cluster.fleet.dispatch import MAX_ENGINE_DEATHS
from cluster.frontend.responses import background as background_module
from cluster.harmony.encoding import HarmonyEncoding
from cluster.state.errors import StateUnavailable
from cluster.state.responses import ResponseRecord
from cluster.state.settings import StateConfig, location
from cluster.state.state import State, open_state
from cluster.state.tables import responses
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, serving, turn
from tests.support.response_events import read_stream
from workers.errors import EngineDead

RESPONSES = "/v1/responses"
BODY: dict[str, Any] = {"input": "Count.", "background": True, "seed": 7}


@pytest.fixture(autouse=True)
def quick_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_module, "TURN_S", 0.05)


@pytest.fixture
def ids(encoding: HarmonyEncoding) -> list[int]:
    words = " ".join(f"word{index}" for index in range(60))
    return turn(encoding, reasoning="I count to sixty.", text=words)


@pytest.fixture
async def engine(ids: list[int]) -> AsyncIterator[FakeEngine]:
    engine = await FakeEngine().start()
    engine.answer = lambda request: Script(ids[len(request.output_token_ids) :])
    yield engine
    await engine.stop()


async def new_state(folder: Path) -> State:
    settings = StateConfig(url=f"sqlite:///{folder / 'state.sqlite3'}")
    state = await open_state(location(settings, several_hosts=False), settings)
    assert state is not None
    return state


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[State]:
    state = await new_state(tmp_path)
    yield state
    await state.close()


@pytest.fixture
async def stateful(encoding: HarmonyEncoding, engine: FakeEngine, state: State) -> AsyncIterator[Gateway]:
    async with serving(encoding, [engine], state=state) as gateway:
        yield gateway


async def ended(gateway: Gateway, id: str) -> dict[str, Any]:
    """Return a response when it has ended."""
    async with asyncio.timeout(60):
        while True:
            found: dict[str, Any] = (await gateway.http.get(f"{RESPONSES}/{id}")).json()
            if found["status"] not in ("queued", "in_progress"):
                return found
            await asyncio.sleep(0.02)


async def written(state: State, id: str) -> None:
    """Wait until tokens of a response are stored."""
    async with asyncio.timeout(60):
        while True:
            if (await state.background.progress(id, "")).outputs:
                return
            await asyncio.sleep(0.02)


async def stream(gateway: Gateway, id: str, after: int | None = None) -> str:
    query = "" if after is None else f"&starting_after={after}"
    answer = await gateway.http.get(f"{RESPONSES}/{id}?stream=true{query}")
    assert answer.status_code == 200, answer.text
    return answer.text


def frames(text: str) -> list[str]:
    return [frame for frame in text.split("\n\n") if frame.startswith("event")]


async def begin(gateway: Gateway, **fields: Any) -> str:
    answer = await gateway.http.post(RESPONSES, json=BODY | fields)
    assert answer.status_code == 200, answer.text
    made = answer.json()
    assert (made["status"], made["background"], made["output"]) == ("queued", True, [])
    return str(made["id"])


async def test_a_response_is_made_without_its_client(stateful: Gateway) -> None:
    made = await stateful.client.responses.create(model="gpt-oss-test", input="Count.", background=True)
    assert made.status == "queued"
    found = await ended(stateful, made.id)
    assert found["status"] == "completed"
    assert found["background"] is True
    assert found["output"][-1]["content"][0]["text"].endswith("word59")
    assert found["usage"]["output_tokens"] > 60
    follow_up = await stateful.client.responses.create(
        model="gpt-oss-test", input="More.", previous_response_id=made.id
    )
    assert follow_up.status == "completed"


async def test_values_that_are_too_deep_to_be_written_are_refused_or_ignored(stateful: Gateway) -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(300):
        deep = {"type": "object", "properties": {"a": deep}}
    function = {"type": "function", "name": "f", "parameters": deep}
    space = {"type": "namespace", "name": "n", "tools": [function]}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"tools": [function]}, "tools[0].parameters"),
        ({"tools": [space]}, "tools[0].tools[0].parameters"),
        ({"text": {"format": {"type": "json_schema", "name": "s", "schema": deep}}}, "text.format.schema"),
        ({"structured_outputs": {"json": deep}}, "structured_outputs.json"),
    ]
    for fields, param in refused:
        for mode in ({"tool_choice": "none"}, {"background": True}, {"stream": True, "tool_choice": "none"}):
            answer = await stateful.http.post(RESPONSES, json={"input": "Hi", **fields, **mode})
            assert answer.status_code == 400, (param, mode, answer.text)
            assert answer.json()["error"]["param"] == param
    tool = {**function, "parameters": None, "output_schema": deep, "defer_loading": deep}
    ignored = {"client_metadata": deep, "moderation": deep, "reasoning": {"context": deep}, "tools": [tool]}
    made = await begin(stateful, **ignored)
    assert (await ended(stateful, made))["status"] == "completed"


async def test_its_events_are_the_same_from_any_one_on(stateful: Gateway) -> None:
    live = (await stateful.http.post(RESPONSES, json=BODY | {"stream": True})).text
    events = read_stream(live)
    id = events[0]["response"]["id"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    again = await stream(stateful, id)
    assert frames(again) == frames(live)
    for after in (0, 1, 17, len(events) - 2):
        assert frames(await stream(stateful, id, after)) == frames(live)[after + 1 :]
    assert (await ended(stateful, id)) == events[-1]["response"]
    assert frames(await stream(stateful, id, len(events) - 1)) == []
    for after in (len(events), 10**6, "x"):
        answer = await stateful.http.get(f"{RESPONSES}/{id}?stream=true&starting_after={after}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "starting_after")


async def test_a_client_that_leaves_ends_nothing(
    stateful: Gateway, engine: FakeEngine, ids: list[int]
) -> None:
    gate = asyncio.Event()
    engine.answer = lambda request: Script(ids, gate=gate, gate_after=20)
    seen: list[str] = []
    async with stateful.http.stream("POST", RESPONSES, json=BODY | {"stream": True}) as answer:
        async for line in answer.aiter_lines():
            seen.append(line)
            if '"sequence_number":10' in line:
                break
    id = seen[1].split('"id":"')[1].split('"')[0]
    running = (await stateful.http.get(f"{RESPONSES}/{id}")).json()
    assert running["status"] == "in_progress"
    gate.set()
    assert (await ended(stateful, id))["status"] == "completed"
    assert not engine.cancelled
    whole = frames(await stream(stateful, id))
    assert [line for frame in whole for line in frame.split("\n")][: len(seen) // 2] == [
        line for line in seen if line
    ][: len(seen) // 2]


async def test_cancelling(stateful: Gateway, engine: FakeEngine, ids: list[int], state: State) -> None:
    gate = asyncio.Event()
    engine.answer = lambda request: Script(ids, gate=gate, gate_after=30)
    id = await begin(stateful)
    await written(state, id)
    cancelled = await stateful.client.responses.cancel(id)
    assert cancelled.status == "cancelled"
    assert engine.cancelled
    assert (await stateful.client.responses.cancel(id)).status == "cancelled"
    last = frames(await stream(stateful, id))[-1]
    assert '"status":"cancelled"' in last
    engine.answer = lambda request: Script(ids)
    done = await begin(stateful)
    await ended(stateful, done)
    assert (await stateful.client.responses.cancel(done)).status == "completed"
    whole = (await stateful.http.post(RESPONSES, json={"input": "Hi"})).json()["id"]
    for method, path in (
        ("POST", f"{RESPONSES}/{whole}/cancel"),
        ("GET", f"{RESPONSES}/{whole}?stream=true"),
    ):
        answer = await stateful.http.request(method, path)
        assert answer.status_code == 400
        assert "background: true" in answer.json()["error"]["message"]
    refused = await stateful.http.post(RESPONSES, json=BODY | {"store": False})
    assert refused.json()["error"]["param"] == "store"


async def test_it_extends_its_conversation_once(stateful: Gateway) -> None:
    conversation = (await stateful.client.conversations.create()).id
    id = await begin(stateful, conversation=conversation)
    await ended(stateful, id)
    items = (await stateful.http.get(f"/v1/conversations/{conversation}/items?order=asc")).json()["data"]
    assert [item["type"] for item in items] == ["message", "reasoning", "message"]


async def test_it_waits_for_an_engine_that_died(
    stateful: Gateway, engine: FakeEngine, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [EngineDead("It died.") for _ in range(2)]

    def answer(request: Any) -> Script:
        rest = ids[len(request.output_token_ids) :]
        return Script(rest, break_after=15, failure=failures.pop()) if failures else Script(rest)

    engine.answer = answer
    monkeypatch.setattr(background_module, "_LONGEST_WAIT_S", 0.01)
    id = await begin(stateful)
    found = await ended(stateful, id)
    assert found["status"] == "completed"
    assert found["output"][-1]["content"][0]["text"].endswith("word59")


async def test_another_gateway_goes_on_when_one_ends(
    encoding: HarmonyEncoding, engine: FakeEngine, ids: list[int], tmp_path: Path
) -> None:
    gate = asyncio.Event()
    engine.answer = lambda request: Script(ids, gate=gate, gate_after=40)
    first = await new_state(tmp_path)
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(serving(encoding, [engine], state=first))
        id = await begin(one)
        await written(first, id)
        # It ends without a word: nothing that it holds is given up.
        worker: Any = first._worker
        for task in first._tasks:
            task.cancel()
        await worker.close()
        await first.database.close()
        stored = engine.requests[-1]
        assert stored.output_token_ids == ()
        engine.answer = lambda request: Script(ids[len(request.output_token_ids) :])
        second = await new_state(tmp_path)
        two = await stack.enter_async_context(serving(encoding, [engine], state=second))
        found = await ended(two, id)
        assert found["status"] == "completed"
        taken = engine.requests[-1]
        assert 0 < len(taken.output_token_ids) <= 40
        assert taken.output_token_ids == tuple(ids[: len(taken.output_token_ids)])
        assert taken.prompt_token_ids == stored.prompt_token_ids
        assert taken.sampling == stored.sampling
        events = read_stream(await stream(two, id))
        # The same as if nothing had happened, but for the ids.
        whole = read_stream((await two.http.post(RESPONSES, json=BODY | {"stream": True})).text)
        assert [event["type"] for event in events] == [event["type"] for event in whole]
        assert [event.get("delta") for event in events] == [event.get("delta") for event in whole]
        await second.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while True:
            if holds():
                return
            await asyncio.sleep(0.02)


def fails_twice(method: Any, failure: Exception | None = None) -> Any:
    """Return a method of the state that cannot be used the first two times."""
    failures = [failure or StateUnavailable("It is down.") for _ in range(2)]

    async def call(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return await method(*args, **kwargs)

    return call


async def test_the_background_outlives_what_it_cannot_read(
    stateful: Gateway, state: State, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given_up = ResponseRecord("resp_future", "", 1_800_000_000, {"version": 9}, ())
    await state.background.begin(given_up)
    async with state.database.write() as connection:
        await connection.execute(update(responses).values(lease_holder=None))
    monkeypatch.setattr(state.background, "turn", fails_twice(state.background.turn, ValueError("secret")))
    monkeypatch.setattr(state.background, "add", fails_twice(state.background.add, ValueError("secret")))
    await until(lambda: "resp_future cannot be taken over: KeyError" in caplog.text)
    assert (await ended(stateful, await begin(stateful)))["status"] == "completed"
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text


async def test_cancelling_again_while_it_ends(
    stateful: Gateway, engine: FakeEngine, ids: list[int], state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, held, store = asyncio.Event(), asyncio.Event(), asyncio.Event()
    engine.answer = lambda request: Script(ids, gate=gate, gate_after=30)
    id = await begin(stateful)
    await written(state, id)
    finish = state.background.finish

    stored: list[str] = []

    async def finish_late(*args: Any) -> bool:
        stored.append(args[1])
        held.set()
        await store.wait()
        return await finish(*args)

    monkeypatch.setattr(state.background, "finish", finish_late)
    cancelling = [asyncio.create_task(stateful.http.post(f"{RESPONSES}/{id}/cancel"))]
    async with asyncio.timeout(60):
        await held.wait()
        cancelling.append(asyncio.create_task(stateful.http.post(f"{RESPONSES}/{id}/cancel")))
        turns = [0]
        turn_of = state.background.turn

        async def count(own: Any) -> Any:
            made = await turn_of(own)
            turns[0] += id in made.cancelled
            return made

        monkeypatch.setattr(state.background, "turn", count)
        await until(lambda: turns[0] >= 2)
        store.set()
        for answer in cancelling:
            assert (await answer).json()["status"] == "cancelled"
    assert stored == ["cancelled"]


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_gateway_that_is_stopped_gives_its_responses_up(
    encoding: HarmonyEncoding, engine: FakeEngine, ids: list[int], tmp_path: Path, is_cancelled: bool
) -> None:
    """In the order of the servers: the work, the service, the state."""
    gate = asyncio.Event()
    engine.answer = lambda request: Script(ids, gate=gate, gate_after=40)
    first = await new_state(tmp_path)
    async with AsyncExitStack() as stack, asyncio.timeout(60):
        one = await stack.enter_async_context(serving(encoding, [engine], state=first))
        id = await begin(one)
        await written(first, id)
        worker: Any = first._worker
        if is_cancelled:  # at the same moment
            await first.background.ask_to_cancel(id, "")
            worker._cancel(id)
            await worker.close()
        await first.stop()
        refused = await one.http.post(RESPONSES, json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_replica")
        await one.service.close()
        assert (await first.responses.get(id, "")).status == "in_progress"
        await first.close()
        engine.answer = lambda request: Script(ids[len(request.output_token_ids) :])
        second = await new_state(tmp_path)
        two = await stack.enter_async_context(serving(encoding, [engine], state=second))
        status = (await ended(two, id))["status"]
        assert status in (("cancelled", "completed") if is_cancelled else ("completed",))
        await second.close()


async def test_a_request_under_which_engines_die_is_given_up(
    stateful: Gateway, engine: FakeEngine, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = EngineDead("It died.")
    engine.answer = lambda request: Script(ids[len(request.output_token_ids) :], break_after=5, failure=dead)
    monkeypatch.setattr(background_module, "_LONGEST_WAIT_S", 0.01)
    found = await ended(stateful, await begin(stateful))
    assert found["status"] == "failed"
    assert len(engine.requests) == MAX_ENGINE_DEATHS


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "x"}, 404, "model"),
        ({"temperature": 9}, 400, "temperature"),
        ({"stop": [""]}, 400, "stop[0]"),
    ],
)
async def test_a_wrong_request_is_refused_at_once(
    stateful: Gateway, fields: dict[str, Any], status: int, param: str
) -> None:
    answer = await stateful.http.post(RESPONSES, json=BODY | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


async def test_it_waits_for_a_database_that_does_not_answer(
    stateful: Gateway, engine: FakeEngine, ids: list[int], state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [EngineDead("It died.")]

    def answer(request: Any) -> Script:
        rest = ids[len(request.output_token_ids) :]
        return Script(rest, break_after=15, failure=failures.pop()) if failures else Script(rest)

    engine.answer = answer
    monkeypatch.setattr(background_module, "_LONGEST_WAIT_S", 0.01)
    monkeypatch.setattr(state.responses, "inputs", fails_twice(state.responses.inputs))
    # Also the first look at it after it has begun, which its client does not need.
    monkeypatch.setattr(state.background, "progress", fails_twice(state.background.progress))
    found = await ended(stateful, await begin(stateful))
    assert found["status"] == "completed"
    assert found["output"][-1]["content"][0]["text"].endswith("word59")
