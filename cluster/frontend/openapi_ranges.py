"""The ranges in the OpenAPI document: what `cluster.generation.limits` and the conversion of bodies
check, as keywords of JSON Schema. Rules between fields are not stated, nor what depends on the
length of the prompt."""

from collections.abc import Mapping
from typing import Any

from cluster.frontend.chat_messages import CALLED_NAME, USER_NAME
from cluster.frontend.reasoning import EFFORTS
from cluster.frontend.responses.schema import MAX_KEY_CHARS, MAX_METADATA, MAX_VALUE_CHARS
from cluster.generation import limits
from workers.rpc.validate import MAX_COUNT, MAX_SALT_CHARS

Keywords = dict[str, Any]
"""Keywords by name; each applies to values of one kind only, as in JSON Schema."""

_NULL: Keywords = {"type": "null"}
_EFFORT: Keywords = {"enum": list(EFFORTS)}
_INDEX: Keywords = {"minimum": -(2**63), "maximum": 2**64 - 1}
_OUTPUT_TOKENS: Keywords = {"minimum": 1, "maximum": MAX_COUNT}


def state_ranges(schemas: dict[str, Any], vocab_size: int) -> None:
    """Add the ranges to the schemas of requests."""
    for (kind, name), keywords in _ranges(vocab_size).items():
        _state(schemas[kind]["properties"][name], keywords)
    for (kind, name), keywords in _messages().items():
        _state(schemas[kind]["properties"][name], keywords)
    for kind in ("ChatCompletionRequest", "CompletionRequest"):
        for name, keywords in _sampling(vocab_size).items():
            _state(schemas[kind]["properties"][name], keywords)
    responses = schemas["ResponsesRequest"]["properties"]
    for name, keywords in _sampling(vocab_size).items():
        if name in responses:
            _state(responses[name], keywords)
    _state(schemas["CompletionRequest"]["properties"]["max_tokens"], {"minimum": 0})
    schemas["TokenizeRequest"]["oneOf"] = [
        {"required": [one], "properties": {one: {"type": kind}, other: _NULL}}
        for one, kind, other in (("prompt", "string", "messages"), ("messages", "array", "prompt"))
    ]


def _ranges(vocab_size: int) -> Mapping[tuple[str, str], Keywords]:
    """Return the keywords of fields by schema and name."""
    token_id = _token_id(vocab_size)
    logprobs = _span(limits.INTEGERS["logprobs"])
    budget = _span(limits.CHAT_INTEGERS["max_reasoning_tokens"])
    tools: Keywords = {"maxItems": limits.MAX_TOOLS}
    return {
        ("ChatCompletionRequest", "messages"): {"minItems": 1},
        ("ChatCompletionRequest", "max_completion_tokens"): _OUTPUT_TOKENS,
        ("ChatCompletionRequest", "tools"): tools,
        ("ChatCompletionRequest", "max_reasoning_tokens"): _span(
            limits.CHAT_INTEGERS["max_reasoning_tokens"]
        ),
        ("ChatCompletionRequest", "thinking_token_budget"): {
            **_span(limits.CHAT_INTEGERS["max_reasoning_tokens"]),
            "minimum": -1,
        },
        ("ChatCompletionRequest", "max_parallel_tool_calls"): _span(
            limits.CHAT_INTEGERS["max_parallel_tool_calls"]
        ),
        ("ChatCompletionRequest", "top_logprobs"): logprobs,
        ("ChatCompletionRequest", "reasoning_effort"): _EFFORT,
        ("ChatCompletionRequest", "functions"): _NULL,
        ("ChatCompletionRequest", "function_call"): _NULL,
        ("ChatCompletionRequest", "audio"): _NULL,
        ("JsonSchema", "name"): {"pattern": f"^{limits.FORMAT_NAME}$"},
        ("StructuredOutputs", "choice"): {"minItems": 1},
        ("StructuredOutputs", "structural_tag"): _NULL,
        ("StructuredOutputs", "disable_additional_properties"): {"const": False},
        ("Reasoning", "effort"): _EFFORT,
        ("Reasoning", "max_tokens"): budget,
        ("Thinking", "budget_tokens"): budget,
        ("ChatTemplateKwargs", "reasoning_effort"): _EFFORT,
        ("ChatTemplateKwargs", "current_date"): {"format": "date"},
        ("Message", "name"): {"pattern": f"^{USER_NAME}$"},
        ("FunctionToolCall", "index"): _INDEX,
        ("CustomToolCall", "index"): _INDEX,
        ("FunctionCall", "name"): {"pattern": f"^{CALLED_NAME}$"},
        ("Function", "name"): {"pattern": f"^{limits.TOOL_NAME}$"},
        ("Custom", "name"): {"pattern": f"^{limits.TOOL_NAME}$"},
        ("CustomCall", "name"): {"pattern": f"^{CALLED_NAME}$"},
        ("AllowedTools", "tools"): {"minItems": 1},
        ("CompletionRequest", "prompt"): {
            "minLength": 1,
            "minItems": 1,
            "items": {"minLength": 1, "minItems": 1, "items": token_id, **token_id},
        },
        ("CompletionRequest", "logprobs"): logprobs,
        ("CompletionRequest", "best_of"): _span(limits.INTEGERS["n"]),
        ("CompletionRequest", "suffix"): {"maxLength": 0},
        ("TokenizeRequest", "messages"): {"minItems": 1},
        ("TokenizeRequest", "tools"): tools,
        ("TokenizeRequest", "reasoning_effort"): _EFFORT,
        ("DetokenizeRequest", "tokens"): {"items": token_id},
        **_responses(),
    }


