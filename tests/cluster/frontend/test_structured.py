"""What engines are asked for the forms of answers and for forced calls, and how calls of custom
tools are answered."""

import asyncio
import json
import threading
from typing import Any

import openai
import pytest
from llguidance import LLMatcher
from pydantic import BaseModel

from cluster.generation import Capacity, ChatDefaults
from cluster.generation.turn_rules import WantedTurn, wanted_turn
from cluster.grammars.byte_tokenizer import byte_tokenizer
from cluster.harmony.automaton import TurnAutomata
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.turn_grammar import ToolBody, TurnGrammar, turn_limits
from cluster.rpc import inference_pb2 as pb
from cluster.rpc import inference_pb2_grpc
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, turn
from workers.constraint.automaton import NO_LIMITS
from workers.constraint.codec import Constraint, decode
from workers.errors import InvalidRequest, Overloaded
from workers.grammars import grammar as grammars
from workers.request import EngineRequest
from workers.rpc import convert

HELLO = [{"role": "user", "content": "hello"}]
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
NESTED = {"type": "object", "properties": {"p": POINT, "deep": {"pattern": "(?=a)"}}}
LOOK = {"type": "function", "function": {"name": "look_up", "parameters": POINT}}
MOVE = {"type": "function", "function": {"name": "move", "parameters": NESTED}}
PATCH = {"name": "patch", "description": "Applies it.", "format": {"type": "text"}}
LARK = 'start: "a" | "b"'
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


async def asked(gateway: Gateway, engine: FakeEngine, **body: Any) -> EngineRequest:
    """Return what the engine was asked for a chat."""
    before = len(engine.requests)
    answer = await gateway.http.post("/v1/chat/completions", json={"messages": HELLO, **body})
    assert answer.status_code == 200, answer.text
    (request,) = engine.requests[before:]
    return request


def _named(tool: dict[str, Any], index: int) -> dict[str, Any]:
    return {**tool, "function": {**tool["function"], "name": f"f{index}"}}


async def refused(gateway: Gateway, path: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    answer = await gateway.http.post(path, json={"messages": HELLO, **body})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def expected(gateway: Gateway, encoding: HarmonyEncoding, grammar: TurnGrammar) -> Constraint:
    return Constraint.of(TurnAutomata(encoding, gateway.service.served.info.vocab_size).of(grammar))


def prompt_of(request: EngineRequest, encoding: HarmonyEncoding) -> str:
    return encoding.decode(request.prompt_token_ids, skip_special_tokens=False)


FORMS: list[tuple[dict[str, Any], grammars.Grammar]] = [
    ({"response_format": {"type": "json_object"}}, grammars.json_object()),
    ({"response_format": {"type": "json_object", "schema": POINT}}, grammars.json_schema(POINT, "")),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": POINT}}},
        grammars.json_schema(POINT, ""),
    ),
    ({"structured_outputs": {"json": POINT}}, grammars.json_schema(POINT, "")),
    ({"structured_outputs": {"json": json.dumps(POINT)}}, grammars.json_schema(POINT, "")),
    ({"guided_json": POINT}, grammars.json_schema(POINT, "")),
    ({"structured_outputs": {"regex": "[a-z]+"}}, grammars.regex("[a-z]+", "")),
    ({"guided_regex": "[a-z]+", "structured_outputs": {"regex": "[a-z]+"}}, grammars.regex("[a-z]+", "")),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, grammars.choice(["yes", "no"], "")),
    ({"guided_choice": ["yes", "no"]}, grammars.choice(["yes", "no"], "")),
    ({"structured_outputs": {"grammar": LARK, "disable_any_whitespace": True}}, grammars.lark(LARK, "")),
    ({"guided_grammar": LARK}, grammars.lark(LARK, "")),
    ({"structured_outputs": {"json_object": True, "regex": None}}, grammars.json_object()),
]


