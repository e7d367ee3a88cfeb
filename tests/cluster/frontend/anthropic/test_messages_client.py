"""Anthropic's own client against a real server: whole answers, streams, tools, thinking, counts,
errors."""

import asyncio
import json
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, MessageParam, ToolUseBlock
from pydantic import BaseModel

from cluster.config import GatewayConfig
from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, serving, turn
from workers import errors

MODEL = "gpt-oss-test"
HELLO: list[MessageParam] = [{"role": "user", "content": "Hello"}]
TEXT = "Hello there, wörld 🎉!"
WEATHER: Any = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = ("get_weather", '{"city":"Zürich"}')
THINKING: Any = {"type": "adaptive"}


def shown(encoding: HarmonyEncoding, engine: FakeEngine) -> str:
    """Return the last prompt that the model got."""
    return encoding.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


async def test_a_whole_answer(
    client: anthropic.AsyncAnthropic, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    ids = turn(encoding, reasoning="Thinking.", text=TEXT)
    engine.answer = lambda request: Script(ids, num_cached_tokens=32)
    answer = await client.messages.create(
        model=MODEL,
        max_tokens=200,
        messages=HELLO,
        system="Be brief.",
        extra_body={"temperature": 0.5, "top_p": 0.75, "top_k": 5},
        metadata={"user_id": "someone"},
        service_tier="auto",
    )
    # Without thinking asked for, the first block is the answer.
    assert [block.type for block in answer.content] == ["text"]
    assert answer.content[0].text == TEXT  # type: ignore[union-attr]
    assert (answer.stop_reason, answer.stop_sequence, answer.role) == ("end_turn", None, "assistant")
    assert answer.id.startswith("msg_")
    assert answer.model == MODEL
    request = engine.requests[0]
    assert answer.usage.input_tokens == len(request.prompt_token_ids) - 32
    assert answer.usage.cache_read_input_tokens == 32
    assert answer.usage.output_tokens == len(ids)
    assert answer.usage.output_tokens_details is not None
    assert answer.usage.output_tokens_details.thinking_tokens == len(encoding.encode("Thinking."))
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.5, 0.75, 5, 200)
    assert "# Instructions\n\nBe brief.<|end|>" in shown(encoding, engine)
    assert answer._request_id is not None
    assert answer.id.endswith(answer._request_id)


async def test_a_stream_equals_the_whole_answer(
    client: anthropic.AsyncAnthropic, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    ids = turn(encoding, reasoning="Look it up.", text="One moment.", call=CALL)
    engine.answer = lambda request: Script(ids, per_message=2)
    asked: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 200,
        "messages": HELLO,
        "tools": [WEATHER],
        "thinking": THINKING,
    }
    whole = await client.messages.create(**asked)
    async with client.messages.stream(**asked) as stream:
        texts = [event.text async for event in stream if event.type == "text"]
        streamed = await stream.get_final_message()
    assert "".join(texts) == "One moment."
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
    assert without_ids(streamed) == without_ids(whole)
    assert streamed.stop_reason == "tool_use"
    call = whole.content[2]
    assert isinstance(call, ToolUseBlock)
    assert (call.name, call.input) == ("get_weather", {"city": "Zürich"})
    assert call.id.startswith("toolu_")


def without_ids(message: Message) -> dict[str, Any]:
    """Return a message without what differs between two equal answers."""
    body = message.model_dump(exclude={"id"})
    for block in body["content"]:
        block.pop("id", None)
        block.pop("signature", None)
    return body


