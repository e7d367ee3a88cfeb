"""The bodies of requests of the Messages API. As in `cluster.frontend.schema`, types and structure
are checked here, ranges in `cluster.generation.limits`, and tags of unions begin with `<`."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictStr, Tag, model_validator
from pydantic.json_schema import SkipJsonSchema

from cluster.frontend.schema_base import Body, Whole

TOOL_USE = "toolu_"
"""Beginning of the ids of calls, where those of OpenAI's APIs have `call_`."""
_SHOWN_KIND = 64
"""Maximum number of characters of a client's `type` that an error repeats."""


def _kind_of(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else None


def _text_or_list(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


class CachedPart(Body):
    """A part of a prompt that a client may mark for the cache."""

    cache_control: object = Field(default=None, description="Ignored; prefixes are cached by content.")


class TextBlock(CachedPart):
    """A piece of text."""

    type: Literal["text"]
    text: str
    citations: object = Field(default=None, description="Ignored.")


class ThinkingBlock(CachedPart):
    """The model's reasoning, as an answer had it."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = Field(default=None, description="Required: the one that the answer had.")


class RedactedThinkingBlock(Body):
    """Reasoning that its server has encrypted; this server has none, and refuses that of others."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(CachedPart):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, object]
    caller: object = Field(default=None, description="Ignored.")
    toolset_name: str | None = Field(default=None, description="Ignored.")


class OtherBlock(Body):
    """Content that is not text; refused, because the model reads text only."""

    type: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        raise ValueError(f"is of type {(_kind_of(value) or '')[:_SHOWN_KIND]!r}: this model reads text only")


def _result_block(value: Any) -> str | None:
    kind = _kind_of(value)
    return None if kind is None else "<text_block>" if kind == "text" else "<other_block>"


ResultBlock = Annotated[
    Annotated[TextBlock, Tag("<text_block>")] | Annotated[SkipJsonSchema[OtherBlock], Tag("<other_block>")],
    Discriminator(
        _result_block, custom_error_type="block", custom_error_message="an object with type 'text'"
    ),
]
ResultContent = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[ResultBlock], Tag("<list>")],
    Discriminator(
        _text_or_list, custom_error_type="content", custom_error_message="a string or an array of blocks"
    ),
]


class ToolResultBlock(CachedPart):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: ResultContent | None = None
    is_error: bool | None = None
    toolset_name: str | None = Field(default=None, description="Ignored.")


_BLOCKS = {
    "text": "<text_block>",
    "thinking": "<thinking_block>",
    "redacted_thinking": "<redacted_block>",
    "tool_use": "<use_block>",
    "tool_result": "<result_block>",
}


def _block(value: Any) -> str | None:
    kind = _kind_of(value)
    return None if kind is None else _BLOCKS.get(kind, "<other_block>")


Block = Annotated[
    Annotated[TextBlock, Tag("<text_block>")]
    | Annotated[ThinkingBlock, Tag("<thinking_block>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_block>")]
    | Annotated[ToolUseBlock, Tag("<use_block>")]
    | Annotated[ToolResultBlock, Tag("<result_block>")]
    | Annotated[SkipJsonSchema[OtherBlock], Tag("<other_block>")],
    Discriminator(
        _block,
        custom_error_type="block",
        custom_error_message="an object with type 'text', 'thinking', 'redacted_thinking', 'tool_use' or "
        "'tool_result'",
    ),
]
BlockContent = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Block], Tag("<list>")],
    Discriminator(
        _text_or_list, custom_error_type="content", custom_error_message="a string or an array of blocks"
    ),
]


class MessageTurn(Body):
    """One message; those that follow each other with one role are one turn. A `system` message
    between the others is instructions that hold from there on."""

    role: Literal["user", "assistant", "system"]
    content: BlockContent


SystemText = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[ResultBlock], Tag("<list>")],
    Discriminator(
        _text_or_list, custom_error_type="system", custom_error_message="a string or an array of text blocks"
    ),
]


class ClientTool(CachedPart):
    """A tool that the client runs."""

    name: str
    description: str | None = None
    input_schema: dict[str, object]
    strict: bool | None = Field(
        default=None, description="The input of its calls is always valid against `input_schema`."
    )
    type: Literal["custom"] | None = None
    allowed_callers: object = Field(default=None, description="Ignored; the model is the only caller.")
    defer_loading: object = Field(default=None, description="Ignored; the model sees every tool.")
    eager_input_streaming: object = Field(default=None, description="Ignored; input always streams.")
    input_examples: object = Field(default=None, description="Ignored.")


