"""The bodies of answers: plain dicts at run time, typed here, described in the OpenAPI document.
Fields that are absent differ from null ones, as in OpenAI's API."""

from typing import (
    Literal,
    NotRequired,  # pydantic needs this TypedDict below Python 3.12
)

from typing_extensions import TypedDict

from cluster.events import FinishReason


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: int


class UsageBody(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(TypedDict):
    content: list[ContentLogprob]
    refusal: None


class FunctionBody(TypedDict, total=False):
    name: str
    arguments: str


class CustomBody(TypedDict, total=False):
    name: str
    input: str


class ToolCallBody(TypedDict):
    id: str
    type: Literal["function", "custom"]
    function: NotRequired[FunctionBody]
    custom: NotRequired[CustomBody]


class ToolCallDeltaBody(TypedDict):
    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function", "custom"]]
    function: NotRequired[FunctionBody]
    custom: NotRequired[CustomBody]


class AnswerMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallBody]]


class ChatChoiceBody(TypedDict):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None


class PromptLogprob(TypedDict):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""By token id, for each token of a prompt; null for the first."""


class Timings(TypedDict):
    """llama.cpp's: tokens and milliseconds."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoiceBody]
    usage: UsageBody
    prompt_token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs | None
    timings: NotRequired[Timings]


class DeltaBody(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    reasoning: str
    reasoning_content: str
    tool_calls: list[ToolCallDeltaBody]


class ChunkChoice(TypedDict):
    index: int
    delta: DeltaBody
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: NotRequired[str | int | None]
    token_ids: NotRequired[list[int]]


class ChatCompletionChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChunkChoice]
    usage: NotRequired[UsageBody | None]
    prompt_token_ids: NotRequired[list[int]]
    timings: NotRequired[Timings]


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoiceBody(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: NotRequired[list[int] | None]
    prompt_token_ids: NotRequired[list[int] | None]
    prompt_logprobs: NotRequired[PromptLogprobs | None]


class TextCompletion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[TextChoiceBody]
    usage: NotRequired[UsageBody | None]
    timings: NotRequired[Timings]


class ModelBody(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class CodexEffort(TypedDict):
    effort: str
    description: str


class CodexTruncation(TypedDict):
    mode: Literal["tokens"]
    limit: int


class CodexModel(TypedDict):
    """An entry of the catalogue that Codex reads, which is its `ModelInfo`."""

    slug: str
    display_name: str
    description: str | None
    default_reasoning_level: str
    supported_reasoning_levels: list[CodexEffort]
    shell_type: Literal["default"]
    visibility: Literal["list", "hide"]
    supported_in_api: bool
    priority: int
    additional_speed_tiers: list[str]
    service_tiers: list[str]
    availability_nux: None
    upgrade: None
    base_instructions: str
    include_skills_usage_instructions: bool
    supports_reasoning_summaries: bool
    default_reasoning_summary: Literal["auto"]
    support_verbosity: bool
    default_verbosity: None
    apply_patch_tool_type: Literal["freeform"]
    web_search_tool_type: Literal["text"]
    truncation_policy: CodexTruncation
    supports_parallel_tool_calls: bool
    supports_image_detail_original: bool
    context_window: int
    max_context_window: int
    auto_compact_token_limit: None
    effective_context_window_percent: int
    experimental_supported_tools: list[str]
    input_modalities: list[Literal["text"]]
    supports_search_tool: bool


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelBody]
    models: list[CodexModel]


class TokenizeAnswer(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(TypedDict):
    prompt: str


class AppliedTemplate(TypedDict):
    prompt: str


class PropsParams(TypedDict):
    temperature: float
    top_p: float


class PropsSettings(TypedDict):
    n_ctx: int
    params: PropsParams


class PropsModalities(TypedDict):
    vision: bool
    audio: bool


class Props(TypedDict):
    default_generation_settings: PropsSettings
    total_slots: int
    model_alias: str
    model_path: str
    modalities: PropsModalities
    chat_template: str
    bos_token: str
    eos_token: str
    build_info: str


class StatusAnswer(TypedDict):
    status: str


class LoadAnswer(TypedDict):
    server_load: int


class VersionAnswer(TypedDict):
    version: str


class ErrorObject(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    error: ErrorObject