@pytest.mark.parametrize("display", ["summarized", "omitted"])
async def test_thinking_comes_back_in_a_tool_loop(
    client: anthropic.AsyncAnthropic, engine: FakeEngine, encoding: HarmonyEncoding, display: str
) -> None:
    engine.answer = lambda request: Script(turn(encoding, reasoning="I need the weather.", call=CALL))
    thinking: Any = {"type": "enabled", "budget_tokens": 2048, "display": display}
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 200, "tools": [WEATHER], "thinking": thinking}
    messages: list[MessageParam] = [{"role": "user", "content": "Weather in Zürich?"}]
    async with client.messages.stream(**asked, messages=messages) as stream:
        first = await stream.get_final_message()
    assert [block.type for block in first.content] == ["thinking", "tool_use"]
    block, call = first.content
    assert block.thinking == ("I need the weather." if display == "summarized" else "")  # type: ignore[union-attr]
    assert isinstance(call, ToolUseBlock)
    messages += [
        first.to_param(),
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "22 °C"}]},
    ]
    engine.answer = lambda request: Script(turn(encoding, reasoning="Easy.", text="22 degrees."))
    second = await client.messages.create(**asked, messages=messages)
    assert shown(encoding, engine).endswith(
        "<|start|>user<|message|>Weather in Zürich?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>I need the weather.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city":"Zürich"}<|call|>'
        "<|start|>functions.get_weather<|channel|>commentary to=assistant<|message|>22 °C<|end|>"
        "<|start|>assistant"
    )
    messages += [second.to_param(), {"role": "user", "content": "Thanks."}]
    await client.messages.create(**asked, messages=messages)
    prompt = shown(encoding, engine)
    assert "I need the weather." not in prompt  # after the final answer it is of no use
    assert "Easy." not in prompt
    assert "<|channel|>final<|message|>22 degrees.<|end|>" in prompt


