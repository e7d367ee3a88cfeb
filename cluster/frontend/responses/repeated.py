"""The fields of the Response object that repeat the request, with defaults where it left them
open."""

from cluster.frontend.responses.schema import (
    Format,
    ReasoningOptions,
    ResponseJsonSchemaFormat,
    ResponsesRequest,
)
from cluster.frontend.responses.schema_tools import (
    NamedTool,
    NamespaceTool,
    ResponseAllowedTools,
    ResponseCustomTool,
    ResponseFunctionTool,
    Tool,
    ToolChoice,
)
from cluster.frontend.responses.views import Json


def summary_of(reasoning: ReasoningOptions | None) -> str | None:
    """Return the kind of summary of the reasoning that is asked for."""
    return None if reasoning is None else reasoning.summary or reasoning.generate_summary


def repeated_fields(body: ResponsesRequest, model: str) -> Json:
    """Return the fields of the Response object that repeat the request."""
    text = body.text
    effort = body.reasoning.effort if body.reasoning else None
    return {
        "background": False,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "presence_penalty": body.presence_penalty or 0.0,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": effort, "summary": summary_of(body.reasoning)},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {
            "format": _format_body(text.format if text else None),
            "verbosity": (text.verbosity if text else None) or "medium",
        },
        "tool_choice": _choice_body(body.tool_choice),
        "tools": [_tool_body(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "user": body.user,
    }


def _format_body(asked: Format | None) -> Json:
    if isinstance(asked, ResponseJsonSchemaFormat):
        return {
            "type": "json_schema",
            "name": asked.name,
            "description": asked.description,
            "schema": asked.schema_,
            "strict": asked.strict is not False,
        }
    return {"type": "text" if asked is None else asked.type}


def _choice_body(choice: ToolChoice | None) -> Json | str:
    match choice:
        case NamedTool():
            return _named_body(choice)
        case ResponseAllowedTools():
            tools = [_named_body(tool) for tool in choice.tools if isinstance(tool, NamedTool)]
            return {"type": "allowed_tools", "mode": choice.mode, "tools": tools}
        case str():
            return choice
        case _:
            return "auto"


def _named_body(tool: NamedTool) -> Json:
    body: Json = {"type": tool.type, "name": tool.name}
    return body if tool.namespace is None else {**body, "namespace": tool.namespace}


def _tool_body(tool: Tool) -> Json:
    match tool:
        case NamespaceTool():
            return {
                "type": "namespace",
                "name": tool.name,
                "description": tool.description or "",
                "tools": [_tool_body(inner) for inner in tool.tools],
            }
        case ResponseFunctionTool():
            return {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": bool(tool.strict),
            }
        case ResponseCustomTool():
            asked = {"type": "text"} if tool.format is None else tool.format.model_dump()
            described = {} if tool.description is None else {"description": tool.description}
            return {"type": "custom", "name": tool.name, **described, "format": asked}
        case _:
            return {"type": tool.type}
