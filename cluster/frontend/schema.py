"""The bodies of requests. Types and structure are checked here, ranges in
`cluster.generation.limits`, which both APIs share. Fields that are not here are ignored, or
refused if `gateway.unknown_fields` says so; `unknown_fields.py` looks at those of the top level.

Tags of unions begin with `<`, which tells them from field names in error paths. What is free JSON
is typed `object`: pydantic does not walk into it, so its depth is no matter here.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictStr, Tag, model_validator
from pydantic.json_schema import SkipJsonSchema

from cluster.chat_options import HarmonyConstraint
from cluster.frontend.schema_base import Bias, Body, Whole
from cluster.frontend.schema_formats import ResponseFormat, StructuredOutputs
from cluster.frontend.schema_tools import AssistantToolCall, Tool, ToolChoice


def _text_or_list(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


class TextPart(Body):
    """A piece of text content."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(Body):
    """An assistant's refusal; read as its text."""

    type: Literal["refusal"]
    refusal: str


class ReasoningPart(Body):
    """An assistant's reasoning, under one of the names that clients use for its text; encrypted
    reasoning has none and is ignored."""

    type: Literal["thinking", "reasoning", "redacted_thinking"]
    thinking: str | None = None
    reasoning: str | None = None
    text: str | None = None
    signature: object = Field(default=None, description="Ignored.")
    data: object = Field(default=None, description="Ignored.")


_PARTS = {
    "text": "<text_part>",
    "input_text": "<text_part>",
    "output_text": "<text_part>",
    "refusal": "<refusal_part>",
    "thinking": "<reasoning_part>",
    "reasoning": "<reasoning_part>",
    "redacted_thinking": "<reasoning_part>",
}


def _content_part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return _PARTS.get(kind, "<other_part>") if isinstance(kind, str) else "<text_part>"


class OtherPart(Body):
    """Content that is not text; refused, because the model reads text only."""

    type: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        raise ValueError("is not text; this model reads text only, so send parts of type 'text'")


ContentPart = Annotated[
    Annotated[TextPart, Tag("<text_part>")]
    | Annotated[RefusalPart, Tag("<refusal_part>")]
    | Annotated[ReasoningPart, Tag("<reasoning_part>")]
    | Annotated[SkipJsonSchema[OtherPart], Tag("<other_part>")],
    Discriminator(
        _content_part, custom_error_type="content_part", custom_error_message="an object with type 'text'"
    ),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Tag("<list>")],
    Discriminator(
        _text_or_list, custom_error_type="content", custom_error_message="a string or an array of text parts"
    ),
]


class Message(Body):
    """One message of a chat. `reasoning`, `reasoning_content` and `thinking` are the same field."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    thinking: str | None = None
    provider_specific_fields: object = Field(
        default=None, description="A proxy's copy of `reasoning`; read if the message has none itself."
    )
    thinking_blocks: object = Field(default=None, description="Likewise, in Anthropic's form.")
    reasoning_details: object = Field(default=None, description="Likewise, in OpenRouter's form.")
    tool_calls: list[AssistantToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = Field(
        default=None, description="Read as the message's text where it has no content."
    )
    annotations: list[object] | None = Field(default=None, description="Ignored.")
    audio: None = None
    function_call: None = Field(default=None, description="Removed by OpenAI; use tool_calls.")
    parsed: object = Field(default=None, description="Ignored; openai's `parse` and `stream` helpers add it.")


class StreamOptions(Body):
    """Options for what a stream reports besides its deltas."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = Field(default=None, description="Accepted; nothing is obfuscated.")


class Reasoning(Body):
    """The options of reasoning, as OpenAI and OpenRouter spell them."""

    effort: str | None = Field(default=None, description="As reasoning_effort.")
    summary: object = Field(default=None, description="Ignored: reasoning is shown as it is.")
    exclude: bool | None = Field(default=None, description="True leaves the reasoning out of the answer.")
    enabled: bool | None = Field(default=None, description="False is the lowest effort.")
    max_tokens: Whole | None = Field(default=None, description="As max_reasoning_tokens.")


class Thinking(Body):
    """Anthropic's option of reasoning."""

    type: str
    budget_tokens: Whole | None = Field(default=None, description="As max_reasoning_tokens.")


class ChatTemplateKwargs(Body):
    """Arguments that a chat template of gpt-oss would read."""

    reasoning_effort: str | None = None
    enable_thinking: bool | None = Field(default=None, description="False is the lowest effort.")
    model_identity: str | None = None
    current_date: str | None = Field(default=None, description="YYYY-MM-DD; the deployment's by default.")


Stop = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[StrictStr], Tag("<list>")],
    Discriminator(
        _text_or_list, custom_error_type="stop", custom_error_message="a string or an array of strings"
    ),
]


