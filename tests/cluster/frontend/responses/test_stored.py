"""Stored responses and conversations over HTTP, with the openai package."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import responses as openai_responses
from openai.types.conversations import Conversation, ConversationItemList
from pydantic import TypeAdapter

from cluster.config import GatewayConfig
from cluster.harmony.encoding import HarmonyEncoding
from cluster.state.errors import StateUnavailable
from cluster.state.settings import StateConfig, location
from cluster.state.state import State, open_state
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, serving, turn
from tests.support.response_events import read_stream
from workers.errors import EngineDead

MODEL = "gpt-oss-test"
RESPONSES = "/v1/responses"


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[State]:
    settings = StateConfig(url=f"sqlite:///{tmp_path / 'state.sqlite3'}", max_item_bytes=20_000)
    state = await open_state(location(settings, several_hosts=False), settings)
    assert state is not None
    yield state
    await state.close()


@pytest.fixture
async def stateful(encoding: HarmonyEncoding, engine: FakeEngine, state: State) -> AsyncIterator[Gateway]:
    async with serving(encoding, [engine], state=state) as gateway:
        yield gateway


def says(engine: FakeEngine, encoding: HarmonyEncoding, **said: Any) -> None:
    ids = turn(encoding, **said)
    engine.answer = lambda request: Script(ids)


def prompt(engine: FakeEngine, encoding: HarmonyEncoding) -> str:
    text = encoding.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
    return text[text.index("<|start|>user") :]


async def refusal(
    gateway: Gateway, status: int = 400, method: str = "POST", path: str = RESPONSES, **body: Any
) -> Any:
    answer = await gateway.http.request(method, path, json=body if method == "POST" else None)
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


async def test_a_response_is_continued_by_its_id(
    stateful: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    client = stateful.client.responses
    says(engine, encoding, reasoning="They say their name.", text="Hello Ada.")
    first = await client.create(model=MODEL, input="I am Ada.", instructions="Be brief.")
    assert first.store is True
    assert first.previous_response_id is None
    says(engine, encoding, text="Ada.")
    second = await client.create(model=MODEL, input="Who am I?", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    says(engine, encoding, text="Yes.")
    third = await client.create(model=MODEL, input="Sure?", previous_response_id=second.id, store=False)
    assert third.store is False
    assert prompt(engine, encoding) == (  # without the first one's instructions, as in OpenAI's API
        "<|start|>user<|message|>I am Ada.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello Ada.<|end|>"
        "<|start|>user<|message|>Who am I?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Ada.<|end|>"
        "<|start|>user<|message|>Sure?<|end|><|start|>assistant"
    )
    with pytest.raises(openai.NotFoundError):
        await client.retrieve(third.id)


async def test_a_tools_result_follows_by_id_with_the_reasoning(
    stateful: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    tool: Any = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
    says(engine, encoding, reasoning="I need f.", call=("f", "{}"))
    first = await stateful.client.responses.create(model=MODEL, input="Go.", tools=[tool])
    call = first.output[-1]
    assert call.type == "function_call"
    says(engine, encoding, text="Done.")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    await stateful.client.responses.create(
        model=MODEL, input=[result], tools=[tool], previous_response_id=first.id
    )
    assert "<|channel|>analysis<|message|>I need f.<|end|>" in prompt(engine, encoding)
    assert prompt(engine, encoding).endswith("<|message|>42<|end|><|start|>assistant")
    error = await refusal(stateful, input=[{**result, "call_id": "call_x"}], previous_response_id=first.id)
    assert error["param"] == "input[0].call_id"


async def test_get_delete_and_input_items(
    stateful: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    client = stateful.client.responses
    items: Any = [{"role": "user", "content": f"Line {index}"} for index in range(5)]
    made = await client.create(model=MODEL, input=items, metadata={"a": "b"})
    assert (await client.retrieve(made.id)).to_dict() == made.to_dict()
    page = await client.input_items.list(made.id, limit=2, order="asc")
    assert [item.content[0].text for item in page.data] == ["Line 0", "Line 1"]  # type: ignore[union-attr]
    rest = [item async for item in page]
    assert len(rest) == 5
    TypeAdapter(list[openai_responses.ResponseItem]).validate_python([item.to_dict() for item in rest])
    newest = await client.input_items.list(made.id, limit=1)
    assert newest.data[0].content[0].text == "Line 4"  # type: ignore[union-attr]
    for query, param in (
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("order=up", "order"),
        ("after=no", "after"),
    ):
        path = f"{RESPONSES}/{made.id}/input_items?{query}"
        assert (await refusal(stateful, method="GET", path=path))["param"] == param
    deleted = await stateful.http.delete(f"{RESPONSES}/{made.id}")
    assert deleted.json() == {"id": made.id, "object": "response", "deleted": True}
    error = await refusal(stateful, 404, "GET", f"{RESPONSES}/{made.id}")
    assert error["message"] == f"Response with id '{made.id}' not found."
    error = await refusal(stateful, input="Hi", previous_response_id=made.id)
    assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")


async def test_a_stream_is_stored_before_its_last_event(
    stateful: Gateway,
    engine: FakeEngine,
    encoding: HarmonyEncoding,
    state: State,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = (await stateful.http.post(RESPONSES, json={"input": "Hi", "stream": True})).text
    last = read_stream(text)[-1]
    assert last["response"]["store"] is True
    found = await stateful.http.get(f"{RESPONSES}/{last['response']['id']}")
    assert found.json() == last["response"]

    async def put(*_: object) -> None:
        raise StateUnavailable("down")

    monkeypatch.setattr(state.responses, "put", put)
    text = (await stateful.http.post(RESPONSES, json={"input": "Hi", "stream": True})).text
    last = read_stream(text)[-1]
    assert (last["type"], last["response"]["store"]) == ("response.completed", False)


async def test_a_response_that_fails_is_not_stored_and_says_so(
    stateful: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    ids = turn(encoding, text="Hello there.")
    engine.answer = lambda request: Script(ids, break_after=6, failure=EngineDead("The engine died."))
    text = (await stateful.http.post(RESPONSES, json={"input": "Hi", "stream": True})).text
    last = read_stream(text)[-1]
    assert (last["type"], last["response"]["store"]) == ("response.failed", False)
    await refusal(stateful, 404, "GET", f"{RESPONSES}/{last['response']['id']}")


async def test_without_store_a_conversation_is_read_and_not_extended(
    stateful: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    items = [{"role": "user", "content": "I am Ada."}]
    made = (await stateful.http.post("/v1/conversations", json={"items": items})).json()
    body = {"input": "Who am I?", "conversation": made["id"], "store": False}
    assert (await stateful.http.post(RESPONSES, json=body)).json()["store"] is False
    assert "I am Ada." in prompt(engine, encoding)
    page = await stateful.http.get(f"/v1/conversations/{made['id']}/items")
    assert len(page.json()["data"]) == 1


async def test_references_to_items(stateful: Gateway, engine: FakeEngine, encoding: HarmonyEncoding) -> None:
    says(engine, encoding, reasoning="Hm.", text="Hello Ada.")
    first = await stateful.client.responses.create(model=MODEL, input="I am Ada.")
    reference: Any = {"type": "item_reference", "id": first.output[-1].id}
    await stateful.client.responses.create(
        model=MODEL, input=[{"role": "user", "content": "A"}, reference, {"role": "user", "content": "B"}]
    )
    assert "assistant<|channel|>final<|message|>Hello Ada.<|end|><|start|>user<|message|>B" in prompt(
        engine, encoding
    )
    await stateful.client.responses.create(  # of an item that precedes anyway
        model=MODEL, input=[reference, {"role": "user", "content": "C"}], previous_response_id=first.id
    )
    assert prompt(engine, encoding).count("Hello Ada.") == 1
    error = await refusal(stateful, input=[{"type": "item_reference", "id": "msg_gone"}])
    assert error["param"] == "input[0]"
    assert "not found" in error["message"]
    for before in ({}, {"previous_response_id": first.id}):
        error = await refusal(stateful, input=[reference] * 300, **before)
        assert error["param"] == "input[1]"
        assert "as input[0] does" in error["message"]


async def test_what_is_joined_to_a_short_body_is_work_for_a_thread(
    stateful: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = (await stateful.http.post(RESPONSES, json={"input": "long " * 200})).json()
    page = (await stateful.http.get(f"{RESPONSES}/{made['id']}/input_items")).json()
    reference = {"type": "item_reference", "id": page["data"][0]["id"]}
    sizes: list[int] = []
    run = stateful.service.prompts.threads.run

    async def spy(num_chars: int, work: Callable[[], Any]) -> Any:
        sizes.append(num_chars)
        return await run(num_chars, work)

    monkeypatch.setattr(stateful.service.prompts.threads, "run", spy)
    for body in ({"input": "Hi", "previous_response_id": made["id"]}, {"input": [reference]}):
        sizes.clear()
        assert (await stateful.http.post(RESPONSES, json=body)).status_code == 200
        joined, converted, rendered, *_ = sizes
        assert min(joined, converted, rendered) > 1000, body


async def test_the_number_of_items_with_those_before_is_bounded(
    encoding: HarmonyEncoding, engine: FakeEngine, state: State
) -> None:
    says(engine, encoding, text="Hello.")
    config = GatewayConfig(max_messages=3, stream_headers_s=60.0)
    async with serving(encoding, [engine], state=state, config=config) as gateway:
        made = (await gateway.http.post(RESPONSES, json={"input": "Hi"})).json()
        more = {"role": "user", "content": "More"}
        body: Any = {"previous_response_id": made["id"], "input": [more] * 2}
        error = await refusal(gateway, **body)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
        assert "gateway.max_messages" in error["message"]
        body["input"] = [more]
        assert (await gateway.http.post(RESPONSES, json=body)).status_code == 200


async def test_conversations_with_the_openai_package(
    stateful: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    conversations = stateful.client.conversations
    made = await conversations.create(
        items=[{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "I am Ada."}],
        metadata={"topic": "names"},
    )
    Conversation.model_validate(made.to_dict())
    says(engine, encoding, reasoning="Hm.", text="Hello Ada.")
    answer = await stateful.client.responses.create(model=MODEL, input="Who am I?", conversation=made.id)
    assert answer.conversation is not None
    assert answer.conversation.id == made.id
    says(engine, encoding, text="Bye.")
    await stateful.client.responses.create(model=MODEL, input="Bye", conversation={"id": made.id})
    assert "Who am I?<|end|><|start|>assistant<|channel|>final<|message|>Hello Ada.<|end|>" in prompt(
        engine, encoding
    )
    items = [item async for item in conversations.items.list(made.id, order="asc", limit=3)]
    assert [item.type for item in items] == [*["message"] * 3, "reasoning", *["message"] * 3]
    assert [getattr(item, "role", "") for item in items] == [
        *("developer", "user", "user", "", "assistant", "user", "assistant")
    ]
    ConversationItemList.model_validate(
        (await stateful.http.get(f"/v1/conversations/{made.id}/items?limit=100")).json()
    )
    one = await conversations.items.retrieve(items[0].id, conversation_id=made.id)
    assert one.to_dict() == items[0].to_dict()
    await conversations.items.delete(items[1].id, conversation_id=made.id)
    added = await conversations.items.create(made.id, items=[{"role": "user", "content": "More"}])
    assert len(added.data) == 1
    assert len([item async for item in conversations.items.list(made.id)]) == 7
    assert (await conversations.update(made.id, metadata={"topic": "more"})).metadata == {"topic": "more"}
    assert (await conversations.retrieve(made.id)).metadata == {"topic": "more"}
    # A response of a conversation can be continued by its id as well: with what preceded it.
    says(engine, encoding, text="Yes.")
    await stateful.client.responses.create(model=MODEL, input="Sure?", previous_response_id=answer.id)
    assert prompt(engine, encoding).count("Bye") == 0
    assert "Hello Ada." in prompt(engine, encoding)
    assert (await conversations.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError, match=f"Conversation with id '{made.id}' not found"):
        await conversations.retrieve(made.id)


async def test_bad_input_of_conversations(stateful: Gateway) -> None:
    base = "/v1/conversations"
    made = (
        await stateful.http.post(base, json={"items": [{"id": "msg_1", "role": "user", "content": "A"}]})
    ).json()
    one = f"{base}/{made['id']}"
    message = {"role": "user", "content": "B"}
    for path, body, param in (
        (base, {"items": [message] * 21}, "items"),
        (base, {"items": [{"type": "item_reference", "id": "msg_1"}]}, "items[0]"),
        (base, {"items": [{"type": "no_such_type"}]}, "items[0]"),
        (base, {"items": [{**message, "id": "a b"}]}, "items[0].id"),
        (base, {"items": [{**message, "content": "x" * 20_000}]}, "items[0]"),
        (base, {"metadata": {"a": 1}}, "metadata.a"),
        (one, {}, "metadata"),
        (f"{one}/items", {}, "items"),
        (f"{one}/items", {"items": [{**message, "id": "msg_1"}]}, "items"),
    ):
        assert (await refusal(stateful, path=path, **body))["param"] == param, body
    both = await refusal(stateful, input="Hi", conversation=made["id"], previous_response_id="resp_1")
    assert both["param"] == "previous_response_id"
    again = {**message, "id": "msg_1"}
    assert (await refusal(stateful, input=[again], conversation=made["id"]))["param"] == "input[0].id"
    error = await refusal(stateful, 404, input="Hi", conversation="conv_1")
    assert error["param"] == "conversation"
    for method, path in (("GET", f"{base}/x"), ("DELETE", f"{base}/x"), ("GET", f"{one}/items/msg_2")):
        await refusal(stateful, 404, method, path)


async def test_objects_of_another_key_are_not_found(
    encoding: HarmonyEncoding, engine: FakeEngine, state: State
) -> None:
    config = GatewayConfig(api_keys=("mine", "yours"), stream_headers_s=60.0)
    async with serving(encoding, [engine], state=state, config=config) as gateway:
        made = (await gateway.http.post(RESPONSES, json={"input": "A secret."})).json()
        conversation = (await gateway.http.post("/v1/conversations", json={})).json()["id"]
        gateway.http.headers["authorization"] = "Bearer yours"
        one = f"{RESPONSES}/{made['id']}"
        for method, path in (
            *(("GET", one), ("DELETE", one), ("GET", f"{one}/input_items")),
            ("GET", f"/v1/conversations/{conversation}"),
            ("GET", f"/v1/conversations/{conversation}/items"),
        ):
            await refusal(gateway, 404, method, path)
        error = await refusal(gateway, input="Hi", previous_response_id=made["id"])
        assert error["code"] == "previous_response_not_found"
        reference = {"type": "item_reference", "id": made["output"][0]["id"]}
        assert "not found" in (await refusal(gateway, input=[reference]))["message"]
        gateway.http.headers["authorization"] = "Bearer mine"
        assert (await gateway.http.get(one)).status_code == 200


async def test_without_state_requests_say_so_and_others_are_served(gateway: Gateway) -> None:
    made = await gateway.http.post(RESPONSES, json={"input": "Hi", "store": True})
    assert made.json()["store"] is False
    for body in ({"previous_response_id": "resp_1"}, {"conversation": "conv_1"}, {"background": True}):
        error = await refusal(gateway, input="Hi", **body)
        assert "state.url" in error["message"]
    for method, path in (
        *(("GET", f"{RESPONSES}/resp_1"), ("DELETE", f"{RESPONSES}/resp_1")),
        *(("GET", f"{RESPONSES}/resp_1/input_items"), ("POST", "/v1/conversations")),
        ("GET", "/v1/conversations/conv_1"),
    ):
        assert "state.url" in (await refusal(gateway, 400, method, path))["message"]


async def test_a_database_that_is_down_stops_what_needs_it_alone(
    stateful: Gateway, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = (await stateful.http.post(RESPONSES, json={"input": "Hi"})).json()

    def down(*_: object, **__: object) -> Any:
        raise StateUnavailable("The server's state database does not answer.")

    with monkeypatch.context() as patched:
        patched.setattr(state.database, "_transaction", down)
        answer = await stateful.http.post(RESPONSES, json={"input": "Hi"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert answer.json()["error"]["code"] == "state_unavailable"
        await refusal(stateful, 503, "GET", f"{RESPONSES}/{made['id']}")
        assert (await stateful.http.post(RESPONSES, json={"input": "Hi", "store": False})).status_code == 200
    assert (await stateful.http.get(f"{RESPONSES}/{made['id']}")).status_code == 200


async def test_a_circle_and_a_long_item_are_told(stateful: Gateway) -> None:
    error = await refusal(stateful, input="x" * 20_000)
    assert error["param"] == "input[0]"
    assert "state.max_item_bytes" in error["message"]
    tasks = [stateful.http.post(RESPONSES, json={"input": "Hi"}) for _ in range(8)]
    assert {answer.status_code for answer in await asyncio.gather(*tasks)} == {200}
