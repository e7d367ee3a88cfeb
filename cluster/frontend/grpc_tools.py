"""Conversion of a gRPC request's tools, of its choice among them, and of the form of its answer."""

import math
from typing import Literal

from google.protobuf import struct_pb2

from cluster.frontend.structure import (
    json_schema_format,
    one_of,
    only,
    parsed_schema,
    structured,
)
from cluster.frontend.tool_choices import Named, text_input, tool_choice
from cluster.generation import Structure, ToolChoice
from cluster.harmony.tools import ToolDefinition
from cluster.rpc import inference_pb2 as pb
from workers.errors import InvalidRequest

_CHOICES = {
    pb.TOOL_CHOICE_UNSPECIFIED: "auto",
    pb.TOOL_CHOICE_AUTO: "auto",
    pb.TOOL_CHOICE_NONE: "none",
    pb.TOOL_CHOICE_REQUIRED: "required",
}
_SYNTAXES: dict[int, Literal["lark", "regex"]] = {
    pb.GRAMMAR_SYNTAX_LARK: "lark",
    pb.GRAMMAR_SYNTAX_REGEX: "regex",
}


def tools_and_choice(request: pb.ChatRequest) -> tuple[tuple[ToolDefinition, ...], ToolChoice]:
    """Return the tools that the model sees, and which of them may be called.

    Raises:
        InvalidRequest: an enum's value or a schema is invalid; see `tool_choice`.
    """
    if request.tool_choice not in _CHOICES:
        raise InvalidRequest(
            "tool_choice must be TOOL_CHOICE_AUTO, TOOL_CHOICE_NONE or TOOL_CHOICE_REQUIRED.", "tool_choice"
        )
    choice = _CHOICES[request.tool_choice]
    shown = () if choice == "none" else request.tools
    tools = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(shown))
    named = [Named(name, f"allowed_tools[{index}]") for index, name in enumerate(request.allowed_tools)]
    return tools, tool_choice(
        tools,
        named or None,
        required=choice == "required",
        max_calls=request.max_parallel_tool_calls if request.HasField("max_parallel_tool_calls") else None,
        parallel=request.parallel_tool_calls if request.HasField("parallel_tool_calls") else None,
        param="allowed_tools" if named else "tool_choice",
    )


def _tool(tool: pb.Tool, place: str) -> ToolDefinition:
    if tool.type not in pb.ToolType.values():
        raise InvalidRequest(f"{place}.type must be TOOL_TYPE_FUNCTION or TOOL_TYPE_CUSTOM.", f"{place}.type")
    if tool.type == pb.TOOL_TYPE_CUSTOM:
        syntax = None
        if tool.HasField("format"):
            if tool.format.syntax not in _SYNTAXES:
                raise InvalidRequest(
                    f"{place}.custom.format.grammar.syntax must be GRAMMAR_SYNTAX_LARK or "
                    f"GRAMMAR_SYNTAX_REGEX.",
                    f"{place}.custom.format.grammar.syntax",
                )
            syntax = _SYNTAXES[tool.format.syntax]
        param = f"{place}.custom.format.grammar.definition"
        text = text_input(syntax, tool.format.definition, param)
        return ToolDefinition(tool.name, tool.description, text=text)
    return ToolDefinition(
        tool.name,
        tool.description,
        _plain_object(tool.parameters, f"{place}.function.parameters")
        if tool.HasField("parameters")
        else None,
        strict=tool.strict,
    )


def answer_structure(request: pb.ChatRequest) -> Structure | None:
    """Return the form that a request asks for.

    Raises:
        InvalidRequest: a form is wrong, or there are two that differ.
    """
    return one_of((_response_format(request), _structured_outputs(request)))


def _response_format(request: pb.ChatRequest) -> Structure | None:
    match request.response_format.WhichOneof("type"):
        case "json_schema":
            asked, place = request.response_format.json_schema, "response_format.json_schema"
            schema = parsed_schema(asked.schema, f"{place}.schema")
            return json_schema_format(asked.name, asked.description, schema, place)
        case "json_object" if request.response_format.json_object:
            return structured("json_object", True, "response_format")
        case _:
            return None


def _structured_outputs(request: pb.ChatRequest) -> Structure | None:
    if not request.HasField("structured_outputs"):
        return None
    asked = request.structured_outputs
    values = {
        "json": asked.json if asked.HasField("json") else None,
        "regex": asked.regex if asked.HasField("regex") else None,
        "choice": list(asked.choice) or None,
        "grammar": asked.grammar if asked.HasField("grammar") else None,
        "json_object": asked.json_object or None,
    }
    return only(values, "structured_outputs")


def _plain_object(struct: struct_pb2.Struct, path: str) -> dict[str, object]:
    # A Struct has no order; sorted, the same tools give the same prompt in every process, and so
    # the same cached prefix.
    return {name: _plain(struct.fields[name], path) for name in sorted(struct.fields)}


def _plain(value: struct_pb2.Value, path: str) -> object:
    """Convert a Struct's value to the value that JSON would have given: a Struct has only
    floating-point numbers, and whole ones become integers."""
    match value.WhichOneof("kind"):
        case "number_value":
            if not math.isfinite(value.number_value):
                raise InvalidRequest(f"{path} has a number that is not finite or too large.", path)
            return int(value.number_value) if value.number_value.is_integer() else value.number_value
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return _plain_object(value.struct_value, path)
        case "list_value":
            return [_plain(entry, path) for entry in value.list_value.values]
        case _:
            return None