async def test_the_final_message_has_the_form(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    for body, grammar in FORMS:
        request = await asked(gateway, engine, **body)
        assert request.constraint == expected(gateway, encoding, TurnGrammar(answer=grammar)), body
        shown = "# Response Formats" in prompt_of(request, encoding)
        assert shown == (body.get("response_format", {}).get("type") == "json_schema"), body
        completion = await gateway.http.post("/v1/completions", json={"prompt": "a", **body})
        assert completion.status_code == 200, completion.text
        constraint = engine.requests[-1].constraint
        assert constraint is not None
        automaton = decode(constraint.body)
        assert automaton.grammars == (grammar.text,), body
        ends = {token_id for token_id, _ in automaton.states[0].transitions}
        assert ends == {encoding.return_, encoding.endoftext}


async def test_nothing_is_constrained_unasked(gateway: Gateway, engine: FakeEngine) -> None:
    gateway.service.reconfigure(ChatDefaults(harmony_constraint="off"), Capacity())
    for body in (
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None, "structured_outputs": None, "guided_json": None},
        {"tools": [LOOK], "tool_choice": "auto"},
        {"tools": [LOOK], "tool_choice": "none"},
        {"reasoning_effort": "none"},
    ):
        request = await asked(gateway, engine, **body)
        assert (request.constraint, request.constraint_limits) == (None, NO_LIMITS)


async def test_the_model_sees_a_json_schema_after_its_tools(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
    shape = {"name": "shopping_list", "description": "What to buy.\nAll of it.", "schema": schema}
    request = await asked(
        gateway,
        engine,
        messages=[{"role": "system", "content": "Be brief."}, *HELLO],
        tools=[LOOK],
        response_format={"type": "json_schema", "json_schema": shape},
    )
    assert "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n# Tools\n\n" in prompt_of(
        request, encoding
    )
    assert (
        "} // namespace functions\n\n# Response Formats\n\n## shopping_list\n\n"
        "// What to buy.\n// All of it.\n"
        '{"type":"object","properties":{"b":{"type":"string"},"a":{"type":"integer"}}}<|end|><|start|>user'
    ) in prompt_of(request, encoding)


CHOICES: list[tuple[Any, Any, tuple[str, ...]]] = [
    ("required", "required", ("look_up", "move")),
    ({"type": "function", "function": {"name": "move"}}, "required", ("move",)),
    (
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [LOOK]}},
        "required",
        ("look_up",),
    ),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [LOOK]}}, "allowed", ("look_up",)),
]


