"""Ranges of what clients may ask for. Every refusal over HTTP is in
`tests/cluster/frontend/test_bad_input.py`."""

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.generation import FieldNames, ModelInfo, Options, limits, turn
from cluster.generation.limits import (
    MAX_CHOICES,
    MAX_STOP_TOKEN_IDS,
    check_sampling,
    check_tools,
    num_output_tokens,
)
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.tools import ToolDefinition
from workers.errors import ContextLengthExceeded, InvalidRequest
from workers.request import SamplingParams
from workers.rpc.validate import MAX_COUNT, MAX_LOGPROBS, check_request

MODEL = ModelInfo("m", max_model_len=100, vocab_size=50)
NAMES = FieldNames("max_completion_tokens", "top_logprobs")
P = "tools[0].function.parameters"

# Each with values on both sides of its bounds.
NUMBERS = st.sampled_from([-100.5, -100, -2.5, -2, -0.01, 0, 0.005, 0.01, 0.5, 1, 1.5, 2, 2.5, 100, 101])
COUNTS = st.sampled_from(
    [-2, -1, 0, 1, 5, MAX_LOGPROBS, MAX_LOGPROBS + 1, MAX_CHOICES, MAX_COUNT, MAX_COUNT + 1]
)
IDS = st.sampled_from([-1, 0, 1, 49, 50])
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.sampled_from([None, -1, 0, 1, 5, 20]),  # the context bounds it
    temperature=NUMBERS,
    top_p=NUMBERS,
    top_k=COUNTS,
    min_p=NUMBERS,
    presence_penalty=NUMBERS,
    frequency_penalty=NUMBERS,
    repetition_penalty=NUMBERS,
    logit_bias=st.lists(st.tuples(IDS, NUMBERS), max_size=2).map(tuple),
    seed=st.none() | st.sampled_from([-(2**63) - 1, -(2**63), -1, 0, 2**64 - 1, 2**64]),
    logprobs=st.none() | COUNTS,
    stop_token_ids=st.lists(IDS, max_size=2).map(tuple),
    min_tokens=COUNTS,
    n=COUNTS,
)


def allowed(sampling: SamplingParams) -> bool:
    try:
        check_sampling(sampling, MODEL, NAMES)
    except InvalidRequest:
        return False
    return True


def check_in_engine(sampling: SamplingParams) -> None:
    model_stops = cast(HarmonyEncoding, SimpleNamespace(stop_token_ids=(2, 3, 4)))
    max_tokens = sampling.max_tokens or MODEL.max_model_len
    sent = turn._complete(sampling, max_tokens, (), model_stops)
    if sent.min_tokens <= max_tokens:  # otherwise `num_output_tokens` has refused it
        check_request(turn._engine_request("r", (1,), sent, 0, Options()), MODEL.vocab_size)


@settings(max_examples=100, deadline=None)
@given(SAMPLING)
def test_what_passes_here_passes_in_the_engine(drawn: SamplingParams) -> None:
    """Each field alone, since almost no random combination passes, and all of them."""
    alone = [replace(SamplingParams(), **{field.name: getattr(drawn, field.name)}) for field in fields(drawn)]
    for sampling in (*alone, drawn):
        if allowed(sampling):
            check_in_engine(sampling)


