"""The bodies of the Messages API: events and answers against Anthropic's own models, what the model
gets to see of a request, refusals."""

import asyncio
import json
from typing import Any

import httpx
import orjson
import pydantic
import pytest
from anthropic import types
from anthropic.types import beta

from cluster.config import GatewayConfig
from cluster.frontend.anthropic import errors as messages_errors
from cluster.frontend.anthropic.blocks import call_input
from cluster.frontend.anthropic.signatures import Signatures
from cluster.frontend.errors import TABLE
from cluster.harmony.encoding import HarmonyEncoding
from cluster.sealing import BrokenSeal, Sealer
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, serving, turn
from workers import errors

EVENTS = [
    pydantic.TypeAdapter(types.RawMessageStreamEvent),
    pydantic.TypeAdapter(beta.BetaRawMessageStreamEvent),
]
SHAPES: dict[str, dict[str, Any]] = {
    "text": {"text": "Hello there."},
    "thinking and text": {"reasoning": "Think first.", "text": "Hello there."},
    "preamble and call": {"reasoning": "Call it.", "text": "One moment.", "call": ("f", '{"a": "ü"}')},
    "call without arguments": {"call": ("f", "{}")},
    "nothing": {},
}
F: dict[str, Any] = {"name": "f", "input_schema": {"type": "object"}}
USER = {"role": "user", "content": "Hello"}


async def post(gateway: Gateway, **fields: Any) -> httpx.Response:
    return await gateway.http.post("/v1/messages", json={"max_tokens": 500, "messages": [USER], **fields})


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Return a stream's events; the name of each is its type."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *frames, rest = response.text.split("\n\n")
    assert rest == ""
    events = []
    for frame in frames:
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


@pytest.mark.parametrize("display", [None, "summarized", "omitted"])
@pytest.mark.parametrize("shape", SHAPES)
async def test_every_event_and_answer_is_one_of_anthropic_s_own(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding, shape: str, display: str | None
) -> None:
    ids = turn(encoding, **SHAPES[shape]) or list(encoding.encode_with_special("<|return|>"))
    engine.answer = lambda request: Script(ids, per_message=3)
    thinking = {} if display is None else {"thinking": {"type": "adaptive", "display": display}}
    response = await post(gateway, tools=[F], stream=True, **thinking)
    events = events_of(response)
    for event in events:
        for adapter in EVENTS:
            adapter.validate_json(orjson.dumps(event))
    assert events[0]["type"] == "message_start"
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    assert events[0]["message"]["content"] == []
    open_block, blocks = None, 0
    for event in events[1:-2]:  # blocks follow each other, and each is closed before the next
        match event["type"]:
            case "content_block_start":
                assert open_block is None
                assert event["index"] == blocks
                open_block, blocks = event["index"], blocks + 1
            case "content_block_delta":
                assert event["index"] == open_block
            case "content_block_stop":
                assert event["index"] == open_block
                open_block = None
            case other:
                pytest.fail(other)
    assert open_block is None
    whole = await post(gateway, tools=[F], **thinking)
    types.Message.model_validate_json(whole.content)
    beta.BetaMessage.model_validate_json(whole.content)
    body = whole.json()
    assert len(body["content"]) == blocks
    assert body["stop_reason"] == events[-2]["delta"]["stop_reason"]
    assert body["usage"] == {**events[-2]["usage"], "service_tier": "standard"}
    has_thinking = bool(display and SHAPES[shape].get("reasoning"))
    assert [block["type"] for block in body["content"]].count("thinking") == has_thinking


@pytest.mark.parametrize(
    ("arguments", "input"),
    [
        ("", {}),
        ('{"a": [1, {"b": "cut o', {"a": [1, {"b": "cut o"}]}),
        ("[1]", {"arguments": "[1]"}),
        ("no JSON", {"arguments": "no JSON"}),
        ('{"a": NaN}', {"arguments": '{"a": NaN}'}),
        ('{"a": 1e999, "b', {"arguments": '{"a": 1e999, "b'}),
    ],
)
def test_arguments_that_are_no_object_are_not_lost(arguments: str, input: dict[str, Any]) -> None:
    assert orjson.loads(orjson.dumps(call_input(arguments))) == input


