"""The bodies of the Responses API. As in `cluster.frontend.schema`, types and structure are checked
here, and ranges in `cluster.generation.limits`."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, StrictStr, Tag

from cluster.frontend.responses.schema_items import Input
from cluster.frontend.responses.schema_tools import Tool, ToolChoice
from cluster.frontend.schema import Stop
from cluster.frontend.schema_base import Bias, Body, Ignored, Whole
from cluster.frontend.schema_formats import JsonObjectFormat, StructuredOutputs, TextFormat

MAX_METADATA = 16
MAX_KEY_CHARS = 64
MAX_VALUE_CHARS = 512

Include = Literal[
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]


def _check_metadata(value: dict[str, str]) -> dict[str, str]:
    if len(value) > MAX_METADATA:
        raise ValueError(f"must have at most {MAX_METADATA} entries")
    for key, text in value.items():
        if len(key) > MAX_KEY_CHARS:
            raise ValueError(f"must have keys of at most {MAX_KEY_CHARS} characters")
        if len(text) > MAX_VALUE_CHARS:
            raise ValueError(f"must have values of at most {MAX_VALUE_CHARS} characters")
    return value


Metadata = Annotated[dict[str, StrictStr], AfterValidator(_check_metadata)]


class ResponseJsonSchemaFormat(Body):
    """JSON that is valid against a schema. The model sees the schema."""

    type: Literal["json_schema"]
    name: str
    description: str | None = None
    schema_: dict[str, object] = Field(alias="schema")
    strict: bool | None = Field(default=None, description="No effect: the schema is always enforced.")


_FORMATS = {"text": "<text>", "json_object": "<json_object>", "json_schema": "<json_schema>"}


def _format_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return _FORMATS.get(kind) if isinstance(kind, str) else None


Format = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[ResponseJsonSchemaFormat, Tag("<json_schema>")],
    Discriminator(
        _format_tag,
        custom_error_type="text_format",
        custom_error_message="an object with type 'text', 'json_object' or 'json_schema'",
    ),
]


class TextOptions(Body):
    """The options of the answer's text."""

    format: Format | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(
        default=None, description="No effect: ask for it in the instructions."
    )


class ReasoningOptions(Body):
    """The options of reasoning."""

    effort: str | None = Field(
        default=None,
        description="low, medium or high; minimal counts as low, xhigh and max as high. none: no reasoning "
        "if there are no tools, else low.",
    )
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        default=None, description="Shows the reasoning as summary instead of content."
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(
        default=None, description="As summary."
    )
    max_tokens: Whole | None = Field(
        default=None, description="Number of tokens after which reasoning ends and the answer begins."
    )
    context: Ignored = Field(default=None, description="Ignored.")


class ResponseStreamOptions(Body):
    """Options of a stream."""

    include_obfuscation: bool | None = Field(default=None, description="Accepted; nothing is obfuscated.")


class ConversationParam(Body):
    """A conversation by its id."""

    id: str


def _conversation_tag(value: Any) -> str | None:
    return "<id>" if isinstance(value, str) else "<object>" if isinstance(value, dict) else None


Conversation = Annotated[
    Annotated[str, Tag("<id>")] | Annotated[ConversationParam, Tag("<object>")],
    Discriminator(
        _conversation_tag,
        custom_error_type="conversation",
        custom_error_message="the id of a conversation, or an object with it",
    ),
]


class PriorFields(Body):
    """The messages of a request, and what it continues."""

    model: str | None = Field(default=None, description="The served model by default.")
    input: Input | None = Field(default=None, description="A text, or items.")
    instructions: str | None = Field(default=None, description="A developer message before the input.")
    previous_response_id: str | None = None
    conversation: Conversation | None = None


class ContextFields(PriorFields):
    """What decides the prompt of a response."""

    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = Field(
        default=None, description="'auto' by default; every other choice but 'none' forces a call."
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="A turn has one call at most, unless max_parallel_tool_calls allows more."
    )
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None, description="auto: the oldest turns of an input that is too long are left out."
    )