async def test_the_tool_runner_runs_a_task_to_its_end(
    client: anthropic.AsyncAnthropic, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    def answer(request: Any) -> Script:
        prompt = encoding.decode(request.prompt_token_ids, skip_special_tokens=False)
        if "sunny in Zürich" in prompt:
            return Script(turn(encoding, text="It is sunny."))
        return Script(turn(encoding, reasoning="I ask.", call=CALL))

    @anthropic.beta_async_tool
    async def get_weather(city: str) -> str:
        """Weather of a city."""
        return f"sunny in {city}"

    engine.answer = answer
    runner = client.beta.messages.tool_runner(
        model=MODEL,
        max_tokens=200,
        messages=[{"role": "user", "content": "Weather?"}],
        tools=[get_weather],
        thinking={"type": "adaptive"},
    )
    last = await runner.until_done()
    assert last.content[-1].text == "It is sunny."  # type: ignore[union-attr]
    assert len(engine.requests) == 2
    assert "I ask." in shown(encoding, engine)


class Person(BaseModel):
    name: str
    year: int


async def test_a_parsed_answer(
    client: anthropic.AsyncAnthropic, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    engine.answer = lambda request: Script(turn(encoding, text='{"name":"Ada","year":1843}'))
    parsed = await client.messages.parse(model=MODEL, max_tokens=200, messages=HELLO, output_format=Person)
    assert parsed.parsed_output == Person(name="Ada", year=1843)
    assert "# Response Formats\n\n## output" in shown(encoding, engine)
    assert engine.requests[0].constraint is not None
    assert engine.requests[0].constraint_limits is not None


async def test_counted_tokens_are_those_of_the_prompt(
    client: anthropic.AsyncAnthropic, engine: FakeEngine
) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": HELLO,
        "system": [{"type": "text", "text": "Be brief."}],
        "tools": [WEATHER],
        "tool_choice": {"type": "any"},
        "thinking": {"type": "enabled", "budget_tokens": 12_000},
        "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
    }
    counted = await client.messages.count_tokens(**asked)
    await client.messages.create(**asked, max_tokens=100)
    assert counted.input_tokens == len(engine.requests[0].prompt_token_ids)
    too_long = await client.messages.count_tokens(
        model=MODEL, messages=[{"role": "user", "content": "word " * engine.max_model_len}]
    )
    assert too_long.input_tokens > engine.max_model_len


async def test_a_prompt_that_is_too_long_is_refused_in_the_words_that_clients_read(
    client: anthropic.AsyncAnthropic, engine: FakeEngine
) -> None:
    messages: list[MessageParam] = [{"role": "user", "content": "word " * engine.max_model_len}]
    counted = await client.messages.count_tokens(model=MODEL, messages=messages)
    with pytest.raises(anthropic.BadRequestError) as caught:
        await client.messages.create(model=MODEL, max_tokens=10, messages=messages)
    assert caught.value.type == "invalid_request_error"
    limit = engine.max_model_len - 1
    assert caught.value.api_message == f"prompt is too long: {counted.input_tokens} tokens > {limit} maximum"
    assert caught.value.request_id == json.loads(caught.value.response.text)["request_id"]


async def test_how_a_turn_ends(
    client: anthropic.AsyncAnthropic, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    engine.answer = lambda request: Script(turn(encoding, text="one two three four five"))
    stopped = await client.messages.create(
        model=MODEL, max_tokens=100, messages=HELLO, stop_sequences=["three"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "three")
    assert stopped.content[0].text == "one two "  # type: ignore[union-attr]
    cut = await client.messages.create(model=MODEL, max_tokens=8, messages=HELLO)
    assert cut.stop_reason == "max_tokens"
    # More than the context has room for is no error: it ends when the context is full.
    long = turn(encoding, text="word " * engine.max_model_len)
    engine.answer = lambda request: Script(long, per_message=64)
    full = await client.messages.create(model=MODEL, max_tokens=32_000, messages=HELLO)
    assert full.stop_reason == "model_context_window_exceeded"
    assert full.usage.input_tokens + full.usage.output_tokens == engine.max_model_len


async def test_an_answer_continues_a_last_message_of_the_assistant(
    client: anthropic.AsyncAnthropic, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    engine.answer = lambda request: Script(encoding.encode_with_special(" three.<|return|>"))
    messages: list[MessageParam] = [*HELLO, {"role": "assistant", "content": "one two"}]
    counted = await client.messages.count_tokens(model=MODEL, messages=messages)
    answer = await client.messages.create(model=MODEL, max_tokens=100, messages=messages)
    assert [block.text for block in answer.content] == [" three."]  # type: ignore[union-attr]
    assert answer.stop_reason == "end_turn"
    request = engine.requests[0]
    ids = [*request.prompt_token_ids, *request.output_token_ids]
    text = encoding.decode(ids, skip_special_tokens=False)
    assert text.endswith("<|start|>assistant<|channel|>final<|message|>one two")
    assert counted.input_tokens == answer.usage.input_tokens == len(ids)


async def test_a_call_that_was_cut_off(
    client: anthropic.AsyncAnthropic, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    ids = turn(encoding, call=("get_weather", '{"city": "Zürich", "unit": "celsius"}'))
    engine.answer = lambda request: Script(ids[:-5], finish="length")
    cut = await client.messages.create(model=MODEL, max_tokens=900, messages=HELLO, tools=[WEATHER])
    call = cut.content[0]
    assert isinstance(call, ToolUseBlock)
    assert call.input["city"] == "Zürich"


async def test_an_error_in_the_middle_of_a_stream(
    engine: FakeEngine, encoding: HarmonyEncoding, gateway: Gateway, client: anthropic.AsyncAnthropic
) -> None:
    ids = turn(encoding, text=TEXT)
    engine.answer = lambda request: Script(
        ids, break_after=len(ids) - 2, failure=errors.EngineDead("scripted")
    )
    stream = await client.messages.create(model=MODEL, max_tokens=100, messages=HELLO, stream=True)
    with pytest.raises(anthropic.APIStatusError) as caught:
        [event async for event in stream]
    assert caught.value.type == "api_error"
    assert caught.value.api_message


@pytest.mark.parametrize("header", ["x-api-key", "authorization", "both"])
async def test_keys(engine: FakeEngine, encoding: HarmonyEncoding, header: str) -> None:
    async with serving(encoding, [engine], config=GatewayConfig(api_keys=("secret",))) as gateway:
        body = {"model": MODEL, "max_tokens": 50, "messages": HELLO}
        good = {
            "x-api-key": {"x-api-key": "secret"},
            "authorization": {"authorization": "Bearer secret"},
            "both": {"x-api-key": "secret", "authorization": "Bearer of-another-server"},
        }[header]
        async with asyncio.timeout(60):
            headers = {
                "authorization": "",
                **good,
                "anthropic-beta": "new-2030-01-01",
                "anthropic-version": "x",
            }
            answer = await gateway.http.post("/v1/messages?beta=true", json=body, headers=headers)
            assert answer.status_code == 200, answer.text
            wrong = {name: value.replace("secret", "wrong") for name, value in headers.items()}
            refused = await gateway.http.post("/v1/messages", json=body, headers=wrong)
            without = await gateway.http.post("/v1/messages", json=body, headers={"authorization": ""})
            for answer in (refused, without):
                assert answer.status_code == 401
                assert answer.json()["error"]["type"] == "authentication_error"
                assert answer.json()["error"]["message"].startswith("invalid x-api-key: ")
                assert answer.headers["request-id"] == answer.json()["request_id"]
            assert (await gateway.http.head("/", headers={"authorization": ""})).status_code == 200
            assert (await gateway.http.head("/v1/messages", headers=good)).status_code == 200
