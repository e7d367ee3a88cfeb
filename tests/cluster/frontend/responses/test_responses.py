"""`POST /v1/responses` without stored responses: requests of every form, whole answers and streams,
read with the openai package and checked against its models."""

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel

from cluster.config import GatewayConfig
from cluster.frontend.errors import BrokenContent
from cluster.frontend.responses.items import COMPACTION, REASONING, Seals
from cluster.harmony.encoding import HarmonyEncoding
from cluster.sealing import Sealer
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, serving, turn
from tests.support.response_events import read_stream
from workers.errors import EngineDead, Overloaded

FUNCTION: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CUSTOM: dict[str, Any] = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Change files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin" /[a-z]+/'},
}
NAMESPACE: dict[str, Any] = {
    "type": "namespace",
    "name": "files",
    "description": "Tools of files.",
    "tools": [{"type": "function", "name": "read", "parameters": {"type": "object", "properties": {}}}],
}


def says(engine: FakeEngine, encoding: HarmonyEncoding, text: str) -> None:
    ids = encoding.encode_with_special(text)
    engine.answer = lambda request: Script(ids)


def calls(name: str, body: str) -> str:
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{body}<|call|>"


def prompt(engine: FakeEngine, encoding: HarmonyEncoding) -> str:
    return encoding.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