def _responses() -> Mapping[tuple[str, str], Keywords]:
    """Return the keywords of fields of the Responses API by schema and name."""
    tools: Keywords = {"maxItems": limits.MAX_TOOLS}
    return {
        ("ResponsesRequest", "input"): {"minItems": 1},
        ("ResponsesRequest", "tools"): tools,
        ("ResponsesRequest", "max_output_tokens"): _OUTPUT_TOKENS,
        ("ResponsesRequest", "max_tool_calls"): {"minimum": 1},
        ("ResponsesRequest", "max_parallel_tool_calls"): _span(
            limits.CHAT_INTEGERS["max_parallel_tool_calls"]
        ),
        ("ResponsesRequest", "top_logprobs"): _span(limits.INTEGERS["logprobs"]),
        ("ResponsesRequest", "prompt"): _NULL,
        ("ResponsesRequest", "context_management"): _NULL,
        ("ResponsesRequest", "metadata"): {
            "maxProperties": MAX_METADATA,
            "propertyNames": {"maxLength": MAX_KEY_CHARS},
            "additionalProperties": {"maxLength": MAX_VALUE_CHARS},
        },
        ("InputTokensRequest", "input"): {"minItems": 1},
        ("CompactRequest", "input"): {"minItems": 1},
        ("InputTokensRequest", "tools"): tools,
        ("ReasoningOptions", "effort"): _EFFORT,
        ("ReasoningOptions", "max_tokens"): _span(limits.CHAT_INTEGERS["max_reasoning_tokens"]),
        ("ResponseJsonSchemaFormat", "name"): {"pattern": f"^{limits.FORMAT_NAME}$"},
        ("ResponseFunctionTool", "name"): {"pattern": f"^{limits.TOOL_NAME}$"},
        ("ResponseCustomTool", "name"): {"pattern": f"^{limits.TOOL_NAME}$"},
        ("NamespaceTool", "name"): {"minLength": 1},
        ("ResponseAllowedTools", "tools"): {"minItems": 1},
        ("FunctionCallItem", "name"): {"pattern": f"^{CALLED_NAME}$"},
        ("CustomCallItem", "name"): {"pattern": f"^{CALLED_NAME}$"},
    }