class SamplingFields(Body):
    """The fields that chat and text completions share."""

    model: str | None = Field(default=None, description="The served model by default.")
    max_tokens: Whole | None = None
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
    n: Whole | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Whole | None = Field(
        default=None, description="Alternatives reported for each prompt token, 0 to 20; not in streams."
    )
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = Field(
        default=None, description="Log-probabilities name tokens as `token_id:5`."
    )
    truncate_prompt_tokens: Whole | None = Field(
        default=None,
        description="Keep this many tokens of a longer prompt; -1: what the context leaves for it.",
    )
    truncation_side: Literal["left", "right"] | None = Field(
        default=None, description="The side that is cut off; left by default."
    )
    allowed_token_ids: list[int] | None = Field(
        default=None, description="The only tokens that may be generated, markup included."
    )
    bad_words: list[StrictStr] | None = Field(default=None, description="Texts that must not be generated.")
    priority: Whole | None = Field(default=None, description="Lower values are served earlier; 0 by default.")
    cache_salt: str | None = Field(
        default=None, description="Share cached prefixes only with requests that have the same salt."
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: object = Field(default=None, description="As structured_outputs.json.")
    guided_regex: str | None = Field(default=None, description="As structured_outputs.regex.")
    guided_choice: list[StrictStr] | None = Field(default=None, description="As structured_outputs.choice.")
    guided_grammar: str | None = Field(default=None, description="As structured_outputs.grammar.")
    json_schema: dict[str, object] | None = Field(
        default=None, description="As structured_outputs.json (llama.cpp's name)."
    )
    grammar: str | None = Field(default=None, description="As structured_outputs.grammar (llama.cpp's name).")
    timings_per_token: bool | None = Field(
        default=None, description="Show how long the answer has taken, as llama.cpp does."
    )
    user: str | None = Field(default=None, description="Ignored.")


class ChatFields(Body):
    """The fields of a chat, besides its messages and the form of its answer, that change what the
    model sees."""

    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = Field(
        default=None, description="'auto' by default; every other choice but 'none' forces a call."
    )
    reasoning_effort: str | None = Field(
        default=None,
        description="low, medium or high; minimal counts as low, xhigh and max as high. none: no reasoning "
        "if there are no tools, else low.",
    )
    reasoning: Reasoning | None = None
    thinking: Thinking | None = Field(default=None, description="Of type 'disabled': the lowest effort.")
    enable_thinking: bool | None = Field(default=None, description="False is the lowest effort.")
    chat_template_kwargs: ChatTemplateKwargs | None = None
    add_generation_prompt: bool | None = Field(
        default=None,
        description="The prompt ends with the words that begin an answer; true by default, false with "
        "continue_final_message.",
    )
    continue_final_message: bool | None = Field(
        default=None, description="The answer continues the last message, which is an assistant's."
    )


class ChatCompletionRequest(SamplingFields, ChatFields):
    """`POST /v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: Whole | None = None
    parallel_tool_calls: bool | None = Field(
        default=None, description="A turn has one call at most, unless max_parallel_tool_calls allows more."
    )
    max_parallel_tool_calls: Whole | None = Field(default=None, description="1 to 16; 1 by default.")
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(default=None, description="0 to 20.")
    max_reasoning_tokens: Whole | None = Field(
        default=None, description="Number of tokens after which reasoning ends and the answer begins."
    )
    thinking_token_budget: Whole | None = Field(
        default=None, description="As max_reasoning_tokens (vLLM's name); -1: no limit."
    )
    harmony_constraint: HarmonyConstraint | None = Field(
        default=None,
        description="'headers' lets the model write only well-formed turns; the deployment's by default.",
    )
    include_reasoning: bool | None = Field(
        default=None, description="False leaves the reasoning out of the answer."
    )
    modalities: list[Literal["text"]] | None = None
    functions: object = Field(default=None, description="Removed by OpenAI; use tools.")
    function_call: object = Field(default=None, description="Removed by OpenAI; use tool_choice.")
    skip_special_tokens: bool | None = Field(
        default=None, description="No effect: special tokens are never part of the answer's text."
    )
    audio: object = Field(default=None, description="Only null: the model writes text.")
    metadata: dict[str, object] | None = Field(default=None, description="Ignored.")
    store: bool | None = Field(default=None, description="Ignored; nothing is stored.")
    service_tier: str | None = Field(default=None, description="Ignored.")
    prediction: object = Field(default=None, description="Ignored.")
    prompt_cache_key: str | None = Field(default=None, description="Ignored; prefixes are cached by content.")
    prompt_cache_options: object = Field(default=None, description="Ignored.")
    prompt_cache_retention: str | None = Field(default=None, description="Ignored.")
    safety_identifier: str | None = Field(default=None, description="Ignored.")
    moderation: object = Field(default=None, description="Ignored.")
    verbosity: str | None = Field(default=None, description="Ignored; ask for it in a message.")
    web_search_options: object = Field(default=None, description="Ignored; nothing is searched.")


def _prompt_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return (
        "<texts>"
        if isinstance(first, str)
        else "<ids>"
        if isinstance(first, int) and not isinstance(first, bool)
        else "<id_lists>"
    )


Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[StrictStr], Tag("<texts>")]
    | Annotated[list[int], Tag("<ids>")]
    | Annotated[list[list[int]], Tag("<id_lists>")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt",
        custom_error_message="a string, token ids, or an array of either",
    ),
]


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`. In a text prompt the names of special tokens mean these tokens."""

    prompt: Prompt
    logprobs: Whole | None = Field(default=None, description="0 to 20.")
    echo: bool | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="No effect: the gpt-oss tokenizer adds none."
    )
    skip_special_tokens: bool | None = Field(default=None, description="True by default.")
    best_of: Whole | None = Field(default=None, description="Only as n.")
    suffix: str | None = Field(default=None, description="Not offered.")


class RenderedChat(ChatFields):
    """What a chat that is only rendered has beside its messages."""

    model: str | None = None
    response_format: ResponseFormat | None = None


class TemplateRequest(RenderedChat):
    """`POST /apply-template`."""

    messages: list[Message]


class TokenizeRequest(RenderedChat):
    """`POST /tokenize`: of a prompt, or of a chat's messages as the model would see them."""

    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="No effect: the gpt-oss tokenizer adds none."
    )
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]