async def test_a_choice_of_tools_is_a_path(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    """The model sees all tools; only those of the choice can be called."""
    tools = [LOOK, {**MOVE, "function": {"name": "move", "parameters": None}}]
    forced = {"look_up": grammars.json_schema(POINT, ""), "move": grammars.json_schema(NO_ARGUMENTS, "")}
    types = {"look_up": grammars.schema_types(POINT), "move": grammars.schema_types({})}
    for choice, calls, names in CHOICES:
        request = await asked(gateway, engine, tools=tools, tool_choice=choice)
        found = forced if calls == "required" else types
        grammar = TurnGrammar(tuple(ToolBody(name, found[name]) for name in names), calls)
        assert request.constraint == expected(gateway, encoding, grammar), choice
        assert all(f"\ntype {name} = (" in prompt_of(request, encoding) for name in forced)


async def test_arguments_of_other_tools_follow_the_setting(
    gateway: Gateway, encoding: HarmonyEncoding, engine: FakeEngine
) -> None:
    strict = {**MOVE, "function": {"name": "move", "parameters": POINT, "strict": True}}
    modes: list[tuple[Any, grammars.Grammar | None]] = [
        ("schema_types", grammars.schema_types(POINT)),
        ("json", grammars.json_object()),
        ("free", None),
    ]
    for mode, other in modes:
        defaults = ChatDefaults(harmony_constraint="headers", tool_arguments=mode)
        gateway.service.reconfigure(defaults, Capacity())
        request = await asked(gateway, engine, tools=[strict, LOOK])
        bodies = (ToolBody("look_up", other), ToolBody("move", grammars.json_schema(POINT, "")))
        assert request.constraint == expected(gateway, encoding, TurnGrammar(bodies, "allowed")), mode


async def test_a_schema_that_does_not_compile_is_refused_where_it_is_promised(
    gateway: Gateway, engine: FakeEngine
) -> None:
    strict = {"type": "function", "function": {**MOVE["function"], "strict": True}}
    error = await refused(gateway, tools=[LOOK, strict], tool_choice="required")
    assert error["param"].startswith("tools[1].function.parameters")
    assert "(?=a)" not in error["message"]
    shape = {"type": "json_schema", "json_schema": {"name": "a", "schema": NESTED}}
    error = await refused(gateway, response_format=shape)
    assert error["param"].startswith("response_format.json_schema.schema")
    error = await refused(gateway, "/v1/completions", prompt="a", guided_regex="(?=a)")
    assert error["param"] == "guided_regex"
    nothing = {"type": "object", "properties": {"x": False}, "required": ["x"]}
    forbidding = {"type": "function", "function": {"name": "f", "parameters": nothing, "strict": True}}
    error = await refused(gateway, tools=[forbidding])
    assert error["param"].startswith("tools[0].function.parameters")
    assert not engine.requests


NOT_ENFORCED: list[dict[str, Any]] = [
    {"properties": {"a": {"type": "object", "propertyNames": {"pattern": "a"}}}},
    {"properties": {"a": {"type": "string", "pattern": "(?=a)"}}},
    {"properties": {"a": {"type": "array", "uniqueItems": True}}},
    {"properties": {"a": {"type": "string"}}, "minProperties": "a"},
    {"properties": {"a": {"type": "string"}}, "if": {"required": ["a"]}},
    {"properties": {"a": {"not": {"type": "string"}}}},
    {"properties": {"a": {"$ref": "https://example.com/schema"}}},
    {"properties": {"a": {"type": "string"}}, "$comment": 2**20 * "a"},  # too long
]


async def test_a_forced_tool_that_is_not_strict_has_what_can_be_enforced(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    """Agent libraries send all their tools with `required`."""
    fallbacks = gateway.service.metrics.schema_fallbacks._value
    for schema in NOT_ENFORCED:
        before = fallbacks.get()
        other = {"type": "function", "function": {"name": "other", "parameters": schema}}
        for choice in ("required", {"type": "function", "function": {"name": "other"}}):
            request = await asked(gateway, engine, tools=[LOOK, other], tool_choice=choice)
            bodies = (
                ToolBody("look_up", grammars.json_schema(POINT, "")),
                ToolBody("other", grammars.schema_types(schema)),
            )
            found = TurnGrammar(bodies if choice == "required" else bodies[1:], "required")
            assert request.constraint == expected(gateway, encoding, found), (schema, choice)
        assert fallbacks.get() == before + 2
    strict = {"type": "function", "function": {"name": "f", "parameters": NOT_ENFORCED[-1], "strict": True}}
    assert (await refused(gateway, tools=[strict]))["param"] == "tools[0].function.parameters"


async def test_arguments_that_are_enforced_are_an_object(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    tokenizer = byte_tokenizer()
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}
    for schema in (
        {},
        {"properties": {"x": {"type": "integer"}}, "required": ["x"]},
        {"type": ["object", "null"]},
        {"type": None, "anyOf": [POINT, {"type": "string"}]},
        {"$defs": {"node": {"anyOf": [node, {"type": "null"}]}}, "$ref": "#/$defs/node"},
    ):
        for extra, choice in (({"strict": True}, "auto"), ({}, "required")):
            function = {"name": "f", "parameters": schema, **extra}
            tools = [{"type": "function", "function": function}]
            request = await asked(gateway, engine, tools=tools, tool_choice=choice)
            assert request.constraint is not None
            (text,) = decode(request.constraint.body).grammars
            assert text == grammars.json_schema({**schema, "type": "object"}, "").text
            first = LLMatcher(tokenizer, text).compute_bitmask()
            assert [i for i in range(256) if first[i // 8] >> i % 8 & 1] == [ord("{")], schema


async def test_a_custom_tool_is_called_with_text(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    call = "<|channel|>commentary to=functions.patch<|message|>*** Begin<|call|>"
    engine.answer = lambda request: Script(encoding.encode_with_special(call))
    tools = [{"type": "custom", "custom": PATCH}, LOOK]
    client = gateway.client.chat.completions
    answer = await client.create(model="gpt-oss-test", messages=HELLO, tools=tools)
    (found,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert found.to_dict() == {
        "id": found.id,
        "type": "custom",
        "custom": {"name": "patch", "input": "*** Begin"},
    }
    assert (
        "// Applies it.\n// The body of the call is the input itself, as plain text and not as JSON.\n"
        "type patch = (_: string) => any;"
    ) in prompt_of(engine.requests[-1], encoding)
    stream = await client.create(model="gpt-oss-test", messages=HELLO, tools=tools, stream=True)
    deltas = [entry.to_dict() async for chunk in stream for entry in chunk.choices[0].delta.tool_calls or ()]
    assert deltas[0]["type"] == "custom"
    assert deltas[0]["custom"]["name"] == "patch"
    assert "".join(delta["custom"]["input"] for delta in deltas) == "*** Begin"
    history = [*HELLO, answer.choices[0].message, {"role": "tool", "tool_call_id": found.id, "content": "ok"}]
    await client.create(model="gpt-oss-test", messages=history, tools=tools)
    assert (
        "<|start|>assistant<|channel|>commentary to=functions.patch<|message|>*** Begin<|call|>"
        "<|start|>functions.patch<|channel|>commentary to=assistant<|message|>ok<|end|>"
    ) in prompt_of(engine.requests[-1], encoding)


async def test_a_custom_tool_over_grpc(
    stub: inference_pb2_grpc.InferenceStub, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    engine.answer = lambda request: Script(turn(encoding, call=("patch", "x")))
    message = pb.Message(role=pb.ROLE_USER, content="hello")
    request = pb.ChatRequest(
        messages=[message], tools=[pb.Tool(name="patch", type=pb.TOOL_TYPE_CUSTOM), pb.Tool(name="f")]
    )
    (call,) = (await stub.Chat(request)).choices[0].message.tool_calls
    assert (call.name, call.arguments, call.type) == ("patch", "x", pb.TOOL_TYPE_CUSTOM)
    calls = [event.tool_call async for event in stub.ChatStream(request) if event.HasField("tool_call")]
    assert {call.type for call in calls} == {pb.TOOL_TYPE_CUSTOM}


async def test_the_input_of_a_custom_tool_may_have_a_grammar(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    form = {"type": "grammar", "grammar": {"syntax": "lark", "definition": LARK}}
    tools = [{"type": "custom", "custom": {"name": "patch", "format": form}}]
    request = await asked(gateway, engine, tools=tools)
    body = ToolBody("patch", grammars.lark(LARK, ""), "text")
    assert request.constraint == expected(gateway, encoding, TurnGrammar((body,), "allowed"))
    assert f"// The input matches this grammar:\n// {LARK}\ntype patch" in prompt_of(request, encoding)
    form["grammar"] = {"syntax": "regex", "definition": "a("}
    error = await refused(gateway, tools=tools)
    assert error["param"].startswith("tools[0].custom.format.grammar.definition")


async def test_several_calls_of_a_turn(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    call = '<|channel|>commentary to=functions.look_up <|constrain|>json<|message|>{"x":%d}<|call|>'
    calls = "<|start|>assistant".join(call % x for x in range(3))
    engine.answer = lambda request: Script(encoding.encode_with_special(calls))
    body = {"messages": HELLO, "tools": [LOOK]}
    for fields, count in (({}, 1), ({"max_parallel_tool_calls": 2}, 2), ({"max_parallel_tool_calls": 9}, 3)):
        answer = (await gateway.http.post("/v1/chat/completions", json={**body, **fields})).json()
        choice = answer["choices"][0]
        assert [found["function"]["arguments"] for found in choice["message"]["tool_calls"]] == [
            f'{{"x":{x}}}' for x in range(count)
        ]
        assert choice["finish_reason"] == "tool_calls"
        ignored = (encoding.call,) if fields else ()
        assert engine.requests[-1].ignored_stop_token_ids == ignored
        assert (encoding.call in engine.requests[-1].sampling.stop_token_ids) == (not fields)


async def test_reasoning_may_have_a_limit(
    gateway: Gateway, encoding: HarmonyEncoding, engine: FakeEngine
) -> None:
    plain = TurnGrammar()
    rest = gateway.service.served.info.max_model_len - len((await asked(gateway, engine)).prompt_token_ids)
    for body, most in (
        ({"max_reasoning_tokens": 7}, 7),
        ({"thinking_token_budget": 7}, 7),
        ({"reasoning": {"max_tokens": 7}}, 7),
        ({"thinking": {"type": "enabled", "budget_tokens": 7}}, 7),
    ):
        request = await asked(gateway, engine, **body)
        assert request.constraint == expected(gateway, encoding, plain)
        limits = turn_limits(plain, encoding, max_tokens=rest, max_reasoning_tokens=most)
        assert request.constraint_limits == limits
        assert limits.max_counted_tokens == most
    unlimited = await asked(gateway, engine, thinking_token_budget=-1)
    assert unlimited.constraint == expected(gateway, encoding, plain)
    assert unlimited.constraint_limits == turn_limits(plain, encoding, max_tokens=rest)
    for body in ({"max_reasoning_tokens": 0}, {"reasoning_effort": "none", "guided_regex": "a"}):
        request = await asked(gateway, engine, **body)
        answer = grammars.regex("a", "") if "guided_regex" in body else None
        at_once = TurnGrammar(reasoning="none", answer=answer)
        assert request.constraint == expected(gateway, encoding, at_once)
        assert request.constraint_limits == NO_LIMITS


async def test_a_share_stays_for_the_answer_and_reasoning_ends_with_a_sentence(
    gateway: Gateway, encoding: HarmonyEncoding, engine: FakeEngine
) -> None:
    end = "<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
    cuts = gateway.service.metrics.reasoning_cuts._value
    begin, word = encoding.encode_with_special("<|channel|>analysis<|message|>"), encoding.encode("a")
    for wrap_up, reserves in (("Enough.", True), ("", True), ("Enough.", False)):
        defaults = ChatDefaults(harmony_constraint="headers", wrap_up=wrap_up, reserves_answer=reserves)
        gateway.service.reconfigure(defaults, Capacity())
        grammar = TurnGrammar(wrap_up=wrap_up)
        limits = turn_limits(grammar, encoding, max_tokens=200) if reserves else NO_LIMITS
        most = limits.max_length or 150
        assert (limits.max_length is not None) == reserves
        for num_short, is_cut in ((0, True), (1, False)):
            before = cuts.get()
            ids = begin + word * (most - len(begin) - num_short) + encoding.encode(wrap_up)
            script = Script(ids + encoding.encode_with_special(end))
            engine.answer = lambda request, script=script: script  # type: ignore[misc]
            request = await asked(gateway, engine, max_tokens=200)
            assert request.constraint == expected(gateway, encoding, grammar)
            assert request.constraint_limits == limits
            assert cuts.get() - before == (is_cut and reserves)


async def test_an_older_engine_runs_without_a_default_constraint(
    gateway: Gateway, engine: FakeEngine
) -> None:
    engine.capabilities = (convert.CONSTRAINT_REF,)
    gateway.service.reconfigure(ChatDefaults(harmony_constraint="headers"), Capacity())
    left_out = gateway.service.metrics.constraints_left_out.labels("engine_version")
    request = await asked(gateway, engine, tools=[LOOK], max_tokens=200)
    assert (request.constraint, request.constraint_limits) == (None, NO_LIMITS)
    assert left_out._value.get() == 1
    answer = await gateway.http.post(
        "/v1/chat/completions", json={"messages": HELLO, "response_format": {"type": "json_object"}}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica")
    assert "constraint_grammars" in answer.json()["error"]["message"]
    assert left_out._value.get() == 1


async def test_an_engine_that_cannot_prepare_a_default_runs_without_it(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    answer = turn(encoding, text="Yes.")

    def script(request: EngineRequest) -> Script:
        if request.constraint is None:
            return Script(answer)
        return Script(refusal=InvalidRequest("it takes too long", "constraint.grammars"))

    engine.answer = script
    gateway.service.reconfigure(ChatDefaults(harmony_constraint="headers"), Capacity())
    body = {"messages": HELLO, "tools": [LOOK], "max_tokens": 200}
    served = (await gateway.http.post("/v1/chat/completions", json=body)).json()
    assert served["choices"][0]["message"]["content"] == "Yes."
    assert [request.constraint is None for request in engine.requests] == [False, True]
    assert gateway.service.metrics.constraints_left_out.labels("engine")._value.get() == 1
    for fields, param in (
        ({"guided_regex": "a"}, "guided_regex"),
        ({"tools": [LOOK], "tool_choice": "required"}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking.budget_tokens"),
        ({"harmony_constraint": "headers"}, "harmony_constraint"),
    ):
        error = await refused(gateway, **fields)
        assert (error["param"], error["message"]) == (param, "it takes too long"), fields
    error = await refused(gateway, "/v1/completions", prompt="a", guided_regex="a")
    assert error["param"] == "guided_regex"
    assert len(engine.requests) == 7


async def test_a_limit_on_reasoning_is_named_as_it_was_sent(gateway: Gateway) -> None:
    for field, value in (
        ("max_reasoning_tokens", 9),
        ("thinking_token_budget", 9),
        ("reasoning", {"max_tokens": 9}),
        ("thinking", {"type": "enabled", "budget_tokens": 9}),
    ):
        error = await refused(gateway, harmony_constraint="off", **{field: value})
        name = field if isinstance(value, int) else f"{field}.{list(value)[-1]}"
        assert f"contradicts {name}:" in error["message"]


@pytest.mark.parametrize("field", ["harmony_constraint", "ignore_eos"])
async def test_all_that_needs_a_constraint_is_named(gateway: Gateway, field: str) -> None:
    strict = {"type": "function", "function": {"name": "f", "strict": True, "parameters": POINT}}
    asked = {"response_format": {"type": "json_object"}, "tools": [LOOK, strict], "tool_choice": "required"}
    value = {"harmony_constraint": "off", "ignore_eos": True}[field]
    error = await refused(gateway, max_reasoning_tokens=9, **asked, **{field: value})
    named = "response_format, tool_choice, max_reasoning_tokens and tools[1].function.strict"
    assert error["param"] == field
    assert f"contradicts {named}: leave" in error["message"]
    error = await refused(gateway, tools=[_named(strict, i) for i in range(10)], **{field: value})
    assert "tools[7].function.strict and 2 more: leave" in error["message"]


async def test_requests_for_a_form_are_counted_by_kind(gateway: Gateway, engine: FakeEngine) -> None:
    await asked(gateway, engine, response_format={"type": "json_object"})
    await asked(gateway, engine, guided_choice=["a"], tools=[LOOK], tool_choice="required")
    counted = gateway.service.metrics.structured_requests
    kinds = ("json_object", "choice", "call", "regex")
    assert [counted.labels(kind)._value.get() for kind in kinds] == [1, 1, 1, 0]


async def test_a_default_that_does_not_compile_is_any_object(
    gateway: Gateway, encoding: HarmonyEncoding, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(grammar: grammars.Grammar, param: str) -> None:
        if grammar == grammars.schema_types(POINT):
            raise InvalidRequest("It is too large.", param)

    gateway.service.reconfigure(ChatDefaults(harmony_constraint="headers"), Capacity())
    monkeypatch.setattr(gateway.service._constraints._checker, "check", check)
    grammar = TurnGrammar((ToolBody("look_up", grammars.json_object()),), "allowed")
    for _ in range(2):
        request = await asked(gateway, engine, tools=[LOOK])
        assert request.constraint == expected(gateway, encoding, grammar)
    assert gateway.service.metrics.schema_fallbacks._value.get() == 1


async def test_a_default_that_cannot_be_checked_now_is_any_object_for_this_time(
    gateway: Gateway, encoding: HarmonyEncoding, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(grammar: grammars.Grammar, param: str) -> None:
        raise Overloaded("Too many checks.")

    gateway.service.reconfigure(ChatDefaults(harmony_constraint="headers"), Capacity())
    with monkeypatch.context() as busy:
        busy.setattr(gateway.service._constraints._checker, "check", full)
        request = await asked(gateway, engine, tools=[LOOK])
        any_object = TurnGrammar((ToolBody("look_up", grammars.json_object()),), "allowed")
        assert request.constraint == expected(gateway, encoding, any_object)
        body = {"messages": HELLO, "response_format": {"type": "json_object"}}
        answer = await gateway.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 429
    request = await asked(gateway, engine, tools=[LOOK])
    types = TurnGrammar((ToolBody("look_up", grammars.schema_types(POINT)),), "allowed")
    assert request.constraint == expected(gateway, encoding, types)


async def test_others_do_not_wait_for_a_check(
    gateway: Gateway, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    checker, begun, go_on = gateway.service._constraints._checker, asyncio.Event(), asyncio.Event()
    check = checker.check

    async def slow(grammar: grammars.Grammar, param: str) -> None:
        if param == "guided_regex":
            begun.set()
            await go_on.wait()
        await check(grammar, param)

    monkeypatch.setattr(checker, "check", slow)
    for path, field in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": HELLO})):
        body = {**field, "guided_regex": f"a{len(path)}"}
        waiting = asyncio.create_task(gateway.http.post(path, json=body))
        async with asyncio.timeout(60):
            await begun.wait()
            await asked(gateway, engine, guided_choice=[path])
            completion = {"prompt": "a", "guided_choice": [path]}
            assert (await gateway.http.post("/v1/completions", json=completion)).status_code == 200
        assert not waiting.done()
        go_on.set()
        assert (await waiting).status_code == 200
        begun.clear()
        go_on.clear()


async def test_many_schemas_are_read_in_a_thread(
    gateway: Gateway, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def noted(*arguments: Any) -> WantedTurn:
        threads.append(threading.current_thread())
        return wanted_turn(*arguments)

    monkeypatch.setattr("cluster.generation.constraints.wanted_turn", noted)
    long = {"properties": {f"p{i}": {"type": "string", "description": "long" * 50} for i in range(100)}}
    for parameters in (POINT, long):
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        body = {"messages": HELLO, "tools": [tool], "harmony_constraint": "headers"}
        await gateway.http.post("/v1/chat/completions", json=body)
    small, large = threads
    assert small is threading.main_thread()
    assert large is not small


class Point(BaseModel):
    x: int


async def test_what_openais_client_parses(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    engine.answer = lambda request: Script(turn(encoding, reasoning="Hm.", text='{"x": 5}'))
    answer = await gateway.client.chat.completions.parse(
        model="gpt-oss-test", messages=HELLO, response_format=Point
    )
    assert answer.choices[0].message.parsed == Point(x=5)
    async with gateway.client.chat.completions.stream(
        model="gpt-oss-test", messages=HELLO, response_format=Point
    ) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == Point(x=5)
    with pytest.raises(openai.BadRequestError) as wrong:
        await gateway.client.chat.completions.create(
            model="gpt-oss-test", messages=HELLO, tool_choice="required", tools=[]
        )
    assert wrong.value.param == "tool_choice"