def _messages() -> Mapping[tuple[str, str], Keywords]:
    """Return the keywords of the Messages API's fields by schema and name."""
    stop: Keywords = {"minLength": 1, "maxLength": limits.MAX_STOP_CHARS}
    sampling = {name: _span(limits.NUMBERS[name]) for name in ("temperature", "top_p")}
    prompt: Mapping[str, Keywords] = {
        "messages": {"minItems": 1},
        "tools": {"maxItems": limits.MAX_TOOLS},
        "mcp_servers": {"maxItems": 0},
        "thread": _NULL,
    }
    message = {
        **prompt,
        **sampling,
        "max_tokens": _OUTPUT_TOKENS,
        "top_k": _span(limits.INTEGERS["top_k"]),
        "stop_sequences": {"maxItems": limits.MAX_STOP_STRINGS, "items": stop},
        "container": _NULL,
        "compaction": _NULL,
    }
    return {
        **{("MessagesRequest", name): keywords for name, keywords in message.items()},
        **{("CountTokensRequest", name): keywords for name, keywords in prompt.items()},
        ("ThinkingOption", "budget_tokens"): _span(limits.CHAT_INTEGERS["max_reasoning_tokens"]),
        ("OutputConfig", "effort"): _EFFORT,
        ("ClientTool", "name"): {"pattern": f"^{limits.TOOL_NAME}$"},
        ("ToolUseBlock", "id"): {"minLength": 1},
        ("ToolUseBlock", "name"): {"pattern": f"^{CALLED_NAME}$"},
    }


def _sampling(vocab_size: int) -> Mapping[str, Keywords]:
    """Return the keywords of the fields that chat and text completions share."""
    token_id = _token_id(vocab_size)
    stop: Keywords = {"minLength": 1, "maxLength": limits.MAX_STOP_CHARS}
    word: Keywords = {"maxLength": limits.MAX_BAD_WORD_CHARS, "pattern": r"\S"}
    spans = {**limits.NUMBERS, **limits.INTEGERS}
    numbers = {name: _span(span) for name, span in spans.items() if name not in ("logit_bias", "logprobs")}
    return numbers | {
        "max_tokens": _OUTPUT_TOKENS,
        "logit_bias": {
            "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
            "additionalProperties": _span(limits.NUMBERS["logit_bias"]),
        },
        "stop": {**stop, "maxItems": limits.MAX_STOP_STRINGS, "items": stop},
        "stop_token_ids": {"maxItems": limits.MAX_STOP_TOKEN_IDS, "items": token_id},
        "allowed_token_ids": {"minItems": 1, "items": token_id},
        "bad_words": {"maxItems": limits.MAX_BAD_WORDS, "items": word},
        "truncate_prompt_tokens": {"minimum": -1, "maximum": MAX_COUNT, "not": {"const": 0}},
        "cache_salt": {"minLength": 1, "maxLength": MAX_SALT_CHARS},
    }


def _token_id(vocab_size: int) -> Keywords:
    return {"minimum": 0, "maximum": vocab_size - 1}


def _span(span: tuple[float, float]) -> Keywords:
    return {"minimum": span[0], "maximum": span[1]}


_APPLY_TO = {
    "minimum": ("integer", "number"),
    "maximum": ("integer", "number"),
    "not": ("integer",),
    "minLength": ("string",),
    "maxLength": ("string",),
    "pattern": ("string",),
    "format": ("string",),
    "enum": ("string",),
    "const": ("boolean",),
    "minItems": ("array",),
    "maxItems": ("array",),
    "items": ("array",),
    "maxProperties": ("object",),
    "propertyNames": ("object",),
    "additionalProperties": ("object",),
}
"""Type of the values to which a keyword applies."""
_OF_PARTS = ("items", "additionalProperties")


def _state(schema: dict[str, Any], keywords: Keywords) -> None:
    """Add to a schema, in each of its alternatives, the keywords that apply to its type."""
    for alternative in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        _state(alternative, keywords)
    if "type" not in schema:
        if "type" in keywords:
            schema.update(keywords)
        return
    for name, value in keywords.items():
        if schema["type"] not in _APPLY_TO[name]:
            continue
        if name in _OF_PARTS and isinstance(schema.get(name), dict):
            _state(schema[name], value)
        else:
            schema[name] = value