@pytest.mark.parametrize("cut", [False, True])
async def test_numbers_keep_their_digits(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding, cut: bool
) -> None:
    number, rest = "123456789012345678901234567890", ',"b":"cut o' if cut else ',"b":1e999}'
    ids = turn(encoding, call=("f", f'{{"a":{number}{rest}'))
    engine.answer = lambda request: Script(ids[:-1], finish="length") if cut else Script(ids)
    response = await post(gateway, tools=[F])
    assert response.status_code == 200, response.text
    written = f'{{"a":{number}{rest}"}}' if cut else f'{{"a":{number}{rest}'
    assert f'"input":{written}' in response.text


def test_a_signature_is_of_one_text_and_one_server() -> None:
    signatures = Signatures(Sealer(b"0123456789abcdef"), "a")
    shown, hidden = (signatures.sign("I think.", shown=value) for value in (True, False))
    assert signatures.signed_thinking("I think.", shown) == "I think."
    assert signatures.signed_thinking("", hidden) == "I think."
    for thinking, sealed in (
        ("Another.", shown),
        ("", shown),
        ("Another.", hidden),
        ("I think.", "c2lnbmF0dXJl"),
    ):
        with pytest.raises(BrokenSeal):
            signatures.signed_thinking(thinking, sealed)
    with pytest.raises(BrokenSeal):
        Signatures(Sealer(b"another-server-x"), "a").signed_thinking("I think.", shown)


@pytest.mark.parametrize("display", ["summarized", "omitted"])
async def test_a_signature_is_of_one_api_key(
    engine: FakeEngine, encoding: HarmonyEncoding, display: str
) -> None:
    engine.answer = lambda request: Script(turn(encoding, reasoning="Think.", text="Hello."))
    fields = {"max_tokens": 500, "thinking": {"type": "adaptive", "display": display}}
    config = GatewayConfig(api_keys=("first-key", "second-key"), stream_headers_s=60.0)
    async with serving(encoding, [engine], config=config) as gateway, asyncio.timeout(60):
        first = (await post(gateway, **fields)).json()
        messages = [USER, {"role": "assistant", "content": first["content"]}, USER]
        answers = [
            await gateway.http.post(
                path, json={**fields, "messages": messages}, headers={"x-api-key": key, "authorization": ""}
            )
            for path in ("/v1/messages", "/v1/messages/count_tokens")
            for key in config.api_keys
        ]
    assert [answer.status_code for answer in answers] == [200, 400, 200, 400]
    for refused in answers[1::2]:
        assert "Invalid `signature` in `thinking` block" in refused.json()["error"]["message"]


async def prompt_of(gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding, **fields: Any) -> str:
    """Return the prompt of a request, which is served, from its instructions on."""
    response = await post(gateway, **fields)
    assert response.status_code == 200, response.text
    prompt = encoding.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
    return prompt.partition("<|end|>")[2]


