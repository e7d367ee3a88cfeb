"""The body of a Responses request as the service's ChatRequest, and the record of its response."""

import secrets
from dataclasses import dataclass, replace
from typing import Any

from cluster.frontend.reasoning import reasoning_effort, shown_effort
from cluster.frontend.responses.items import Seals, input_messages
from cluster.frontend.responses.repeated import repeated_fields, summary_of
from cluster.frontend.responses.schema import (
    ContextFields,
    Format,
    ReasoningOptions,
    ResponseJsonSchemaFormat,
    ResponsesRequest,
)
from cluster.frontend.responses.tools import Tools, declared_tools, tool_choice
from cluster.frontend.responses.views import ResponseRecord
from cluster.frontend.sampling import options, sampling_params, stop_strings
from cluster.frontend.schema import SamplingFields
from cluster.frontend.schema_formats import JsonObjectFormat
from cluster.frontend.structure import json_schema_format, one_of, structured, structured_outputs
from cluster.generation import ChatRequest, FieldNames, Structure
from cluster.generation.limits import check_parameters, check_reasoning_budget
from workers.errors import InvalidRequest

STATE_FIELDS = ("previous_response_id", "conversation", "background")
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "allowed_token_ids",
    "bad_words",
    "priority",
    "cache_salt",
)
"""The fields that mean the same in chat."""
NAMES = FieldNames(
    max_tokens="max_output_tokens",
    logprobs="top_logprobs",
    max_reasoning_tokens="reasoning.max_tokens",
    messages="input",
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to respond.

    Attributes:
        record: of the response; its id is the generation's, too.
    """

    chat: ChatRequest
    record: ResponseRecord


def asked_response(
    body: ResponsesRequest,
    num_bytes: int,
    seals: Seals,
    *,
    id: str,
    created_at: int,
    model: str,
    num_before: int = 0,
) -> Asked:
    """Convert a body of `num_bytes`.

    Args:
        id, created_at: of the response.
        model: name of the served model, for the answer.
        num_before: number of stored items at the beginning of the input.
    Raises:
        InvalidRequest: a field requests something that is not supported, or contradicts another.
    """
    _refuse_what_is_not_offered(body)
    sampling = SamplingFields(**{name: getattr(body, name) for name in _SAMPLING})
    shows_logprobs = bool(body.top_logprobs) or "message.output_text.logprobs" in (body.include or ())
    chat, tools = _context(body, num_bytes, seals, num_before)
    drawn = sampling_params(
        sampling, body.max_output_tokens, (body.top_logprobs or 0) if shows_logprobs else None
    )
    if drawn.seed is None:
        drawn = replace(drawn, seed=secrets.randbits(63))
    chat = replace(
        chat,
        sampling=drawn,
        stop=stop_strings(sampling),
        options=options(sampling),
        tool_choice=tool_choice(
            body.tool_choice,
            tools,
            max_calls=body.max_parallel_tool_calls,
            parallel=body.parallel_tool_calls,
        ),
        harmony_constraint=body.harmony_constraint,
        structure=one_of([chat.structure, structured_outputs(body.structured_outputs)]),
    )
    record = ResponseRecord(
        id,
        created_at,
        repeated_fields(body, model),
        shows_logprobs=shows_logprobs,
        seals_reasoning="reasoning.encrypted_content" in (body.include or ()),
        summarizes=summary_of(body.reasoning) is not None,
        custom_tools=tuple(sorted(tools.custom)),
        namespaces=tools.namespaces,
    )
    return Asked(chat, record)


def _context(body: ContextFields, num_bytes: int, seals: Seals, num_before: int) -> tuple[ChatRequest, Tools]:
    """Return the part of a request that decides its prompt, and its tools."""
    reasoning = body.reasoning or ReasoningOptions()
    effort = reasoning_effort(reasoning.effort, "reasoning.effort")
    if reasoning.max_tokens is not None:
        check_reasoning_budget(reasoning.max_tokens, "reasoning.max_tokens")
    tools = declared_tools(body.tools or ())
    for index, tool in enumerate(tools.definitions):
        check_parameters(tool, index)  # the Response object repeats them, also those not used
    if body.tool_choice == "none":
        tools = Tools()
    chat = ChatRequest(
        messages=input_messages(body.input, body.instructions, seals, num_before),
        num_bytes=num_bytes,
        tools=tools.definitions,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        structure=_structure(body.text.format if body.text else None),
        skips_reasoning=effort == "none",
        max_reasoning_tokens=reasoning.max_tokens,
        reasoning_effort=shown_effort(effort),
        model=body.model,
        per_token=True,
        leaves_out_turns=body.truncation == "auto",
        names=NAMES,
    )
    return chat, tools


def asked_prompt(body: ContextFields, num_bytes: int, seals: Seals, num_before: int = 0) -> ChatRequest:
    """Convert a body of which only the prompt is needed.

    Args:
        num_before: number of stored items at the beginning of the input.
    Raises:
        InvalidRequest: as `asked_response`.
    """
    chat, tools = _context(body, num_bytes, seals, num_before)
    tool_choice(body.tool_choice, tools, max_calls=None, parallel=body.parallel_tool_calls)
    return chat


def refuse_state(body: Any) -> None:
    """Refuse what needs stored responses.

    Raises:
        InvalidRequest: with `param`.
    """
    for name in STATE_FIELDS:
        if getattr(body, name, None):
            raise InvalidRequest(
                f"{name} needs stored responses, but this server stores none: set state.url, or send all "
                f"items as input.",
                name,
            )


def _refuse_what_is_not_offered(body: ResponsesRequest) -> None:
    if body.prompt is not None:
        raise InvalidRequest("prompt is not offered: this server has no stored prompts.", "prompt")
    if body.context_management is not None:
        raise InvalidRequest(
            "context_management is not offered: call POST /v1/responses/compact when the input has become "
            "long.",
            "context_management",
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream to be true.", "stream_options")
    if body.max_tool_calls is not None and body.max_tool_calls < 1:
        raise InvalidRequest("max_tool_calls must be 1 or more.", "max_tool_calls")


def _structure(asked: Format | None) -> Structure | None:
    match asked:
        case ResponseJsonSchemaFormat():
            return json_schema_format(asked.name, asked.description or "", asked.schema_, "text.format")
        case JsonObjectFormat(schema_=None):
            return structured("json_object", True, "text.format")
        case JsonObjectFormat(schema_=schema):
            return structured("json", schema, "text.format.schema")
        case _:
            return None
