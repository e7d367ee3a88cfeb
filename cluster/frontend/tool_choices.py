"""Which tools a request declares and which of them may be called, for both APIs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.generation import ToolChoice
from cluster.generation.limits import check_max_calls
from cluster.harmony.tools import TextInput, ToolDefinition
from workers.errors import InvalidRequest
from workers.grammars import grammar as grammars


@dataclass(frozen=True, slots=True)
class Named:
    """A tool that a choice names.

    Attributes:
        custom: whether it is a custom tool; None: of either kind.
        param: where the choice names it.
    """

    name: str
    param: str
    custom: bool | None = None


def tool_choice(
    tools: Sequence[ToolDefinition],
    named: Sequence[Named] | None,
    *,
    required: bool,
    max_calls: int | None,
    parallel: bool | None,
    param: str = "tool_choice",
) -> ToolChoice:
    """Return which of the declared tools may be called.

    Args:
        named: the only ones; None: all.
        required: one of them must be.
        max_calls: `max_parallel_tool_calls`; None: one.
        parallel: `parallel_tool_calls`.
        param: the field that restricts the tools.
    Raises:
        InvalidRequest: there is no tool to call, a named one is not declared, or the two numbers
            of calls contradict each other.
    """
    if required and not tools:
        raise InvalidRequest(f"{param} requires a call, but tools has no tool to call.", param)
    kinds = {tool.name: tool.text is not None for tool in tools}
    for tool in named or ():
        if tool.name not in kinds or tool.custom not in (None, kinds[tool.name]):
            kind = {None: "tool", False: "function", True: "custom tool"}[tool.custom]
            raise InvalidRequest(
                f"{tool.param} is {tool.name[:128]!r}, but tools has no {kind} of that name.", tool.param
            )
    if named is not None and not named:
        raise InvalidRequest(f"{param} allows no tools: name one, or send 'none'.", param)
    check_max_calls(max_calls, parallel)
    return ToolChoice(required, None if named is None else _names(named), param, max_calls or 1)


def _names(named: Iterable[Named]) -> frozenset[str]:
    return frozenset(tool.name for tool in named)


def text_input(syntax: Literal["lark", "regex"] | None, definition: str, param: str) -> TextInput:
    """Return the input of a custom tool.

    Args:
        syntax: None: any text.
        param: path of the definition.
    Raises:
        InvalidRequest: with `param`.
    """
    match syntax:
        case None:
            return TextInput()
        case "lark":
            return TextInput(grammars.lark(definition, param), definition)
        case "regex":
            return TextInput(grammars.regex(definition, param), definition)