async def test_instructions_stay_cached(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    """Claude Code's attribution is left out, and instructions in the middle stay there: what came
    before them is the same as without them."""

    def system(number: int) -> list[dict[str, Any]]:
        return [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.{number}; cch={number};"},
            {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "Be brief."},
        ]

    first = await prompt_of(gateway, engine, encoding, system=system(1))
    assert first == (
        "<|start|>developer<|message|># Instructions\n\nYou are an agent.\n\nBe brief.<|end|>"
        "<|start|>user<|message|>Hello<|end|><|start|>assistant"
    )
    assert await prompt_of(gateway, engine, encoding, system=system(2)) == first
    line = "x-anthropic-billing-header: cch=3;\nYou are an agent.\n\nBe brief."
    assert await prompt_of(gateway, engine, encoding, system=line) == first
    later = [USER, {"role": "system", "content": [{"type": "text", "text": "Now be verbose."}]}]
    assert await prompt_of(gateway, engine, encoding, system=system(4), messages=later) == (
        first.removesuffix("<|start|>assistant")
        + "<|start|>developer<|message|># Instructions\n\nNow be verbose.<|end|><|start|>assistant"
    )


async def test_blocks_are_rendered_in_their_order(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    def use(id: str, **arguments: Any) -> dict[str, Any]:
        return {"type": "tool_use", "id": id, "name": "f", "input": arguments}

    def result(id: str, content: Any, **fields: Any) -> dict[str, Any]:
        return {"type": "tool_result", "tool_use_id": id, "content": content, **fields}

    messages = [
        {"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, use("a", x=1)]},
        {"role": "assistant", "content": [use("b")]},
        {
            "role": "user",
            "content": [
                result("b", [{"type": "text", "text": "second"}], is_error=True),
                result("a", "first <|end|>"),
                {"type": "text", "text": "Go on."},
            ],
        },
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "Thanks."},
    ]
    call = "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    of = "<|start|>functions.f<|channel|>commentary to=assistant<|message|>"
    assert await prompt_of(gateway, engine, encoding, messages=messages) == (
        "<|start|>user<|message|>One.\n\nTwo.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        f'{call}{{"x":1}}<|call|>{call}{{}}<|call|>'
        f"{of}first <|end|><|end|>{of}Error: second<|end|>"
        "<|start|>user<|message|>Go on.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Done.<|end|>"
        "<|start|>user<|message|>Thanks.<|end|><|start|>assistant"
    )
    ids = engine.requests[-1].prompt_token_ids
    assert ids.count(encoding.end) + ids.count(encoding.call) == 10  # a text has no control tokens


@pytest.mark.parametrize(
    ("fields", "effort", "max_reasoning_tokens"),
    [
        ({}, "medium", None),
        ({"thinking": {"type": "adaptive"}}, "medium", None),
        ({"thinking": {"type": "disabled"}}, "low", None),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low", 1024),
        ({"thinking": {"type": "enabled", "budget_tokens": 31_999}}, "high", 31_999),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "max"}},
            "high",
            1024,
        ),
        ({"output_config": {"effort": "low"}}, "low", None),
    ],
)
async def test_effort_and_budget(
    gateway: Gateway,
    engine: FakeEngine,
    encoding: HarmonyEncoding,
    fields: dict[str, Any],
    effort: str,
    max_reasoning_tokens: int | None,
) -> None:
    await post(gateway, **fields)
    request = engine.requests[-1]
    prompt = encoding.decode(request.prompt_token_ids, skip_special_tokens=False)
    assert f"\nReasoning: {effort}\n" in prompt
    assert request.constraint_limits.max_counted_tokens == max_reasoning_tokens


@pytest.mark.parametrize(
    ("choice", "required", "shows_tools"),
    [
        (None, False, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, False, True),
        ({"type": "any"}, True, True),
        ({"type": "tool", "name": "f"}, True, True),
        ({"type": "none"}, False, False),
    ],
)
async def test_tool_choice(
    gateway: Gateway,
    engine: FakeEngine,
    encoding: HarmonyEncoding,
    choice: dict[str, Any] | None,
    required: bool,
    shows_tools: bool,
) -> None:
    engine.answer = lambda request: Script(turn(encoding, call=("f", "{}")))
    prompt = await prompt_of(gateway, engine, encoding, tools=[F], tool_choice=choice)
    assert ("type f = " in prompt) is shows_tools
    plain = engine.requests[-1].constraint
    await post(gateway, tools=[F])
    assert plain is not None
    is_other = plain.id != engine.requests[-1].constraint.id  # type: ignore[union-attr]
    assert is_other is (required or not shows_tools)


def assistant(*blocks: dict[str, Any]) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", "content": list(blocks)}, USER]


def user(*blocks: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(blocks)}]


