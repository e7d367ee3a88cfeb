"""Conversion of a body of the Messages API to the service's request."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.frontend.anthropic.schema import (
    AnswerFormat,
    AnthropicTool,
    CallChoice,
    MessagesRequest,
    PromptFields,
    ToolOffer,
)
from cluster.frontend.anthropic.signatures import Signatures
from cluster.frontend.anthropic.turns import harmony_messages
from cluster.frontend.reasoning import Effort, reasoning_effort, shown_effort
from cluster.frontend.structure import json_schema_format, one_of
from cluster.frontend.tool_choices import Named, tool_choice
from cluster.generation import ChatRequest, FieldNames, Structure, ToolChoice
from cluster.generation.limits import check_reasoning_budget
from cluster.harmony.tools import ToolDefinition, ToolFields
from workers.errors import InvalidRequest
from workers.request import SamplingParams
from workers.rpc.validate import MAX_COUNT, check_integer

_NAMES = FieldNames(
    max_reasoning_tokens="thinking.budget_tokens", continues="messages", stop="stop_sequences"
)
_FORMAT_NAME = "output"
"""The API has no name for the form of an answer; the model is shown this one."""
_EFFORT_OF_BUDGET: tuple[tuple[int, Effort], ...] = ((10_000, "high"), (5_000, "medium"), (0, "low"))
"""Least `budget_tokens` of each effort, for requests that give no effort."""


@dataclass(frozen=True, slots=True)
class ThinkingShown:
    """What an answer shows of the model's thinking.

    Attributes:
        blocks: whether there are thinking blocks: only where a client asks for thinking, as others
            take the first block for the answer.
        text: whether these have their text, and not the signature alone.
    """

    blocks: bool
    text: bool

    @classmethod
    def of(cls, body: PromptFields) -> "ThinkingShown":
        """Return what a request asks for."""
        thinking = body.thinking
        return cls(
            blocks=thinking is not None and thinking.type != "disabled",
            text=thinking is None or thinking.display != "omitted",
        )


def chat_request(body: MessagesRequest, num_bytes: int, signatures: Signatures) -> ChatRequest:
    """Convert a body of `num_bytes`.

    Raises:
        InvalidRequest: a field requests something that is not supported, or contradicts another.
    """
    for name, value in (("container", body.container), ("compaction", body.compaction)):
        if value is not None:
            raise InvalidRequest(f"{name} is not offered by this server: leave it out.", name)
    check_integer("max_tokens", body.max_tokens, 1, MAX_COUNT)
    default = SamplingParams()
    return _chat_request(
        body,
        num_bytes,
        signatures,
        SamplingParams(
            max_tokens=body.max_tokens,
            temperature=default.temperature if body.temperature is None else body.temperature,
            top_p=default.top_p if body.top_p is None else body.top_p,
            top_k=default.top_k if body.top_k is None else body.top_k,
        ),
        tuple(body.stop_sequences or ()),
    )


def counted_request(body: PromptFields, num_bytes: int, signatures: Signatures) -> ChatRequest:
    """Convert a body of `num_bytes` to a request with the same prompt, whose tokens can be counted.

    Raises:
        InvalidRequest: as `chat_request`.
    """
    return _chat_request(body, num_bytes, signatures, SamplingParams(max_tokens=None))


def _chat_request(
    body: PromptFields,
    num_bytes: int,
    signatures: Signatures,
    sampling: SamplingParams,
    stop: tuple[str, ...] = (),
) -> ChatRequest:
    if body.thread is not None:
        raise InvalidRequest("thread is not offered by this server: send the whole conversation.", "thread")
    if body.mcp_servers:
        raise InvalidRequest("mcp_servers is not offered by this server: leave it out.", "mcp_servers")
    choice = body.tool_choice
    tools = () if choice is not None and choice.type == "none" else _tools(body.tools or ())
    turned_off = body.thinking is not None and body.thinking.type == "disabled"
    return ChatRequest(
        messages=harmony_messages(body.system, body.messages, signatures),
        num_bytes=num_bytes,
        sampling=sampling,
        tools=tools,
        tool_choice=_choice(choice, tools),
        stop=stop,
        structure=_structure(body),
        skips_reasoning=turned_off,
        max_reasoning_tokens=_budget(body),
        reasoning_effort=shown_effort(_effort(body)),
        model=body.model,
        continues_last=body.messages[-1].role == "assistant",
        cuts_max_tokens=True,
        merges_instructions=False,
        names=_NAMES,
    )


def _tools(offers: Sequence[ToolOffer]) -> tuple[ToolDefinition, ...]:
    return tuple(
        ToolDefinition(
            offer.name,
            offer.description or "",
            offer.input_schema,
            strict=bool(offer.strict),
            fields=ToolFields(
                f"tools[{index}].name", f"tools[{index}].input_schema", f"tools[{index}].strict", ""
            ),
        )
        for index, offer in enumerate(offers)
        if not isinstance(offer, AnthropicTool)
    )


def _choice(choice: CallChoice | None, tools: Sequence[ToolDefinition]) -> ToolChoice:
    named = None
    if choice is not None and choice.type == "tool":
        if choice.name is None:
            raise InvalidRequest("tool_choice.name is missing.", "tool_choice.name")
        named = [Named(choice.name, "tool_choice.name")]
    return tool_choice(
        tools,
        named,
        required=choice is not None and choice.type in ("any", "tool"),
        max_calls=None,
        parallel=None,
    )


def _effort(body: PromptFields) -> Effort | None:
    if body.thinking is not None and body.thinking.type == "disabled":
        return "none"
    named = body.output_config.effort if body.output_config else None
    if named is not None:
        return reasoning_effort(named, "output_config.effort")
    budget = _budget(body)
    if budget is None:
        return None
    return next(effort for least, effort in _EFFORT_OF_BUDGET if budget >= least)


def _budget(body: PromptFields) -> int | None:
    thinking = body.thinking
    if thinking is None or thinking.type != "enabled":
        return None
    if thinking.budget_tokens is None:
        raise InvalidRequest("thinking.budget_tokens is missing.", "thinking.budget_tokens")
    check_reasoning_budget(thinking.budget_tokens, "thinking.budget_tokens")
    return thinking.budget_tokens


def _structure(body: PromptFields) -> Structure | None:
    config = body.output_config
    return one_of(
        [
            _format(None if config is None else config.format, "output_config.format"),
            _format(body.output_format, "output_format"),
        ]
    )


def _format(asked: AnswerFormat | None, place: str) -> Structure | None:
    return None if asked is None else json_schema_format(_FORMAT_NAME, "", asked.schema_, place)
