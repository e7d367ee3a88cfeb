"""The tools of a Responses request as the model sees them, and their names as clients do."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.frontend import tool_choices
from cluster.frontend.responses.schema_tools import (
    NamedTool,
    NamespaceTool,
    OtherTool,
    ResponseAllowedTools,
    ResponseCustomTool,
    ResponseFunctionTool,
    ResponseGrammarInput,
    Tool,
    ToolChoice,
)
from cluster.generation import ToolChoice as Choice
from cluster.harmony.tools import ToolDefinition, ToolFields
from workers.errors import InvalidRequest

SEPARATOR = "__"
"""What stands between a namespace and a name in the name that the model sees."""


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of a request.

    Attributes:
        definitions: as the model sees them.
        custom: the model's names of custom tools.
        namespaces: namespace and name by the model's name, of the tools in namespaces.
    """

    definitions: tuple[ToolDefinition, ...] = ()
    custom: frozenset[str] = frozenset()
    namespaces: Mapping[str, tuple[str, str]] | None = None


def full_name(namespace: str | None, name: str) -> str:
    """Return the name that the model sees."""
    return name if namespace is None else f"{namespace}{SEPARATOR}{name}"


def declared_tools(tools: Sequence[Tool]) -> Tools:
    """Return the tools in the form that the prompt needs.

    Raises:
        InvalidRequest: the grammar of a custom tool is wrong.
    """
    definitions: list[ToolDefinition] = []
    namespaces: dict[str, tuple[str, str]] = {}
    for namespace, tool, place in _flat(tools):
        definition = _definition(tool, full_name(namespace, tool.name), place)
        definitions.append(definition)
        if namespace is not None:
            namespaces[definition.name] = (namespace, tool.name)
    custom = frozenset(tool.name for tool in definitions if tool.text is not None)
    return Tools(tuple(definitions), custom, namespaces)


def _flat(
    tools: Sequence[Tool],
) -> Iterator[tuple[str | None, ResponseFunctionTool | ResponseCustomTool, str]]:
    """Yield each tool with its namespace and its place."""
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        if isinstance(tool, ResponseFunctionTool | ResponseCustomTool):
            yield None, tool, place
        elif isinstance(tool, NamespaceTool):
            if not tool.name:
                raise InvalidRequest(f"{place}.name must not be empty.", f"{place}.name")
            for inner, one in enumerate(tool.tools):
                assert not isinstance(one, OtherTool)
                yield tool.name, one, f"{place}.tools[{inner}]"


def _definition(tool: ResponseFunctionTool | ResponseCustomTool, name: str, place: str) -> ToolDefinition:
    grammar = f"{place}.format.definition"
    fields = ToolFields(f"{place}.name", f"{place}.parameters", f"{place}.strict", grammar)
    if isinstance(tool, ResponseCustomTool):
        syntax, definition = None, ""
        if isinstance(tool.format, ResponseGrammarInput):
            syntax, definition = tool.format.syntax, tool.format.definition
        text = tool_choices.text_input(syntax, definition, grammar)
        return ToolDefinition(name, tool.description or "", text=text, fields=fields)
    return ToolDefinition(
        name, tool.description or "", tool.parameters, strict=bool(tool.strict), fields=fields
    )


def tool_choice(
    choice: ToolChoice | None, tools: Tools, *, max_calls: int | None, parallel: bool | None
) -> Choice:
    """Return which of the declared tools may be called.

    Args:
        tools: those that the model sees.
        max_calls, parallel: `max_parallel_tool_calls` and `parallel_tool_calls`.
    Raises:
        InvalidRequest: with `param`.
    """
    named: list[tool_choices.Named] | None = None
    required = choice == "required"
    param = "tool_choice"
    if isinstance(choice, NamedTool):
        named, required = [*_named(choice, tools, param)], True
    elif isinstance(choice, ResponseAllowedTools):
        required, param = choice.mode == "required", "tool_choice.tools"
        named = [
            found
            for index, one in enumerate(choice.tools)
            if isinstance(one, NamedTool)
            for found in _named(one, tools, f"{param}[{index}]")
        ]
    return tool_choices.tool_choice(
        tools.definitions, named, required=required, max_calls=max_calls, parallel=parallel, param=param
    )


def _named(tool: NamedTool, tools: Tools, place: str) -> Iterator[tool_choices.Named]:
    """Yield the tools that a name means: one, or those of a namespace."""
    param = f"{place}.name"
    if tool.type != "namespace":
        yield tool_choices.Named(full_name(tool.namespace, tool.name), param, tool.type == "custom")
        return
    names = [name for name, (space, _) in (tools.namespaces or {}).items() if space == tool.name]
    if not names:
        raise InvalidRequest(
            f"{param} is {tool.name[:128]!r}, but tools has no namespace of that name with tools in it.",
            param,
        )
    yield from (tool_choices.Named(name, param) for name in names)