def test_as_many_stop_tokens_as_are_allowed_pass_in_the_engine() -> None:
    sampling = SamplingParams(stop_token_ids=(1,) * MAX_STOP_TOKEN_IDS)
    assert allowed(sampling)
    check_in_engine(sampling)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"max_tokens": 0}, "max_completion_tokens must be at least 1, got 0."),
        ({"logprobs": 21}, "top_logprobs must be 0 to 20, got 21."),
        ({"logprobs": 10**9}, "top_logprobs must be 0 to 20, got 1000000000."),
        ({"n": 129}, "n must be 1 to 128, got 129."),
        ({"temperature": 2.5}, "temperature must be 0 to 2, got 2.5."),
        ({"temperature": -0.5}, "temperature must be at least 0, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be a finite number, got nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be 0.01 to 100, got 0."),
        ({"top_p": -0.1}, "top_p must be at least 0 and at most 1, got -0.1"),
        ({"top_k": -2}, "top_k must be at least -1, got -2"),
        ({"seed": 2**64}, f"seed must fit in 64 bits, got {2**64}."),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens 5 is more than max_completion_tokens 4."),
        ({"stop_token_ids": (1,) * 129}, "stop_token_ids has 129 ids, at most 128 are allowed"),
    ],
)
def test_the_sentences_of_refusals(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_sampling(replace(SamplingParams(), **change), MODEL, NAMES)
    assert caught.value.message == sentence


@pytest.mark.parametrize(
    ("num_prompts", "n", "param"), [(MAX_CHOICES + 1, 1, "prompt"), (43, 3, "n"), (2, 64, None)]
)
def test_choices_of_all_prompts_count(num_prompts: int, n: int, param: str | None) -> None:
    sampling = replace(SamplingParams(), n=n)
    if param is None:
        check_sampling(sampling, MODEL, NAMES, num_prompts=num_prompts)
        return
    with pytest.raises(InvalidRequest) as caught:
        check_sampling(sampling, MODEL, NAMES, num_prompts=num_prompts)
    assert caught.value.param == param


def output_tokens(default: int | None = None, **sampling: Any) -> int:
    asked = replace(SamplingParams(max_tokens=None), **sampling)
    return num_output_tokens(asked, 90, MODEL, names=NAMES, prompt_param="messages", default=default)


def test_the_length_of_an_answer_follows_from_the_request_the_default_and_the_context() -> None:
    assert output_tokens(max_tokens=10) == 10
    assert output_tokens() == 10
    assert output_tokens(default=16) == 10
    assert output_tokens(default=4) == 4
    with pytest.raises(ContextLengthExceeded) as caught:
        output_tokens(max_tokens=11)
    assert caught.value.param == "max_completion_tokens"
    assert "101 tokens (90 in the messages, 11 in the completion)" in caught.value.message
    with pytest.raises(InvalidRequest) as refused:
        output_tokens(default=4, min_tokens=5)
    assert (refused.value.param, type(refused.value)) == ("min_tokens", InvalidRequest)


@pytest.mark.parametrize("name", ["a", "a" * 128, "mcp.server-1.get_x", "functions.f", "python", ".-_9"])
def test_tool_names_follow_mcps_rule(name: str) -> None:
    check_tools((ToolDefinition(name),))


@pytest.mark.parametrize("name", ["", "a" * 129, "a b", "a/b", "ü", "a\n", "functions{"])
def test_other_tool_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_tools((ToolDefinition(name),))
    assert caught.value.param == "tools[0].function.name"


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_tools((ToolDefinition("f"), ToolDefinition("g"), ToolDefinition("f")))
    assert caught.value.param == "tools[2].function.name"


def test_tools_have_a_largest_number() -> None:
    check_tools([ToolDefinition(f"f{index}") for index in range(limits.MAX_TOOLS)])
    with pytest.raises(InvalidRequest, match="1025 entries"):
        check_tools([ToolDefinition(f"f{index}") for index in range(limits.MAX_TOOLS + 1)])


def nested(levels: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "object"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


REFUSED_SCHEMAS: list[tuple[dict[str, object], str]] = [
    ({"type": "string"}, "must describe an object"),
    ({"type": "object", "properties": {"x": "string"}}, "properties.x must be a schema"),
    (nested(32), "deeper than 64 levels"),
    (nested(20_000), "deeper than 64 levels"),
]
"""One of each kind; `tests/cluster/harmony/test_tool_schema.py` has the others."""


@pytest.mark.parametrize(("schema", "words"), REFUSED_SCHEMAS, ids=range(len(REFUSED_SCHEMAS)))
def test_broken_schemas_are_named(schema: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_tools((ToolDefinition("f", "", schema),))
    assert caught.value.param == P
    assert caught.value.message.startswith(P)
    assert words in caught.value.message


def test_cyclic_schema_is_refused() -> None:
    schema: dict[str, object] = {"type": "object"}
    schema["properties"] = {"x": schema}
    with pytest.raises(InvalidRequest) as caught:
        check_tools((ToolDefinition("f", "", schema),))
    assert caught.value.param == P


def test_the_deepest_schema_is_taken() -> None:
    check_tools((ToolDefinition("f", "", nested(31)),))