BEGUN = [USER, {"role": "assistant", "content": "Hi th"}]
CALL = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no max_tokens": ({"max_tokens": None}, "max_tokens must be an integer."),
    "no messages": ({"messages": []}, "at least one message is required"),
    "a call at the end": (
        {"messages": assistant(CALL)[:2]},
        "messages.1: the final `assistant` message must",
    ),
    "image": (
        {"messages": user({"type": "image", "source": {}})},
        "messages.0.content.0 is of type 'image': this model reads text only.",
    ),
    "document": ({"messages": user({"type": "document", "source": {}})}, "'document'"),
    "image in a result": (
        {
            "messages": [
                *assistant(CALL)[:2],
                *user({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}),
            ]
        },
        "messages.2.content.0.content.0 is of type 'image'",
    ),
    "a broken signature": (
        {"messages": assistant({"type": "thinking", "thinking": "x", "signature": "c2lnbmF0dXJl"})},
        "messages.1.content.0: Invalid `signature` in `thinking` block",
    ),
    "no signature": (
        {"messages": assistant({"type": "thinking", "thinking": "x"})},
        "messages.1.content.0.thinking.signature: Field required",
    ),
    "redacted thinking": (
        {"messages": assistant({"type": "redacted_thinking", "data": "x"})},
        "messages.1.content.0: Invalid `data` in `redacted_thinking` block",
    ),
    "a result without its call": (
        {"messages": user({"type": "tool_result", "tool_use_id": "zz", "content": "x"})},
        "messages.0.content.0: unexpected `tool_use_id` found in `tool_result` blocks: zz.",
    ),
    "two calls of one id": ({"messages": assistant(CALL, CALL)}, "`tool_use` ids must be unique"),
    "a call by the user": ({"messages": user(CALL)}, "`tool_use` blocks cannot be in `user` messages"),
    "no input": (
        {"messages": assistant({"type": "tool_use", "id": "a", "name": "f"})},
        "messages.1.content.0.input: Field required",
    ),
    "a name with blanks": (
        {"messages": assistant({**CALL, "name": "a b"})},
        "messages.1.content.0.name must",
    ),
    "a server's tool": (
        {"tools": [F, {"type": "web_search_20250305", "name": "web_search"}]},
        "tools.1 is of type 'web_search_20250305', a tool of Anthropic",
    ),
    "a tool's name": ({"tools": [{**F, "name": "a b"}]}, "tools.0.name must have 1 to 128"),
    "two tools of one name": ({"tools": [F, F]}, "tools.1.name: there is already a tool"),
    "a tool's schema": ({"tools": [{**F, "input_schema": {"type": "string"}}]}, "tools.0.input_schema must"),
    "a strict schema": (
        {"tools": [{**F, "strict": True, "input_schema": {"type": "object", "not": {"required": ["a"]}}}]},
        "tools.0.input_schema",
    ),
    "a forced tool": ({"tool_choice": {"type": "any"}}, "tool_choice requires a call"),
    "another tool": ({"tools": [F], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name is 'g'"),
    "no name": ({"tools": [F], "tool_choice": {"type": "tool"}}, "tool_choice.name: Field required"),
    "a budget": ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens: Field required"),
    "an effort": ({"output_config": {"effort": "extreme"}}, "output_config.effort must be"),
    "a stop sequence": ({"stop_sequences": [""]}, "stop_sequences.0 must be 1 to 1024 characters"),
    "a schema": (
        {"output_config": {"format": {"type": "json_schema", "schema": {"not": {"type": "string"}}}}},
        "output_config.format.schema",
    ),
    "a call in place of the text that is continued": (
        {"messages": BEGUN, "tools": [F], "tool_choice": {"type": "any"}},
        "messages: the answer continues the text of the last message, but tool_choice asks for a call",
    ),
    "a beginning of another form": (
        {
            "messages": BEGUN,
            "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
        },
        "messages: the last message is no beginning of what output_config.format.schema asks for",
    ),
    "MCP servers": ({"mcp_servers": [{"type": "url"}]}, "mcp_servers is not offered"),
    "a thread": ({"thread": {"type": "create"}}, "thread is not offered"),
    "a container": ({"container": "c"}, "container is not offered"),
    "a typing error": ({"max_token": 5}, "did you mean max_tokens"),
    "deep input": (
        {"messages": assistant({**CALL, "input": json.loads('{"a":' * 300 + "1" + "}" * 300)})},
        "messages.1.content.0.input is nested too deeply",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
async def test_refusals(gateway: Gateway, engine: FakeEngine, case: str) -> None:
    fields, said = REFUSALS[case]
    response = await post(gateway, **fields)
    assert response.status_code == 400, response.text
    body = response.json()
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert said in body["error"]["message"]
    assert "continue_final_message" not in body["error"]["message"]
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    types.ErrorResponse.model_validate(body)
    assert not engine.requests


STATUSES = {
    "InvalidRequest": (400, "invalid_request_error"),
    "ContextLengthExceeded": (400, "invalid_request_error"),
    "ModelNotFound": (404, "not_found_error"),
    "Overloaded": (529, "overloaded_error"),
    "ConstraintNotReady": (529, "overloaded_error"),
    "DeadlineExceeded": (504, "timeout_error"),
    "EngineDead": (503, "api_error"),
    "NoReplica": (503, "api_error"),
    "CantataError": (500, "api_error"),
    "Unauthenticated": (401, "authentication_error"),
    "BodyTooLarge": (413, "request_too_large"),
    "UnknownRoute": (404, "not_found_error"),
    "WrongMethod": (405, "invalid_request_error"),
    "UnsupportedMediaType": (415, "invalid_request_error"),
}


@pytest.mark.parametrize("kind", TABLE)
def test_every_error_has_a_form(kind: type[errors.CantataError]) -> None:
    body = orjson.loads(messages_errors.body(kind("A sentence."), "id-1"))
    assert set(body) == {"type", "error", "request_id"}
    assert body["error"]["message"].endswith("A sentence.")
    if kind.__name__ in STATUSES:
        assert (messages_errors.status(kind("x")), body["error"]["type"]) == STATUSES[kind.__name__]
    if body["error"]["type"] != "request_too_large":  # documented, and unknown to the package
        types.ErrorResponse.model_validate(body)


async def test_refusals_before_the_request_is_read(engine: FakeEngine, encoding: HarmonyEncoding) -> None:
    config = GatewayConfig(max_body_bytes=2000, max_header_bytes=4096)
    async with serving(encoding, [engine], config=config) as gateway, asyncio.timeout(60):
        large = await post(gateway, messages=[{"role": "user", "content": "x" * 3000}])
        assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")
        unknown = await gateway.http.get("/v1/messages/batches")
        assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")
        wrong = await post(gateway, model="claude-opus-4-8")
        assert (wrong.status_code, wrong.json()["error"]["type"]) == (404, "not_found_error")
        assert wrong.json()["error"]["message"].startswith("model: ")
        method = await gateway.http.delete("/v1/messages")
        assert (method.status_code, method.json()["error"]["type"]) == (405, "invalid_request_error")
        headers = await gateway.http.post("/v1/messages?beta=true", headers={"x-filler": "x" * 5000})
        assert (headers.status_code, headers.json()["error"]["type"]) == (431, "invalid_request_error")
        assert headers.headers["request-id"] == headers.json()["request_id"]
        full = errors.Overloaded("The queue is full.", 2.0)
        engine.answer = lambda request: Script(refusal=full)
        busy = await post(gateway, stream=True)
        assert (busy.status_code, busy.headers["retry-after"]) == (529, "2")
        assert busy.json()["error"]["type"] == "overloaded_error"


async def test_a_silent_stream_pings_and_ends_in_an_error_event(
    engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    gate = asyncio.Event()
    engine.answer = lambda request: Script(
        turn(encoding, text="Hello."), gate=gate, break_after=0, failure=errors.Overloaded("Full.")
    )
    config = GatewayConfig(stream_headers_s=0.01, stream_keep_alive_s=0.01)
    body = {"max_tokens": 500, "messages": [USER], "stream": True}
    frames = ""
    async with (
        asyncio.timeout(60),
        serving(encoding, [engine], config=config) as gateway,
        gateway.http.stream("POST", "/v1/messages", json=body) as response,
    ):
        async for text in response.aiter_text():
            frames += text
            if frames.count("event: ping") > 2:
                gate.set()
    *pings, error, rest = frames.split("\n\n")
    assert rest == ""
    assert {*pings} == {'event: ping\ndata: {"type":"ping"}'}
    name, data = error.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "overloaded_error"
