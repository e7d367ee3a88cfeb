"""The bodies of the Messages API's answers and events: plain dicts at run time, typed here,
described in the OpenAPI document."""

from typing import Literal, NotRequired

import orjson
from pydantic import InstanceOf
from pydantic.json_schema import SkipJsonSchema
from typing_extensions import TypedDict

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class OutputTokensDetails(TypedDict):
    thinking_tokens: int


class MessageUsage(TypedDict):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    service_tier: NotRequired[Literal["standard"]]


class TextBlockBody(TypedDict):
    type: Literal["text"]
    text: str
    citations: None


class ThinkingBlockBody(TypedDict):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlockBody(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, object] | SkipJsonSchema[InstanceOf[orjson.Fragment]]


BlockBody = TextBlockBody | ThinkingBlockBody | ToolUseBlockBody


class MessageAnswer(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[BlockBody]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageStartEvent(TypedDict):
    type: Literal["message_start"]
    message: MessageAnswer


class BlockStartEvent(TypedDict):
    type: Literal["content_block_start"]
    index: int
    content_block: BlockBody


class TextDeltaBody(TypedDict):
    type: Literal["text_delta"]
    text: str


class ThinkingDeltaBody(TypedDict):
    type: Literal["thinking_delta"]
    thinking: str


class SignatureDeltaBody(TypedDict):
    type: Literal["signature_delta"]
    signature: str


class InputDeltaBody(TypedDict):
    type: Literal["input_json_delta"]
    partial_json: str


BlockDelta = TextDeltaBody | ThinkingDeltaBody | SignatureDeltaBody | InputDeltaBody


class BlockDeltaEvent(TypedDict):
    type: Literal["content_block_delta"]
    index: int
    delta: BlockDelta


class BlockStopEvent(TypedDict):
    type: Literal["content_block_stop"]
    index: int


class StopDelta(TypedDict):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDeltaEvent(TypedDict):
    type: Literal["message_delta"]
    delta: StopDelta
    usage: MessageUsage


class MessageStopEvent(TypedDict):
    type: Literal["message_stop"]


class PingEvent(TypedDict):
    type: Literal["ping"]


class MessagesErrorObject(TypedDict):
    type: str
    message: str


class MessagesError(TypedDict):
    type: Literal["error"]
    error: MessagesErrorObject
    request_id: str


BlockEvent = BlockStartEvent | BlockDeltaEvent | BlockStopEvent


class MessageEvent(TypedDict):
    """Any event of a stream; which fields it has depends on its type."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "ping",
        "error",
    ]
    index: NotRequired[int]
    message: NotRequired[MessageAnswer]
    content_block: NotRequired[BlockBody]
    delta: NotRequired[BlockDelta | StopDelta]
    usage: NotRequired[MessageUsage]
    error: NotRequired[MessagesErrorObject]
    request_id: NotRequired[str]


class TokensCounted(TypedDict):
    input_tokens: int