async def post(gateway: Gateway, **body: Any) -> dict[str, Any]:
    answer = await gateway.http.post("/v1/responses", json={"input": "Hello", **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def refusal(gateway: Gateway, path: str = "/v1/responses", **body: Any) -> dict[str, Any]:
    answer = await gateway.http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


async def test_the_openai_package_reads_a_response(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    response = await gateway.client.responses.create(
        model="gpt-oss-test", input="Hello", instructions="Be kind."
    )
    assert response.output_text == "Hello there, wörld 🎉!"
    assert (response.status, response.store) == ("completed", False)
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.usage is not None
    assert response.usage.input_tokens == len(engine.requests[-1].prompt_token_ids)
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    shown = prompt(engine, encoding)
    assert "# Instructions\n\nBe kind." in shown
    assert "<|start|>user<|message|>Hello<|end|>" in shown


async def test_a_stream_equals_the_whole_answer(gateway: Gateway) -> None:
    whole = await post(gateway)
    text = (await gateway.http.post("/v1/responses", json={"input": "Hello", "stream": True})).text
    streamed = read_stream(text)[-1]["response"]
    for response in (whole, streamed):
        del response["id"], response["created_at"], response["completed_at"]
        for item in response["output"]:
            del item["id"]
    assert streamed == whole
    async with gateway.client.responses.stream(model="gpt-oss-test", input="Hello") as stream:
        deltas = "".join(
            [event.delta async for event in stream if event.type == "response.output_text.delta"]
        )
        final = await stream.get_final_response()
    assert deltas == final.output_text == "Hello there, wörld 🎉!"


async def test_parse(gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding) -> None:
    class City(BaseModel):
        name: str

    says(engine, encoding, '<|channel|>final<|message|>{"name": "Bern"}<|return|>')
    parsed = await gateway.client.responses.parse(model="gpt-oss-test", input="Hello", text_format=City)
    assert parsed.output_parsed == City(name="Bern")
    assert "# Response Formats" in prompt(engine, encoding)
    assert engine.requests[-1].constraint is not None
    assert parsed.text is not None
    assert parsed.text.format is not None
    assert parsed.text.format.type == "json_schema"


async def test_every_item_of_an_answer_is_taken_as_input(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    """Send them as clients do: unchanged, with the results, in a new request."""
    tools = [FUNCTION, CUSTOM, NAMESPACE]
    analysis = "<|channel|>analysis<|message|>I need it.<|end|><|start|>assistant"
    preamble = "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant"
    items: list[dict[str, Any]] = [{"role": "user", "content": "Weather?"}]
    for name, body, output in (
        ("get_weather", '{"city": "Bern"}', "Sunny."),
        ("apply_patch", "*** Beginabc", [{"type": "input_text", "text": "Done."}]),
        ("files__read", "{}", "Text."),
    ):
        says(engine, encoding, analysis + preamble + calls(name, body))
        response = await post(gateway, input=items, tools=tools, max_output_tokens=200)
        assert [item["type"] for item in response["output"]][:2] == ["reasoning", "message"]
        call = response["output"][2]
        items += response["output"]
        kind = "custom_tool_call_output" if call["type"] == "custom_tool_call" else "function_call_output"
        items.append({"type": kind, "call_id": call["call_id"], "output": output})
    says(engine, encoding, "<|channel|>final<|message|>It is sunny.<|return|>")
    response = await post(gateway, input=items, tools=tools)
    shown = prompt(engine, encoding)
    assert shown.count("<|channel|>analysis<|message|>I need it.<|end|>") == 3, "of a loop in progress"
    assert shown.count("<|channel|>commentary<|message|>I will look.<|end|>") == 3
    for text in (
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Bern"}<|call|>',
        "<|message|>*** Beginabc<|call|>",
        "<|start|>functions.files__read<|channel|>commentary to=assistant<|message|>Text.<|end|>",
        "<|message|>Done.<|end|>",
    ):
        assert text in shown
    items += [*response["output"], {"role": "user", "content": "Thanks"}]
    await post(gateway, input=items, tools=tools)
    shown = prompt(engine, encoding)
    assert "<|channel|>analysis<|message|>" not in shown, "a final answer ends the loop"
    assert "<|channel|>final<|message|>It is sunny.<|end|>" in shown


async def test_messages_of_earlier_turns(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    """Without a phase, a text before a call is a preamble; what clients add to items is ignored."""
    await post(
        gateway,
        input=[
            {"role": "system", "content": "Short."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "One"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"role": "assistant", "content": "Looking.", "id": "msg_1", "status": "completed"},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}", "status": None},
            {"type": "function_call_output", "call_id": "a", "output": "1", "id": None},
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "It is 1.", "annotations": []}],
            },
            {"role": "assistant", "phase": "commentary", "content": "More."},
            {
                "role": "assistant",
                "phase": "final_answer",
                "content": [{"type": "refusal", "refusal": "No."}],
            },
            {"role": "user", "content": "Two"},
        ],
    )
    shown = prompt(engine, encoding)
    assert "# Instructions\n\nShort." in shown
    assert "commentary<|message|>Looking.<|end|>" in shown
    assert "final<|message|>It is 1.<|end|>" in shown
    assert "commentary<|message|>More.<|end|>" in shown
    assert "final<|message|>No.<|end|>" in shown
    assert "analysis" not in shown.split("<|end|>", 1)[1], "reasoning without a text is left out"


async def test_sealed_reasoning_comes_back_to_the_model(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    says(
        engine, encoding, "<|channel|>analysis<|message|>Secret.<|end|><|start|>assistant" + calls("f", "{}")
    )
    response = await post(gateway, include=["reasoning.encrypted_content"], reasoning={"summary": "auto"})
    reasoning, call = response["output"]
    assert reasoning["summary"] == [{"type": "summary_text", "text": "Secret."}]
    sealed = reasoning["encrypted_content"]
    assert "Secret" not in sealed
    bare = {"type": "reasoning", "summary": [], "encrypted_content": sealed, "content": None}
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "1"}
    await post(gateway, input=[{"role": "user", "content": "Go"}, bare, call, output])
    assert "<|channel|>analysis<|message|>Secret.<|end|>" in prompt(engine, encoding)
    for wrong in (sealed[:-4], sealed.swapcase(), "gAAAA", ""):
        items = [{**bare, "encrypted_content": wrong}, call, output]
        answer = await gateway.http.post("/v1/responses", json={"input": items})
        if not wrong:
            assert answer.status_code == 200, "no content, nothing to open"
            continue
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "invalid_encrypted_content")
        assert error["param"] == "input[0].encrypted_content"
    with_text = {**bare, "encrypted_content": "x", "content": [{"type": "reasoning_text", "text": "Open."}]}
    await post(gateway, input=[with_text, call, output])
    assert "<|channel|>analysis<|message|>Open.<|end|>" in prompt(engine, encoding)


async def test_what_is_sealed_opens_in_every_gateway_with_the_secret(
    encoding: HarmonyEncoding, engine: FakeEngine
) -> None:
    config = GatewayConfig(secret="0123456789abcdef", stream_headers_s=60.0)
    other = GatewayConfig(secret="another secret than it", stream_headers_s=60.0)
    async with serving(encoding, [engine], config=config) as first:
        item = (await post(first, include=["reasoning.encrypted_content"]))["output"][0]
    body = {"input": [{"role": "user", "content": "x"}, {**item, "content": None}]}
    for settings, status in ((config, 200), (other, 400)):
        async with serving(encoding, [engine], config=settings) as second:
            assert (await second.http.post("/v1/responses", json=body)).status_code == status


