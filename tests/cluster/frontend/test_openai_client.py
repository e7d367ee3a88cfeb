"""The official client against a real server: chat, streams, tools, logprobs, several choices,
completions, errors."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import cast

import httpx
import openai
import pytest

from cluster.config import GatewayConfig
from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, serving, turn
from workers import errors

MODEL = "gpt-oss-test"
HELLO = [{"role": "user", "content": "Hello"}]
TEXT = "Hello there, wörld 🎉!"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


async def test_a_whole_answer(gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding) -> None:
    engine.answer = lambda request: Script(
        turn(encoding, reasoning="Thinking.", text=TEXT), num_cached_tokens=32
    )
    answer = await gateway.client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        temperature=0.5,
        max_completion_tokens=100,
        seed=7,
        logit_bias={"5": -100},
        presence_penalty=0.5,
    )
    choice = answer.choices[0]
    assert choice.message.content == TEXT
    assert (
        choice.message.model_dump()["reasoning"]
        == choice.message.model_dump()["reasoning_content"]
        == "Thinking."
    )
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(engine.requests[0].prompt_token_ids)
    assert answer.usage.completion_tokens == len(turn(encoding, reasoning="Thinking.", text=TEXT))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 32
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == len(encoding.encode("Thinking."))
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.seed, sampling.presence_penalty) == (
        0.5,
        100,
        7,
        0.5,
    )
    assert sampling.logit_bias == ((5, -100.0),)
    assert set(encoding.stop_token_ids) <= set(sampling.stop_token_ids)


async def test_what_is_left_open_is_filled_in(gateway: Gateway, engine: FakeEngine) -> None:
    for _ in range(2):
        await gateway.client.chat.completions.create(model=MODEL, messages=HELLO)
    first, second = engine.requests
    assert first.sampling.max_tokens == engine.max_model_len - len(first.prompt_token_ids)
    assert first.sampling.temperature == 1.0
    assert first.sampling.seed is not None
    assert first.sampling.seed != second.sampling.seed
    assert first.request_id != second.request_id


async def test_a_stream_equals_the_whole_answer(gateway: Gateway) -> None:
    stream = await gateway.client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    reasoning = [
        chunk.choices[0].delta.model_dump().get("reasoning_content") or ""
        for chunk in chunks
        if chunk.choices
    ]
    assert "".join(reasoning) == "The user greets me."
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert finishes[-1] == "stop"
    assert set(finishes[:-1]) == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    whole = await gateway.client.chat.completions.create(model=MODEL, messages=HELLO)
    assert whole.usage == chunks[-1].usage


async def test_usage_in_every_chunk_grows(gateway: Gateway) -> None:
    stream = await gateway.client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    )
    counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage is not None]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


async def test_tools_round_trip(gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding) -> None:
    call = ("get_weather", '{"city":"Zürich"}')
    engine.answer = lambda request: Script(turn(encoding, reasoning="I need the weather.", call=call))
    messages: list[object] = [{"role": "user", "content": "Weather in Zürich?"}]
    asked = await gateway.client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], tool_choice="auto"
    )  # type: ignore[call-overload]
    message = asked.choices[0].message
    assert asked.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert message.tool_calls[0].function.name == "get_weather"
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Zürich"}

    stream = await gateway.client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], stream=True
    )  # type: ignore[call-overload]
    deltas = [delta async for chunk in stream for delta in chunk.choices[0].delta.tool_calls or []]
    assert (deltas[0].index, deltas[0].type, deltas[0].function.name) == (0, "function", "get_weather")
    assert deltas[0].id.startswith("call_")
    assert all(delta.id is None and delta.function.name is None for delta in deltas[1:])
    assert "".join(delta.function.arguments for delta in deltas) == '{"city":"Zürich"}'

    # The client's own message object goes back as it came, with all the fields that it carries.
    messages += [
        message.model_dump(),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "22 °C"},
    ]
    engine.answer = lambda request: Script(turn(encoding, text="22 degrees."))
    answered = await gateway.client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])  # type: ignore[call-overload]
    assert answered.choices[0].message.content == "22 degrees."
    prompt = encoding.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert "I need the weather." in prompt
    assert '{"city":"Zürich"}<|call|>' in prompt
    assert "functions.get_weather" in prompt
    assert "22 °C" in prompt


@pytest.mark.parametrize("helper", ["parse", "stream"])
async def test_messages_of_the_clients_helpers_can_be_sent_back(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding, helper: str
) -> None:
    engine.answer = lambda request: Script(turn(encoding, call=("get_weather", '{"city": "Oslo"}')))
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    if helper == "parse":
        answer = await gateway.client.chat.completions.parse(model=MODEL, messages=HELLO, tools=[strict])
    else:
        async with gateway.client.chat.completions.stream(
            model=MODEL, messages=HELLO, tools=[strict]
        ) as stream:
            answer = await stream.get_final_completion()
    message = answer.choices[0].message
    assert message.tool_calls
    assert "parsed_arguments" in message.to_dict()["tool_calls"][0]["function"]
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Rain"}
    engine.answer = lambda request: Script(turn(encoding, text="It rains."))
    for sent_back in (message, {**message.to_dict(), "parsed": None}):
        last = await gateway.client.chat.completions.create(
            model=MODEL, messages=[*HELLO, sent_back, result], tools=[strict]
        )
        assert last.choices[0].message.content == "It rains."


async def test_tool_choice_none_hides_the_tools(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    await gateway.client.chat.completions.create(
        model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice="none"
    )  # type: ignore[call-overload]
    assert "get_weather" not in encoding.decode(engine.requests[0].prompt_token_ids)


async def test_logprobs_of_the_text(gateway: Gateway) -> None:
    answer = await gateway.client.chat.completions.create(
        model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert bytes(byte for entry in logprobs.content for byte in entry.bytes or []).decode() == TEXT
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 2 for entry in logprobs.content)
    assert logprobs.content[0].top_logprobs[0].token == logprobs.content[0].token
    stream = await gateway.client.chat.completions.create(
        model=MODEL, messages=HELLO, logprobs=True, stream=True
    )
    streamed = [
        entry
        async for chunk in stream
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in logprobs.content]


async def test_n_choices_differ_by_seed_only(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    engine.answer = lambda request: Script(turn(encoding, text=f"Seed {request.sampling.seed}."))
    answer = await gateway.client.chat.completions.create(model=MODEL, messages=HELLO, n=3, seed=-1)
    assert [choice.message.content for choice in answer.choices] == [
        f"Seed {2**64 - 1}.",
        "Seed 0.",
        "Seed 1.",
    ]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(engine.requests[0].prompt_token_ids)
    stream = await gateway.client.chat.completions.create(
        model=MODEL, messages=HELLO, n=3, seed=5, stream=True
    )
    texts = ["", "", ""]
    finished = []
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        finished += [choice.index for choice in chunk.choices if choice.finish_reason]
    assert texts == ["Seed 5.", "Seed 6.", "Seed 7."]
    assert sorted(finished) == [0, 1, 2]


async def test_stop_strings_cancel_the_engine(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    gate = asyncio.Event()
    ids = turn(encoding, text="alpha beta gamma") + encoding.encode("more")
    before = len(encoding.encode_with_special("<|channel|>final<|message|>alpha beta"))
    engine.answer = lambda request: Script(ids, gate=gate, gate_after=before)
    answer = await gateway.client.chat.completions.create(model=MODEL, messages=HELLO, stop=[" beta"])
    assert answer.choices[0].message.content == "alpha"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_dump()["stop_reason"] == " beta"
    async with asyncio.timeout(30):
        await engine.was_cancelled(1)


async def test_length(gateway: Gateway) -> None:
    answer = await gateway.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


async def test_reasoning_is_accepted_under_its_three_names(gateway: Gateway, engine: FakeEngine) -> None:
    prompts = []
    for name in ("reasoning", "reasoning_content", "thinking"):
        messages = [
            *HELLO,
            {
                "role": "assistant",
                "content": None,
                name: "Because.",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            {
                "role": "tool",
                "tool_call_id": "c1",
                "content": [{"type": "text", "text": "o"}, {"type": "text", "text": "k"}],
            },
        ]
        await gateway.client.chat.completions.create(model=MODEL, messages=messages)  # type: ignore[arg-type]
        prompts.append(engine.requests[-1].prompt_token_ids)
    assert prompts[0] == prompts[1] == prompts[2]
    assert "Because." in gateway.service.prompts.encoding.decode(prompts[0])


async def test_effort_identity_and_date_reach_the_prompt(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    async def prompt(**fields: object) -> str:
        response = await gateway.http.post("/v1/chat/completions", json={"messages": HELLO, **fields})
        assert response.status_code == 200, response.text
        return encoding.decode(engine.requests[-1].prompt_token_ids)

    assert "Reasoning: medium" in await prompt()
    assert "Reasoning: high" in await prompt(reasoning_effort="high")
    assert "Reasoning: low" in await prompt(reasoning_effort="minimal")
    assert "Reasoning: high" in await prompt(reasoning={"effort": "high"})
    text = await prompt(
        chat_template_kwargs={
            "reasoning_effort": "low",
            "model_identity": "You are Bo.",
            "current_date": "2025-05-05",
        }
    )
    assert "Reasoning: low" in text
    assert "You are Bo." in text
    assert "2025-05-05" in text


async def test_reasoning_can_be_left_out(gateway: Gateway) -> None:
    answer = await gateway.client.chat.completions.create(
        model=MODEL, messages=HELLO, extra_body={"include_reasoning": False}
    )
    assert "reasoning" not in answer.choices[0].message.model_dump()
    stream = await gateway.client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, extra_body={"include_reasoning": False}
    )
    assert not [chunk async for chunk in stream if "reasoning" in chunk.choices[0].delta.model_dump()]


async def test_reasoning_that_is_left_out_keeps_its_token_ids(
    gateway: Gateway, encoding: HarmonyEncoding
) -> None:
    body = {"include_reasoning": False, "return_token_ids": True}
    stream = await gateway.client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, extra_body=body
    )
    choices = [chunk.choices[0].model_dump() async for chunk in stream]
    assert not [choice for choice in choices if "reasoning" in choice["delta"]]
    token_ids = [token_id for choice in choices for token_id in choice.get("token_ids", [])]
    assert token_ids == turn(encoding, reasoning="The user greets me.", text=TEXT)


async def test_token_ids_are_returned(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    ids = turn(encoding, reasoning="The user greets me.", text=TEXT)
    answer = await gateway.client.chat.completions.create(
        model=MODEL, messages=HELLO, extra_body={"return_token_ids": True}
    )
    assert tuple(answer.model_dump()["prompt_token_ids"]) == engine.requests[0].prompt_token_ids
    assert answer.choices[0].model_dump()["token_ids"] == ids
    stream = await gateway.client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, extra_body={"return_token_ids": True}
    )
    chunks = [chunk.model_dump() async for chunk in stream]
    assert [token_id for chunk in chunks for token_id in chunk["choices"][0].get("token_ids", [])] == ids
    assert [tuple(chunk["prompt_token_ids"]) for chunk in chunks if "prompt_token_ids" in chunk] == [
        engine.requests[0].prompt_token_ids
    ]


async def test_fields_that_clients_send_and_that_have_no_effect_change_nothing(
    gateway: Gateway, engine: FakeEngine
) -> None:
    plain = await gateway.client.chat.completions.create(model=MODEL, messages=HELLO, seed=7)
    adorned = await gateway.client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        seed=7,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        modalities=["text"],
        prompt_cache_key="k",
        safety_identifier="s",
    )
    assert adorned.choices == plain.choices
    assert adorned.usage == plain.usage
    first, second = (replace(request, request_id="") for request in engine.requests)
    assert first == second


async def test_completions_of_text_ids_and_lists(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    ids = encoding.encode(" and on it goes")
    engine.answer = lambda request: Script(ids, finish="length")
    answer = await gateway.client.completions.create(
        model=MODEL, prompt="<|start|>user<|message|>Once", max_tokens=50
    )
    assert answer.choices[0].text == " and on it goes"
    assert engine.requests[0].prompt_token_ids[0] == encoding.start
    assert encoding.message in engine.requests[0].prompt_token_ids
    await gateway.client.completions.create(model=MODEL, prompt=[5, 6, 7])
    assert engine.requests[1].prompt_token_ids == (5, 6, 7)
    assert engine.requests[1].sampling.max_tokens == 16
    several = await gateway.client.completions.create(
        model=MODEL, prompt=["Once", "Twice"], n=2, seed=10, echo=True
    )
    assert [choice.text for choice in several.choices] == [
        f"{word} and on it goes" for word in ("Once", "Once", "Twice", "Twice")
    ]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert sorted(request.sampling.seed or 0 for request in engine.requests[2:]) == [10, 10, 11, 11]
    assert several.usage is not None
    assert several.usage.prompt_tokens == len(encoding.encode("Once")) + len(encoding.encode("Twice"))
    lists = await gateway.client.completions.create(model=MODEL, prompt=[[5], [6, 7]])
    assert len(lists.choices) == 2


async def test_completions_stream_and_legacy_logprobs(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    ids = encoding.encode(" and on it goes")
    engine.answer = lambda request: Script(ids, finish="length")
    answer = await gateway.client.completions.create(
        model=MODEL, prompt="Once", logprobs=2, extra_body={"return_token_ids": True}
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == " and on it goes"
    assert logprobs.token_logprobs == [-0.5] * len(ids)
    assert [len(top) for top in logprobs.top_logprobs or []] == [2] * len(ids)
    assert [answer.choices[0].text[offset:][:1] for offset in logprobs.text_offset or []] == [
        token[0] for token in logprobs.tokens or []
    ]
    assert answer.choices[0].model_dump()["token_ids"] == ids
    stream = await gateway.client.completions.create(
        model=MODEL, prompt="Once", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == " and on it goes"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(ids)


async def test_special_tokens_in_completions_are_skipped_unless_wanted(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    engine.answer = lambda request: Script(turn(encoding, text="Hi"))
    plain = await gateway.client.completions.create(
        model=MODEL, prompt="x", extra_body={"add_special_tokens": True}
    )
    raw = await gateway.client.completions.create(
        model=MODEL, prompt="x", extra_body={"skip_special_tokens": False}
    )
    assert plain.choices[0].text == "finalHi"
    assert raw.choices[0].text == "<|channel|>final<|message|>Hi"
    assert raw.choices[0].finish_reason == "stop"


async def test_models(gateway: Gateway) -> None:
    models = [model async for model in gateway.client.models.list()]
    assert [model.id for model in models] == [MODEL]
    assert (await gateway.client.models.retrieve(MODEL)).created == 1_750_000_000
    with pytest.raises(openai.NotFoundError) as caught:
        await gateway.client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (errors.Overloaded("The queue is full.", 3.0), openai.RateLimitError, "overloaded"),
        (errors.EngineDead("gone"), openai.InternalServerError, "engine_unavailable"),
        (errors.DeadlineExceeded("late"), openai.InternalServerError, "deadline_exceeded"),
        (errors.InvalidRequest("bad", "top_k"), openai.BadRequestError, None),
        (errors.CantataError("secret detail"), openai.InternalServerError, "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_errors_before_the_first_token_have_a_status(
    gateway: Gateway,
    engine: FakeEngine,
    error: errors.CantataError,
    kind: type[openai.APIStatusError],
    code: str | None,
) -> None:
    engine.answer = lambda request: Script(refusal=error)
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            await gateway.client.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)  # type: ignore[call-overload]
        assert caught.value.code == code
        assert "secret" not in caught.value.message
        assert caught.value.response.headers["x-request-id"]
        if isinstance(error, errors.Overloaded):
            assert caught.value.response.headers["retry-after"] == "3"


async def test_an_error_after_the_first_token_is_an_event_and_then_the_end(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    ids = turn(encoding, text="one two three")
    engine.answer = lambda request: Script(ids, break_after=5, failure=errors.EngineDead("gone"))
    body = {"messages": HELLO, "stream": True}
    lines = (await gateway.http.post("/v1/chat/completions", json=body)).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    error = json.loads(lines[-3].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "engine_unavailable")
    stream = await gateway.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    with pytest.raises(openai.APIError):
        async for _ in stream:
            pass
    assert 'status="503"' in (await gateway.http.get("/metrics")).text


async def test_an_abort_of_the_engine_is_an_error(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    engine.answer = lambda request: Script(turn(encoding, text="one")[:4], finish="abort")
    with pytest.raises(openai.InternalServerError) as caught:
        await gateway.client.chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.status_code == 503


async def test_thirty_two_streams_at_once(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    gate = asyncio.Event()
    engine.answer = lambda request: Script(
        turn(encoding, text=f"Answer {request.sampling.seed}."), gate=gate, gate_after=4
    )

    async def one(seed: int) -> str:
        stream = await gateway.client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, seed=seed
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    streams = [asyncio.create_task(one(seed)) for seed in range(32)]
    async with asyncio.timeout(20):
        await engine.arrived(32)
        gate.set()
        assert await asyncio.gather(*streams) == [f"Answer {seed}." for seed in range(32)]
    assert engine.max_open == 32


async def test_api_keys(encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    async with serving(encoding, [engine], config=GatewayConfig(api_keys=("first", "second"))) as gateway:
        await gateway.client.chat.completions.create(model=MODEL, messages=HELLO)
        await gateway.client.with_options(api_key="second").models.list()
        for wrong in ("wrong", "f", "firs", "firstly", "FIRST", "first second", "first,second"):
            with pytest.raises(openai.AuthenticationError) as caught:
                await gateway.client.with_options(api_key=wrong).models.list()
            assert caught.value.code == "invalid_api_key"
            assert caught.value.body == {
                "message": "Incorrect API key provided.",
                "type": "invalid_request_error",
                "param": None,
                "code": "invalid_api_key",
            }
        for header in ("", "Bearer", "first", "Basic first"):
            without = await gateway.http.get("/v1/models", headers={"authorization": header})
            assert without.status_code == 401
            assert "Send an API key" in without.json()["error"]["message"]
        for path in ("/health", "/ready", "/metrics", "/version"):
            assert (await gateway.http.get(path, headers={"authorization": ""})).status_code == 200
        tokenized = await gateway.http.post(
            "/tokenize", json={"prompt": "x"}, headers={"authorization": "Basic first"}
        )
        assert tokenized.status_code == 401


class _Comments(httpx.AsyncHTTPTransport):
    """A transport that tells when an answer has had three comments."""

    def __init__(self) -> None:
        super().__init__(verify=False)
        self.came = asyncio.Event()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        return httpx.Response(
            response.status_code, headers=response.headers, stream=_Watched(response, self.came)
        )


class _Watched(httpx.AsyncByteStream):
    def __init__(self, response: httpx.Response, came: asyncio.Event) -> None:
        self._response = response
        self._came = came

    async def __aiter__(self) -> AsyncIterator[bytes]:
        data = b""
        async for chunk in cast(httpx.AsyncByteStream, self._response.stream):
            data += chunk
            if data.count(b": keep-alive\n\n") >= 3:
                self._came.set()
            yield chunk

    async def aclose(self) -> None:
        await self._response.aclose()


@pytest.mark.parametrize("gate_after", [0, 8], ids=["before-the-first-token", "between-tokens"])
async def test_a_stream_opens_before_its_first_token_and_its_comments_are_skipped(
    engine: FakeEngine, encoding: HarmonyEncoding, gate_after: int
) -> None:
    transport = _Comments()
    engine.answer = lambda request: Script(
        turn(encoding, text=TEXT), gate=transport.came, gate_after=gate_after
    )
    config = GatewayConfig(stream_headers_s=0.01, stream_keep_alive_s=0.01)
    async with asyncio.timeout(30), serving(encoding, [engine], config=config) as gateway:
        client = openai.AsyncOpenAI(
            base_url=f"{gateway.url}/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx.AsyncClient(transport=transport),
        )
        async with client:
            stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
            chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_an_error_after_the_headers_reaches_the_client_as_one(
    engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    gate = asyncio.Event()
    engine.answer = lambda request: Script(
        turn(encoding, text=TEXT), gate=gate, break_after=0, failure=errors.Overloaded("Full.")
    )
    config = GatewayConfig(stream_headers_s=0.01)
    async with asyncio.timeout(30), serving(encoding, [engine], config=config) as gateway:
        stream = await gateway.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        gate.set()
        with pytest.raises(openai.APIError, match="Full") as caught:
            await anext(stream)
    assert (caught.value.type, caught.value.code) == ("rate_limit_error", "overloaded")
