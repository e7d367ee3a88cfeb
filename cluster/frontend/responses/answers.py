"""The bodies of answers of the Responses API, for the OpenAPI document."""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict


class InputTokensDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(TypedDict):
    code: str
    message: str


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class OutputItem(TypedDict):
    """A message, reasoning, or a call of a function or custom tool."""

    id: str
    type: Literal["message", "reasoning", "function_call", "custom_tool_call", "compaction"]
    status: NotRequired[Literal["in_progress", "completed", "incomplete"]]
    role: NotRequired[Literal["assistant", "user"]]
    phase: NotRequired[Literal["commentary", "final_answer"]]
    content: NotRequired[list[dict[str, Any]]]
    summary: NotRequired[list[dict[str, Any]]]
    encrypted_content: NotRequired[str]
    call_id: NotRequired[str]
    name: NotRequired[str]
    namespace: NotRequired[str]
    arguments: NotRequired[str]
    input: NotRequired[str]


class ResponseBody(TypedDict):
    """A response; the fields that repeat the request are left out here."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None


class ResponseEventBody(TypedDict):
    """An event of a response; the other fields depend on its type, as in OpenAI's API."""

    type: str
    sequence_number: int


class InputTokensBody(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: int


class CompactedBody(TypedDict):
    id: str
    object: Literal["response.compaction"]
    created_at: int
    output: list[OutputItem]
    usage: ResponseUsage