class AnthropicTool(Body):
    """A tool that only Anthropic's servers or models know; refused."""

    type: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        raise ValueError(
            f"is of type {(_kind_of(value) or '')[:_SHOWN_KIND]!r}, a tool of Anthropic that this server "
            f"does not have: leave it out, or declare a tool with an input_schema"
        )


def _tool_kind(value: Any) -> str:
    return "<client>" if _kind_of(value) in (None, "custom") else "<anthropic>"


ToolOffer = Annotated[
    Annotated[ClientTool, Tag("<client>")] | Annotated[SkipJsonSchema[AnthropicTool], Tag("<anthropic>")],
    Discriminator(_tool_kind),
]


class CallChoice(Body):
    """Which tools may be called: those that the model chooses (`auto`), one of them in any case
    (`any`), a certain one (`tool`, with its name), none."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(default=None, description="Of the tool, with type 'tool'.")
    disable_parallel_tool_use: bool | None = Field(
        default=None, description="No effect: a turn has one call at most."
    )


class ThinkingOption(Body):
    """Whether the model thinks and its thinking is shown."""

    type: Literal["adaptive", "enabled", "disabled", "between_tools"]
    budget_tokens: Whole | None = Field(
        default=None, description="Number of tokens after which thinking ends; with type 'enabled'."
    )
    display: Literal["summarized", "omitted"] | None = Field(
        default=None, description="'omitted' shows the signature alone."
    )
    block_binding: object = Field(default=None, description="Ignored.")


class AnswerFormat(Body):
    """JSON that is valid against a schema. The model sees the schema."""

    type: Literal["json_schema"]
    schema_: dict[str, object] = Field(alias="schema")


class OutputConfig(Body):
    """Effort and form of the answer."""

    effort: str | None = Field(default=None, description="low, medium, high; xhigh and max count as high.")
    format: AnswerFormat | None = None
    task_budget: object = Field(default=None, description="Ignored.")


class Metadata(Body):
    """What the client says about the request."""

    user_id: str | None = Field(default=None, description="Ignored.")


class PromptFields(CachedPart):
    """The fields that decide the prompt of a request."""

    model: str | None = Field(default=None, description="The served model by default.")
    messages: list[MessageTurn]
    system: SystemText | None = None
    tools: list[ToolOffer] | None = None
    tool_choice: CallChoice | None = None
    thinking: ThinkingOption | None = Field(
        default=None, description="Without it the model thinks, and its thinking is not shown."
    )
    output_config: OutputConfig | None = None
    output_format: AnswerFormat | None = Field(default=None, description="As output_config.format.")
    context_management: object = Field(default=None, description="Ignored; nothing is edited.")
    mcp_servers: list[object] | None = Field(default=None, description="Only empty: not offered.")
    thread: object = Field(default=None, description="Only null: send the whole conversation.")
    fallbacks: object = Field(default=None, description="Ignored; there is one model.")
    fallback_credit_token: object = Field(default=None, description="Ignored.")
    billing_policy: object = Field(default=None, description="Ignored.")
    compaction: object = Field(default=None, description="Not offered, and of no effect on a count.")
    speed: str | None = Field(default=None, description="Ignored.")


class MessagesRequest(PromptFields):
    """`POST /v1/messages`."""

    max_tokens: Whole
    stop_sequences: list[StrictStr] | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, description="0 to 2, default 1.")
    top_p: float | None = Field(default=None, description="0 to 1; 0 is greedy.")
    top_k: Whole | None = Field(default=None, description="0 or -1: all.")
    metadata: Metadata | None = None
    service_tier: str | None = Field(default=None, description="Ignored.")
    container: object = Field(default=None, description="Only null: not offered.")
    inference_geo: str | None = Field(default=None, description="Ignored.")
    diagnostics: object = Field(default=None, description="Ignored.")
    user_profile_id: str | None = Field(default=None, description="Ignored.")
    workspace_id: str | None = Field(default=None, description="Ignored.")


class CountTokensRequest(PromptFields):
    """`POST /v1/messages/count_tokens`."""