class InputTokensRequest(ContextFields):
    """`POST /v1/responses/input_tokens`."""


class CompactRequest(PriorFields):
    """`POST /v1/responses/compact`."""

    reasoning: ReasoningOptions | None = None
    tools: Ignored = Field(default=None, description="Ignored.")
    parallel_tool_calls: Ignored = Field(default=None, description="Ignored.")
    text: Ignored = Field(default=None, description="Ignored.")
    prompt_cache_key: Ignored = Field(default=None, description="Ignored.")
    prompt_cache_options: Ignored = Field(default=None, description="Ignored.")
    prompt_cache_retention: Ignored = Field(default=None, description="Ignored.")
    service_tier: Ignored = Field(default=None, description="Ignored.")


class ResponsesRequest(ContextFields):
    """`POST /v1/responses`."""

    background: bool | None = None
    include: list[Include] | None = Field(
        default=None,
        description="Of effect are reasoning.encrypted_content and message.output_text.logprobs.",
    )
    max_output_tokens: Whole | None = Field(default=None, description="Includes reasoning.")
    max_tool_calls: Whole | None = Field(
        default=None, description="Limits calls of built-in tools, of which there are none."
    )
    max_parallel_tool_calls: Whole | None = Field(default=None, description="1 to 16; 1 by default.")
    metadata: Metadata | None = Field(default=None, description="Returned as it is.")
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    top_logprobs: Whole | None = Field(default=None, description="0 to 20.")
    harmony_constraint: Literal["off", "headers"] | None = Field(
        default=None,
        description="'headers' lets the model write only well-formed turns; the deployment's by default.",
    )
    # Sampling, as in chat
    temperature: float | None = Field(default=None, description="0 to 2, default 1.")
    top_p: float | None = Field(default=None, description="0 to 1; 0 is greedy.")
    top_k: Whole | None = Field(default=None, description="0 or -1: all.")
    min_p: float | None = Field(default=None, description="0 to 1.")
    presence_penalty: float | None = Field(default=None, description="-2 to 2.")
    frequency_penalty: float | None = Field(default=None, description="-2 to 2.")
    repetition_penalty: float | None = Field(default=None, description="0.01 to 100.")
    logit_bias: dict[str, Bias] | None = Field(default=None, description="Token id to a bias of -100 to 100.")
    seed: Whole | None = None
    stop: Stop | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: Whole | None = None
    ignore_eos: bool | None = None
    allowed_token_ids: list[int] | None = Field(
        default=None, description="The only tokens that may be generated, markup included."
    )
    bad_words: list[StrictStr] | None = Field(default=None, description="Texts that must not be generated.")
    priority: Whole | None = Field(default=None, description="Lower values are served earlier; 0 by default.")
    cache_salt: str | None = Field(
        default=None, description="Share cached prefixes only with requests that have the same salt."
    )
    structured_outputs: StructuredOutputs | None = None
    # Without effect, or not offered
    prompt: object = Field(default=None, description="Only null: there are no stored prompts.")
    context_management: object = Field(default=None, description="Only null: see /v1/responses/compact.")
    service_tier: str | None = Field(default=None, description="Ignored; answered as 'default'.")
    prompt_cache_key: str | None = Field(
        default=None, description="Returned; prefixes are cached by content."
    )
    prompt_cache_options: Ignored = Field(default=None, description="Ignored.")
    prompt_cache_retention: Ignored = Field(default=None, description="Ignored.")
    safety_identifier: str | None = Field(default=None, description="Returned as it is.")
    user: str | None = Field(default=None, description="Returned as it is.")
    client_metadata: Ignored = Field(default=None, description="Ignored.")
    moderation: Ignored = Field(default=None, description="Ignored.")
    background_options: Ignored = Field(default=None, description="Ignored.")
    access_programs: Ignored = Field(default=None, description="Ignored.")
    image: Ignored = Field(default=None, description="Ignored.")
    skip_special_tokens: bool | None = Field(
        default=None, description="No effect: special tokens are never part of the answer's text."
    )
