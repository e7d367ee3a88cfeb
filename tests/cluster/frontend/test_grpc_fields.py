"""The gRPC API has every field that chat has over HTTP, and each of them does the same."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor
from pydantic import BaseModel

from cluster.events import ChoiceFinish, TokenCandidate, TokenLogprob
from cluster.frontend import answers, schema, schema_formats, schema_tools
from cluster.frontend.grpc_messages import ChatEvents
from cluster.generation import Generation
from cluster.harmony.encoding import HarmonyEncoding
from cluster.rpc import inference_pb2 as pb
from cluster.rpc import inference_pb2_grpc
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, turn
from workers.request import EngineRequest, SamplingParams

Stub = inference_pb2_grpc.InferenceStub


@dataclass(frozen=True)
class Pair:
    """A type of the HTTP API and the message that stands for it.

    Attributes:
        elsewhere: HTTP's fields that have another name or place: the path from the message.
        without: HTTP's fields that the message does not need, with the reason.
    """

    http: type
    grpc: Descriptor
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)


IGNORED, OTHER_NAME = "accepted and ignored over HTTP", "another name of a field that is there"
NOT_OFFERED = "refused over HTTP, or accepted only where it asks for nothing"
NO_TIMINGS = "the times at which messages arrive tell the same"
PAIRS = [
    Pair(
        schema.ChatCompletionRequest,
        pb.ChatRequest.DESCRIPTOR,
        without={
            "stream": "the method ChatStream",
            "stream_options": "every stream ends with its usage",
            "logprobs": "top_logprobs, where 0 asks for the chosen tokens only",
            "return_tokens_as_token_ids": "log-probabilities have both",
            "chat_template_kwargs": "its fields are the request's own",
            "skip_special_tokens": "no effect",
            "add_generation_prompt": "follows from continue_final_message",
            "timings_per_token": NO_TIMINGS,
        }
        | dict.fromkeys(
            [
                *("max_completion_tokens", "reasoning", "thinking", "enable_thinking"),
                *("thinking_token_budget", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
                *("json_schema", "grammar"),
            ],
            OTHER_NAME,
        )
        | dict.fromkeys(("audio", "functions", "function_call", "modalities"), NOT_OFFERED)
        | dict.fromkeys(
            [
                "metadata",
                "moderation",
                "prediction",
                "prompt_cache_key",
                "prompt_cache_options",
                "prompt_cache_retention",
                "safety_identifier",
                "service_tier",
                "store",
                "user",
                "verbosity",
                "web_search_options",
            ],
            IGNORED,
        ),
    ),
    Pair(
        schema.ChatTemplateKwargs,
        pb.ChatRequest.DESCRIPTOR,
        without={"enable_thinking": OTHER_NAME},
    ),
    Pair(
        schema.Message,
        pb.Message.DESCRIPTOR,
        without=dict.fromkeys(
            [
                "provider_specific_fields",
                "reasoning_content",
                "reasoning_details",
                "refusal",
                "thinking",
                "thinking_blocks",
            ],
            OTHER_NAME,
        )
        | dict.fromkeys(("annotations", "audio", "function_call", "parsed"), IGNORED),
    ),
    Pair(
        schema_tools.FunctionToolCall,
        pb.ToolCall.DESCRIPTOR,
        elsewhere={"function": "name"},
        without={"index": IGNORED},
    ),
    Pair(
        schema_tools.CustomToolCall,
        pb.ToolCall.DESCRIPTOR,
        elsewhere={"custom": "name"},
        without={"index": IGNORED},
    ),
    Pair(schema_tools.FunctionCall, pb.ToolCall.DESCRIPTOR, without={"parsed_arguments": IGNORED}),
    Pair(schema_tools.CustomCall, pb.ToolCall.DESCRIPTOR, elsewhere={"input": "arguments"}),
    Pair(schema_tools.FunctionTool, pb.Tool.DESCRIPTOR, elsewhere={"function": "name"}),
    Pair(schema_tools.CustomTool, pb.Tool.DESCRIPTOR, elsewhere={"custom": "name"}),
    Pair(schema_tools.Function, pb.Tool.DESCRIPTOR),
    Pair(schema_tools.Custom, pb.Tool.DESCRIPTOR),
    Pair(schema_tools.ToolGrammar, pb.ToolGrammar.DESCRIPTOR),
    Pair(
        schema_tools.AllowedTools,
        pb.ChatRequest.DESCRIPTOR,
        elsewhere={"mode": "tool_choice"},
    ),
    Pair(
        schema_formats.JsonSchemaFormat,
        pb.ResponseFormat.DESCRIPTOR,
        without={"type": "the member of the oneof"},
    ),
    Pair(
        schema_formats.JsonObjectFormat,
        pb.ResponseFormat.DESCRIPTOR,
        elsewhere={"type": "json_object"},
        without={"schema": "structured_outputs.json"},
    ),
    Pair(
        schema_formats.JsonSchema,
        pb.JsonSchemaFormat.DESCRIPTOR,
        without={"strict": "no effect"},
    ),
    Pair(
        schema_formats.StructuredOutputs,
        pb.StructuredOutputs.DESCRIPTOR,
        without=dict.fromkeys(("disable_any_whitespace", "whitespace_pattern"), "no effect")
        | dict.fromkeys(("disable_additional_properties", "structural_tag"), NOT_OFFERED),
    ),
    Pair(
        answers.ChatCompletion,
        pb.ChatResponse.DESCRIPTOR,
        elsewhere={"created": "created_unix_s"},
        without={"object": "the message's type", "timings": NO_TIMINGS},
    ),
    Pair(answers.ChatChoiceBody, pb.Choice.DESCRIPTOR),
    Pair(
        answers.AnswerMessage,
        pb.Message.DESCRIPTOR,
        without={"refusal": "always null", "reasoning_content": OTHER_NAME},
    ),
    Pair(
        answers.ToolCallBody,
        pb.ToolCall.DESCRIPTOR,
        elsewhere={"function": "name", "custom": "name"},
    ),
    Pair(answers.CustomBody, pb.ToolCall.DESCRIPTOR, elsewhere={"input": "arguments"}),
    Pair(
        answers.UsageBody,
        pb.Usage.DESCRIPTOR,
        elsewhere={
            "prompt_tokens_details": "cached_tokens",
            "completion_tokens_details": "reasoning_tokens",
        },
        without={"total_tokens": "the sum of two others"},
    ),
    Pair(answers.PromptTokensDetails, pb.Usage.DESCRIPTOR),
    Pair(answers.CompletionTokensDetails, pb.Usage.DESCRIPTOR),
    Pair(
        answers.ContentLogprob,
        pb.TokenLogprob.DESCRIPTOR,
        elsewhere={"bytes": "token", "top_logprobs": "top"},
    ),
    Pair(answers.TopLogprob, pb.TokenLogprob.Candidate.DESCRIPTOR, elsewhere={"bytes": "token"}),
    Pair(
        answers.ChatCompletionChunk,
        pb.ChatEvent.DESCRIPTOR,
        elsewhere={
            "created": "head.created_unix_s",
            "model": "head.model",
            "system_fingerprint": "head.system_fingerprint",
            "prompt_token_ids": "head.prompt_token_ids",
            "choices": "choice",
        },
        without={"object": "the message's type", "timings": NO_TIMINGS},
    ),
    Pair(
        answers.ChunkChoice,
        pb.ChatEvent.DESCRIPTOR,
        elsewhere={
            "index": "choice",
            "delta": "text",
            "logprobs": "text.logprobs",
            "finish_reason": "finish.reason",
            "stop_reason": "finish.stop_reason",
        },
    ),
    Pair(
        answers.DeltaBody,
        pb.ChatEvent.DESCRIPTOR,
        elsewhere={"content": "text.text", "tool_calls": "tool_call"},
        without={"role": "always the assistant's", "reasoning_content": OTHER_NAME},
    ),
    Pair(
        answers.ToolCallDeltaBody,
        pb.ToolCallDelta.DESCRIPTOR,
        elsewhere={"index": "call_index", "function": "name", "custom": "name"},
    ),
    Pair(answers.FunctionBody, pb.ToolCallDelta.DESCRIPTOR),
]


def http_fields(kind: type) -> set[str]:
    if issubclass(kind, BaseModel):
        return {field.alias or name for name, field in kind.model_fields.items()}
    return set(kind.__annotations__)


def has(message: Descriptor, path: str) -> bool:
    name, _, rest = path.partition(".")
    found = message.fields_by_name.get(name)
    return found is not None and (
        not rest or (found.message_type is not None and has(found.message_type, rest))
    )


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.http.__name__)
def test_every_field_over_http_has_one_here(pair: Pair) -> None:
    names = http_fields(pair.http)
    same = {name for name in names if name in pair.grpc.fields_by_name}
    missing = names - same - pair.elsewhere.keys() - pair.without.keys()
    assert missing == set(), "add these to inference.proto, or give the reason why not in PAIRS"
    assert [path for path in pair.elsewhere.values() if not has(pair.grpc, path)] == []
    assert pair.elsewhere.keys() & pair.without.keys() == set()
    assert pair.elsewhere.keys() | pair.without.keys() <= names - same, "these are listed needlessly"


USER = {"role": "user", "content": "Hello"}
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "It.",
        "strict": True,
        # In the order of a Struct: another order is another grammar.
        "parameters": {"properties": {"a": {"type": "integer"}}, "type": "object"},
    },
}
HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add.", "name": "anna"},
    {
        "role": "assistant",
        "content": "I will.",
        "reasoning": "Hm.",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "c", "content": "3"},
]
GRPC_TOOL = dict(TOOL["function"].items())  # type: ignore[attr-defined]
GRPC_HISTORY = [
    {"role": "ROLE_SYSTEM", "content": "Be brief."},
    {"role": "ROLE_USER", "content": "Add.", "name": "anna"},
    {
        "role": "ROLE_ASSISTANT",
        "content": "I will.",
        "reasoning": "Hm.",
        "tool_calls": [{"id": "c", "name": "f", "arguments": "{}"}],
    },
    {"role": "ROLE_TOOL", "tool_call_id": "c", "content": "3"},
]
CUSTOM = {"type": "custom", "custom": {"name": "g", "description": "It."}}
PATCH = {"syntax": "regex", "definition": "[a-z]+"}
CUSTOM_PATCH = {
    "type": "custom",
    "custom": {"name": "g", "format": {"type": "grammar", "grammar": PATCH}},
}
CUSTOM_HISTORY = [
    {
        "role": "assistant",
        "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "g", "input": "x"}}],
    },
    {"role": "tool", "tool_call_id": "c", "content": "3"},
]
GRPC_CUSTOM_HISTORY = [
    {
        "role": "ROLE_ASSISTANT",
        "tool_calls": [{"id": "c", "name": "g", "arguments": "x", "type": "TOOL_TYPE_CUSTOM"}],
    },
    {"role": "ROLE_TOOL", "tool_call_id": "c", "content": "3"},
]
POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "a": {"type": "string"}}}
NAMED_F = {"type": "function", "function": {"name": "f"}}
LONG = "one two three four five six seven"
SAME = [
    {"max_tokens": 5},
    {"temperature": 0.5},
    {"temperature": 0},
    {"top_p": 0.25},
    {"top_p": 0},
    {"top_k": 7},
    {"top_k": -1},
    {"min_p": 0.125},
    {"presence_penalty": -0.5},
    {"presence_penalty": 0},
    {"frequency_penalty": 1.5},
    {"repetition_penalty": 1.25},
    {"logit_bias": {"5": 1.5, "7": -100}},
    {"seed": 2**64 - 1},
    {"seed": 0},
    {"n": 3},
    {"min_tokens": 2},
    {"ignore_eos": True},
    {"ignore_eos": False},
    {"stop_token_ids": [5, 9]},
    {"allowed_token_ids": [9, 5]},
    {"bad_words": ["no", "never"]},
    {"cache_salt": "tenant"},
    {"priority": -3},
    {"truncate_prompt_tokens": 4},
    {"prompt_logprobs": 2},
    {"prompt_logprobs": 0},
    {"model": "gpt-oss-test"},
]
"""Fields that JSON writes alike in both APIs."""
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    *((case, case) for case in SAME),
    ({"logprobs": True, "top_logprobs": 2}, {"top_logprobs": 2}),
    ({"logprobs": True}, {"top_logprobs": 0}),
    ({"reasoning_effort": "low"}, {"reasoning_effort": "REASONING_EFFORT_LOW"}),
    ({"reasoning_effort": "medium"}, {"reasoning_effort": "REASONING_EFFORT_MEDIUM"}),
    ({"reasoning_effort": "high"}, {"reasoning_effort": "REASONING_EFFORT_HIGH"}),
    ({"harmony_constraint": "off"}, {"harmony_constraint": "HARMONY_CONSTRAINT_OFF"}),
    ({"harmony_constraint": "headers"}, {"harmony_constraint": "HARMONY_CONSTRAINT_HEADERS"}),
    ({"messages": HISTORY, "tools": [TOOL]}, {"messages": GRPC_HISTORY, "tools": [GRPC_TOOL]}),
    ({"tools": [TOOL]}, {"tools": [GRPC_TOOL]}),
    ({"tools": [TOOL], "tool_choice": "auto"}, {"tools": [GRPC_TOOL], "tool_choice": "TOOL_CHOICE_AUTO"}),
    ({"tools": [TOOL], "tool_choice": "none"}, {"tools": [GRPC_TOOL], "tool_choice": "TOOL_CHOICE_NONE"}),
    (
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [GRPC_TOOL], "tool_choice": "TOOL_CHOICE_REQUIRED"},
    ),
    (
        {"tools": [TOOL], "tool_choice": NAMED_F},
        {"tools": [GRPC_TOOL], "tool_choice": "TOOL_CHOICE_REQUIRED", "allowed_tools": ["f"]},
    ),
    (
        {
            "tools": [TOOL, CUSTOM],
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "custom", "custom": {"name": "g"}}]},
            },
        },
        {
            "tools": [GRPC_TOOL, {"name": "g", "description": "It.", "type": "TOOL_TYPE_CUSTOM"}],
            "allowed_tools": ["g"],
        },
    ),
    (
        {"tools": [CUSTOM_PATCH], "messages": CUSTOM_HISTORY},
        {
            "tools": [
                {
                    "name": "g",
                    "type": "TOOL_TYPE_CUSTOM",
                    "format": {"syntax": "GRAMMAR_SYNTAX_REGEX", "definition": "[a-z]+"},
                }
            ],
            "messages": GRPC_CUSTOM_HISTORY,
        },
    ),
    (
        {"tools": [TOOL], "max_parallel_tool_calls": 3},
        {"tools": [GRPC_TOOL], "max_parallel_tool_calls": 3},
    ),
    ({"reasoning_effort": "none"}, {"reasoning_effort": "REASONING_EFFORT_NONE"}),
    ({"max_reasoning_tokens": 7}, {"max_reasoning_tokens": 7}),
    ({"thinking_token_budget": 7}, {"max_reasoning_tokens": 7}),
    ({"reasoning": {"max_tokens": 0}}, {"max_reasoning_tokens": 0}),
    ({"response_format": {"type": "json_object"}}, {"response_format": {"json_object": True}}),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "point", "description": "A.\nB.", "schema": POINT},
            }
        },
        {
            "response_format": {
                "json_schema": {"name": "point", "description": "A.\nB.", "schema": json.dumps(POINT)}
            }
        },
    ),
    ({"structured_outputs": {"json": POINT}}, {"structured_outputs": {"json": json.dumps(POINT)}}),
    ({"guided_json": json.dumps(POINT)}, {"structured_outputs": {"json": json.dumps(POINT)}}),
    ({"guided_regex": "[a-z]+"}, {"structured_outputs": {"regex": "[a-z]+"}}),
    ({"guided_choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["yes", "no"]}}),
    ({"guided_grammar": 'start: "a"'}, {"structured_outputs": {"grammar": 'start: "a"'}}),
    ({"structured_outputs": {"json_object": True}}, {"structured_outputs": {"json_object": True}}),
    (
        {"messages": [USER, {"role": "assistant", "content": "Hi"}], "continue_final_message": True},
        {
            "messages": [
                {"role": "ROLE_USER", "content": "Hello"},
                {"role": "ROLE_ASSISTANT", "content": "Hi"},
            ],
            "continue_final_message": True,
        },
    ),
    ({"chat_template_kwargs": {"model_identity": "You are X."}}, {"model_identity": "You are X."}),
    ({"chat_template_kwargs": {"current_date": "2025-12-31"}}, {"current_date": "2025-12-31"}),
    (
        {"truncate_prompt_tokens": 4, "truncation_side": "right"},
        {"truncate_prompt_tokens": 4, "truncation_side": "TRUNCATION_SIDE_RIGHT"},
    ),
    (
        {"truncate_prompt_tokens": 4, "truncation_side": "left"},
        {"truncate_prompt_tokens": 4, "truncation_side": "TRUNCATION_SIDE_LEFT"},
    ),
]
"""Bodies over HTTP, and the messages over gRPC that ask for the same."""
OF_ANSWERS = {"stop", "parallel_tool_calls", "include_reasoning", "return_token_ids"}
"""Fields that the gateway reads itself; see the tests of answers."""


def grpc_request(fields: Mapping[str, Any]) -> pb.ChatRequest:
    body = {"messages": [{"role": "ROLE_USER", "content": "Hello"}], **fields}
    return json_format.ParseDict(body, pb.ChatRequest())


def test_every_field_has_a_case() -> None:
    tried = {name for _, fields_ in CASES for name in fields_} | OF_ANSWERS | {"messages"}
    assert tried == set(pb.ChatRequest.DESCRIPTOR.fields_by_name)
    sampling = {name for case, _ in CASES for name in case} & {entry.name for entry in fields(SamplingParams)}
    not_of_clients = {"bad_words_token_ids"}
    assert {entry.name for entry in fields(SamplingParams)} - sampling == not_of_clients


@pytest.mark.parametrize(("http", "grpc"), CASES, ids=lambda case: ",".join(case) or "nothing")
async def test_it_reaches_the_engine_as_over_http(
    gateway: Gateway, stub: Stub, engine: FakeEngine, http: dict[str, Any], grpc: dict[str, Any]
) -> None:
    def seen() -> list[EngineRequest]:
        """Return what the engine was asked since the last look, without what is drawn."""
        found = [replace(request, request_id="") for request in engine.requests]
        engine.requests.clear()
        if "seed" in http:
            return sorted(found, key=lambda request: request.sampling.seed or 0)
        return [replace(request, sampling=replace(request.sampling, seed=None)) for request in found]

    answered = await gateway.http.post("/v1/chat/completions", json={"messages": [USER], **http})
    assert answered.status_code == 200, answered.text
    over_http = seen()
    await stub.Chat(grpc_request(grpc))
    whole = seen()
    assert [event async for event in stub.ChatStream(grpc_request(grpc))]
    streamed = seen()
    assert over_http == whole == streamed


NEUTRAL = (
    {},
    {"model": "gpt-oss-test"},
    {"top_k": -1},
    {"presence_penalty": 0},
    {"ignore_eos": False},
    {"reasoning_effort": "REASONING_EFFORT_MEDIUM"},
    {"harmony_constraint": "HARMONY_CONSTRAINT_HEADERS"},
    {"n": 3},
)
"""Cases that ask for what is the default; `n` is the number of requests."""
CHANGES = [grpc for _, grpc in CASES if grpc not in NEUTRAL and grpc.get("tool_choice") != "TOOL_CHOICE_NONE"]


@pytest.mark.parametrize("grpc", CHANGES, ids=",".join)
async def test_it_changes_what_the_engine_is_asked(
    stub: Stub, engine: FakeEngine, grpc: dict[str, Any]
) -> None:
    await stub.Chat(grpc_request({"seed": 1}))
    await stub.Chat(grpc_request({"seed": 1, **grpc}))
    default, asked = (replace(request, request_id="") for request in engine.requests)
    assert default != asked


def whole_texts(answer: pb.ChatResponse) -> list[tuple[str, str]]:
    return [(choice.message.reasoning, choice.message.content) for choice in answer.choices]


async def test_an_answer_has_the_fields_that_it_has_over_http(
    gateway: Gateway, stub: Stub, engine: FakeEngine
) -> None:
    http = (
        await gateway.http.post("/v1/chat/completions", json={"messages": [USER], "return_token_ids": True})
    ).json()
    answer = await stub.Chat(grpc_request({"return_token_ids": True}))
    assert answer.system_fingerprint == http["system_fingerprint"] == "fp_fake"
    assert list(answer.prompt_token_ids) == http["prompt_token_ids"]
    (choice,), (body,) = answer.choices, http["choices"]
    assert list(choice.token_ids) == body["token_ids"]
    assert (choice.message.reasoning, choice.message.content) == (
        body["message"]["reasoning"],
        body["message"]["content"],
    )
    assert not choice.HasField("stop_reason")
    without = await stub.Chat(grpc_request({}))
    assert (list(without.prompt_token_ids), list(without.choices[0].token_ids)) == ([], [])


async def test_a_stream_begins_with_what_its_events_share(stub: Stub, engine: FakeEngine) -> None:
    events = [event async for event in stub.ChatStream(grpc_request({"return_token_ids": True, "n": 2}))]
    assert [event.HasField("head") for event in events] == [True] + [False] * (len(events) - 1)
    head = events[0].head
    assert (head.model, head.system_fingerprint) == ("gpt-oss-test", "fp_fake")
    assert head.created_unix_s > 0
    assert list(head.prompt_token_ids) == list(engine.requests[0].prompt_token_ids)
    whole = await stub.Chat(grpc_request({"return_token_ids": True}))
    for index in range(2):
        ids = [token_id for event in events if event.choice == index for token_id in event.token_ids]
        assert ids == list(whole.choices[0].token_ids)
    plain = [event async for event in stub.ChatStream(grpc_request({}))]
    assert [event for event in plain if event.token_ids or event.head.prompt_token_ids] == []


@pytest.mark.parametrize("with_ids", [False, True])
async def test_reasoning_can_be_left_out(stub: Stub, with_ids: bool) -> None:
    request = grpc_request({"include_reasoning": False, "return_token_ids": with_ids})
    answer = await stub.Chat(request)
    assert whole_texts(answer) == [("", "Hello there, wörld 🎉!")]
    assert answer.usage.reasoning_tokens > 0
    events = [event async for event in stub.ChatStream(request)]
    assert "".join(event.text.text for event in events) == "Hello there, wörld 🎉!"
    assert [event for event in events if event.WhichOneof("event") == "reasoning"] == []
    assert events[0].HasField("head")
    ids = [token_id for event in events for token_id in event.token_ids]
    assert ids == (list(answer.choices[0].token_ids) if with_ids else [])
    shown = await stub.Chat(grpc_request({"include_reasoning": True}))
    assert whole_texts(shown) == [("The user greets me.", "Hello there, wörld 🎉!")]


async def test_a_stop_string_is_the_reason(stub: Stub) -> None:
    request = grpc_request({"stop": ["wör", "x"]})
    answer = await stub.Chat(request)
    assert answer.choices[0].stop_reason == pb.StopReason(text="wör")
    assert answer.choices[0].message.content == "Hello there, "
    finish = [event.finish async for event in stub.ChatStream(request) if event.HasField("finish")]
    assert [entry.stop_reason for entry in finish] == [pb.StopReason(text="wör")]


async def test_a_stop_token_is_the_reason(stub: Stub, engine: FakeEngine, encoding: HarmonyEncoding) -> None:
    ids = turn(encoding, text="Hello")[:-1]
    engine.answer = lambda request: Script(ids)
    request = grpc_request({"stop_token_ids": [ids[-1]]})
    answer = await stub.Chat(request)
    assert answer.choices[0].stop_reason == pb.StopReason(token_id=ids[-1])
    finish = [event.finish async for event in stub.ChatStream(request) if event.HasField("finish")]
    assert [entry.stop_reason for entry in finish] == [pb.StopReason(token_id=ids[-1])]


def test_log_probabilities_that_come_with_the_end_are_not_lost() -> None:
    """Those of tokens that left no text, as half a character does."""
    generation = SimpleNamespace(id="c", model="m", created_unix_s=1, prompts=((1,),))
    events = ChatEvents(cast(Generation, generation), pb.ChatRequest(), "fp")
    entry = TokenLogprob(TokenCandidate(5, "bytes:\\xe2", b"\xe2", -0.5), 0)
    message = events.add(ChoiceFinish(0, "length", logprobs=(entry,)))
    assert message is not None
    assert [(found.token, found.token_id) for found in message.finish.logprobs] == [(b"\xe2", 5)]


async def test_a_second_call_ends_the_answer_if_calls_are_not_parallel(
    stub: Stub, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    call = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|end|>"
    ids = encoding.encode_with_special(f"{call}<|start|>assistant{call}")
    engine.answer = lambda request: Script(ids, finish="length")
    for parallel, num_calls in ((True, 2), (None, 2), (False, 1)):
        fields_ = {} if parallel is None else {"parallel_tool_calls": parallel}
        answer = await stub.Chat(grpc_request({"tools": [GRPC_TOOL], **fields_}))
        assert len(answer.choices[0].message.tool_calls) == num_calls