async def test_namespaces_and_custom_tools(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    tools = [FUNCTION, CUSTOM, NAMESPACE]
    says(engine, encoding, calls("files__read", "{}"))
    response = await post(gateway, tools=tools)
    (call,) = response["output"]
    assert (call["type"], call["name"], call["namespace"]) == ("function_call", "read", "files")
    assert response["tools"][1]["format"]["syntax"] == "lark"
    assert response["tools"][2]["tools"][0]["name"] == "read"
    shown = prompt(engine, encoding)
    assert "type files__read = (" in shown
    assert "type apply_patch = " in shown
    assert engine.requests[-1].constraint is not None
    says(engine, encoding, calls("apply_patch", "*** Beginabc"))
    (call,) = (await post(gateway, tools=tools))["output"]
    assert (call["type"], call["input"]) == ("custom_tool_call", "*** Beginabc")


CHOICES: list[tuple[Any, set[str]]] = [
    ("required", {"get_weather", "apply_patch", "files__read"}),
    ({"type": "function", "name": "get_weather"}, {"get_weather"}),
    ({"type": "custom", "name": "apply_patch"}, {"apply_patch"}),
    ({"type": "function", "name": "read", "namespace": "files"}, {"files__read"}),
    (
        {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [
                {"type": "namespace", "name": "files"},
                {"type": "function", "name": "get_weather"},
            ],
        },
        {"get_weather", "files__read"},
    ),
]
"""A choice, and the tools that may be called then."""


async def test_forced_calls(gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding) -> None:
    """The answer is bound to the tools that may be called; all of them are in the prompt."""
    tools = [FUNCTION, CUSTOM, NAMESPACE]
    bound = set()
    for choice, allowed in [("auto", set()), *CHOICES]:
        await post(gateway, tools=tools, tool_choice=choice)
        constraint = engine.requests[-1].constraint
        assert constraint is not None
        bound.add(constraint.id)
        assert all(f"type {name} = " in prompt(engine, encoding) for name in allowed)
    assert len(bound) == len(CHOICES) + 1, "each choice changes what may be generated"


async def test_tool_choice_none_hides_the_tools(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    response = await post(gateway, tools=[FUNCTION], tool_choice="none")
    assert "get_weather" not in prompt(engine, encoding)
    assert (response["tool_choice"], response["tools"][0]["name"]) == ("none", "get_weather")


async def test_fields_of_the_request_are_repeated_and_used(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    metadata = {"run": "7"}
    response = await post(
        gateway,
        metadata=metadata,
        max_output_tokens=5,
        temperature=0.5,
        top_p=0.9,
        seed=11,
        reasoning={"effort": "high"},
        text={"verbosity": "low"},
        user="u",
        safety_identifier="s",
        prompt_cache_key="k",
        service_tier="auto",
        store=True,
        truncation="disabled",
        max_tool_calls=3,
        parallel_tool_calls=False,
        client_metadata={"x": 1},
        include=["web_search_call.results"],
    )
    asked = engine.requests[-1].sampling
    assert (asked.max_tokens, asked.temperature, asked.seed) == (5, 0.5, 11)
    assert asked.top_p == pytest.approx(0.9)
    assert "Reasoning: high" in prompt(engine, encoding)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    names = ("metadata", "max_output_tokens", "temperature", "user", "safety_identifier", "prompt_cache_key")
    assert [response[name] for name in names] == [metadata, 5, 0.5, "u", "s", "k"]
    assert (response["store"], response["service_tier"], response["max_tool_calls"]) == (False, "default", 3)
    assert response["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert response["reasoning"] == {"effort": "high", "summary": None}
    assert response["parallel_tool_calls"] is False


async def test_log_probabilities(gateway: Gateway) -> None:
    for body in ({"include": ["message.output_text.logprobs"], "top_logprobs": 2}, {"top_logprobs": 2}):
        message = (await post(gateway, **body))["output"][1]
        entries = message["content"][0]["logprobs"]
        assert "".join(entry["token"] for entry in entries if not entry["token"].startswith("bytes:"))
        assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    plain = (await post(gateway))["output"][1]
    assert plain["content"][0]["logprobs"] == []


async def test_a_seed_is_drawn_where_none_is_given(gateway: Gateway, engine: FakeEngine) -> None:
    await post(gateway)
    await post(gateway)
    first, second = (request.sampling.seed for request in engine.requests[-2:])
    assert None not in (first, second)
    assert first != second


async def test_the_oldest_turns_are_left_out(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    turns = [
        item
        for number in range(40)
        for item in (
            {"role": "user", "content": f"Question {number}? " + "word " * 30},
            {"role": "assistant", "content": f"Answer {number}."},
        )
    ]
    items = [
        {"role": "developer", "content": "Stay brief."},
        *turns,
        {"role": "user", "content": "The last."},
    ]
    error = await refusal(gateway, input=items)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    response = await post(gateway, input=items, truncation="auto", max_output_tokens=50)
    shown = prompt(engine, encoding)
    assert response["truncation"] == "auto"
    assert "Question 0?" not in shown
    assert "Answer 39." in shown
    assert "Stay brief." in shown
    assert shown.split("<|start|>user<|message|>")[1].startswith("Question "), "it begins with a turn"
    num_tokens = len(engine.requests[-1].prompt_token_ids)
    assert num_tokens + 50 <= engine.max_model_len < num_tokens + 50 + 80, "no more than needed is left out"
    alone = [{"role": "user", "content": "word " * 2000}]
    assert (await refusal(gateway, input=alone, truncation="auto"))["code"] == "context_length_exceeded"


async def test_an_engine_that_fails_in_the_middle_fails_the_response(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    ids = turn(encoding, reasoning="Hm.", text="Hello there.")
    engine.answer = lambda request: Script(ids, break_after=8, failure=EngineDead("The engine died."))
    answer = await gateway.http.post("/v1/responses", json={"input": "Hello", "stream": True})
    assert answer.status_code == 200
    events = read_stream(answer.text)
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["code"] == "server_error"
    assert events[-1]["response"]["output"][0]["type"] == "reasoning"
    whole = await gateway.http.post("/v1/responses", json={"input": "Hello"})
    assert whole.status_code == 503


async def test_a_refusal_after_the_headers_is_a_failed_response(
    encoding: HarmonyEncoding, engine: FakeEngine
) -> None:
    gate = asyncio.Event()
    full = Overloaded("The engine is full.", retry_after_s=3)
    engine.answer = lambda request: Script([5], gate=gate, break_after=0, failure=full)
    body = {"input": "Hello", "stream": True}
    async with (
        serving(encoding, [engine], config=GatewayConfig(stream_headers_s=0.01)) as gateway,
        gateway.http.stream("POST", "/v1/responses", json=body) as answer,
    ):
        assert answer.status_code == 200
        gate.set()
        events = read_stream((await answer.aread()).decode())
    assert [event["type"] for event in events][2:] == ["response.failed"]
    assert events[-1]["response"]["error"]["code"] == "rate_limit_exceeded"
    async with serving(encoding, [engine]) as gateway:
        refused = await gateway.http.post("/v1/responses", json=body)
        assert refused.status_code == 429, "before the headers it has its own status"


async def test_input_tokens(gateway: Gateway, engine: FakeEngine) -> None:
    body = {"input": "Hello", "tools": [FUNCTION], "instructions": "Be kind.", "model": "gpt-oss-test"}
    counted = await gateway.client.responses.input_tokens.count(**body)  # type: ignore[arg-type]
    assert counted.object == "response.input_tokens"
    await post(gateway, **body)
    assert counted.input_tokens == len(engine.requests[-1].prompt_token_ids)
    error = await refusal(gateway, "/v1/responses/input_tokens", input="x", previous_response_id="resp_1")
    assert error["param"] == "previous_response_id"


USER = {"role": "user", "content": "x"}
CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "a", "output": "1"}


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({}, "input", "input is missing"),
    ({"input": []}, "input", "at least one item"),
    ({"input": 5}, "input", "a string or an array of items"),
    ({"input": [5]}, "input[0]", "must be an item"),
    ({"input": [{}]}, "input[0]", "must be an item"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0]", "'web_search_call'"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "state.url"),
    ({"input": [{"id": "x"}]}, "input[0]", "state.url"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "'user', 'system'"),
    ({"input": [{"role": "user"}]}, "input[0].content", "missing"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]", "text"),
    ({"input": [OUTPUT]}, "input[0].call_id", "no earlier message has a call"),
    ({"input": [CALL, OUTPUT, OUTPUT]}, "input[2].call_id", "already has a result"),
    ({"input": [CALL, CALL]}, "input[1].call_id", "same id 'a'"),
    ({"input": [{**CALL, "call_id": ""}]}, "input[0].call_id", "missing"),
    ({"input": [{**CALL, "name": "a b"}]}, "input[0].name", "1 to 128 characters"),
    (
        {"input": [{"type": "compaction", "encrypted_content": "x"}]},
        "input[0].encrypted_content",
        "opened",
    ),
    ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id", "state.url"),
    ({"input": "x", "conversation": "conv_1"}, "conversation", "state.url"),
    ({"input": "x", "background": True}, "background", "state.url"),
    ({"input": "x", "prompt": {"id": "p"}}, "prompt", "no stored prompts"),
    ({"input": "x", "context_management": []}, "context_management", "compact"),
    ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0]", "does not offer yet"),
    ({"input": "x", "tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0]", "'mcp'"),
    ({"input": "x", "tools": [FUNCTION, {"type": "code_interpreter"}]}, "tools[1]", "code_interpreter"),
    ({"input": "x", "tools": [{**NAMESPACE, "tools": [{"type": "mcp"}]}]}, "tools[0].tools[0]", "'mcp'"),
    ({"input": "x", "tools": [{**NAMESPACE, "name": ""}]}, "tools[0].name", "empty"),
    ({"input": "x", "tools": [{**FUNCTION, "name": "a b"}]}, "tools[0].name", "characters"),
    ({"input": "x", "tools": [FUNCTION, FUNCTION]}, "tools[1].name", "already a tool"),
    (
        {"input": "x", "tools": [{**FUNCTION, "parameters": {"type": "array"}}]},
        "tools[0].parameters",
        "must describe an object",
    ),
    (
        {"input": "x", "tools": [{**CUSTOM, "format": {**CUSTOM["format"], "definition": "start: other"}}]},
        "tools[0].format.definition",
        "",
    ),
    ({"input": "x", "tool_choice": "required"}, "tool_choice", "no tool to call"),
    ({"input": "x", "tool_choice": {"type": "file_search"}}, "tool_choice", "does not offer yet"),
    (
        {"input": "x", "tools": [FUNCTION], "tool_choice": {"type": "function", "name": "g"}},
        "tool_choice.name",
        "no function of that name",
    ),
    (
        {"input": "x", "tools": [FUNCTION], "tool_choice": {"type": "custom", "name": "get_weather"}},
        "tool_choice.name",
        "no custom tool of that name",
    ),
    ({"input": "x", "max_output_tokens": 0}, "max_output_tokens", "at least 1"),
    ({"input": "x", "max_tool_calls": 0}, "max_tool_calls", "1 or more"),
    ({"input": "x", "top_logprobs": 21}, "top_logprobs", "0 to 20"),
    ({"input": "x", "temperature": 3}, "temperature", "0 to 2"),
    ({"input": "x", "reasoning": {"effort": "most"}}, "reasoning.effort", "'low'"),
    ({"input": "x", "reasoning": {"summary": "long"}}, "reasoning.summary", "'auto'"),
    ({"input": "x", "include": ["everything"]}, "include[0]", "reasoning.encrypted_content"),
    ({"input": "x", "metadata": {"a": 1}}, "metadata.a", "a string"),
    ({"input": "x", "metadata": {str(n): "" for n in range(17)}}, "metadata", "at most 16"),
    ({"input": "x", "metadata": {"k": "x" * 513}}, "metadata", "512"),
    ({"input": "x", "stream_options": {"include_obfuscation": False}}, "stream_options", "stream"),
    (
        {"input": "x", "text": {"format": {"type": "json_schema", "name": "a"}}},
        "text.format.schema",
        "missing",
    ),
    (
        {"input": "x", "text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}},
        "text.format.name",
        "",
    ),
]
"""A body, the field that its refusal names, and words of the refusal."""


async def test_bad_input_is_refused_with_the_field(gateway: Gateway) -> None:
    for body, param, words in BAD:
        error = await refusal(gateway, **body)
        assert (error["param"], error["type"]) == (param, "invalid_request_error"), error
        assert words in error["message"], error
    assert (await post(gateway, messages=[USER]))["status"] == "completed", "unknown fields are ignored"


async def test_many_and_large_items(encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    async with serving(
        encoding, [engine], config=GatewayConfig(max_messages=100, stream_headers_s=60.0)
    ) as gateway:
        error = await refusal(gateway, input=[USER] * 101)
        assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
        parts = {"role": "user", "content": [{"type": "input_text", "text": ""}] * 101}
        assert (await refusal(gateway, input=[parts]))["param"] == "input"
        large = {"role": "user", "content": "x" * 10_000_000}
        assert (await refusal(gateway, input=[large]))["code"] == "context_length_exceeded"


def test_another_owner_cannot_open_what_is_sealed() -> None:
    sealer = Sealer(bytes(32))
    sealed = Seals(sealer, "one").seal("x", REASONING)
    assert Seals(sealer, "one").open(sealed, REASONING, "p") == "x"
    for seals, kind in ((Seals(sealer, "two"), REASONING), (Seals(sealer, "one"), COMPACTION)):
        with pytest.raises(BrokenContent) as refused:
            seals.open(sealed, kind, "input[0].encrypted_content")
        assert refused.value.param == "input[0].encrypted_content"
