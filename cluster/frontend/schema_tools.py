"""The bodies of tools: those that a request declares, which of them may be called, and the calls of
earlier messages."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from cluster.frontend.schema_base import Body, Whole


class FunctionCall(Body):
    """The function of a call."""

    name: str
    arguments: str = ""
    parsed_arguments: object = Field(
        default=None, description="Ignored; openai's `parse` and `stream` helpers add it."
    )


class CustomCall(Body):
    """The custom tool of a call."""

    name: str
    input: str = ""


class FunctionToolCall(Body):
    """A call of a function in an assistant message; `index` is what a stream's deltas carry."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Whole | None = None


class CustomToolCall(Body):
    """A call of a custom tool in an assistant message."""

    id: str
    type: Literal["custom"]
    custom: CustomCall
    index: Whole | None = None


def _call_kind(value: Any) -> str | None:
    kind = value.get("type", "function") if isinstance(value, dict) else getattr(value, "type", None)
    return {"function": "<function>", "custom": "<custom>"}.get(kind) if isinstance(kind, str) else None


AssistantToolCall = Annotated[
    Annotated[FunctionToolCall, Tag("<function>")] | Annotated[CustomToolCall, Tag("<custom>")],
    Discriminator(
        _call_kind,
        custom_error_type="tool_kind",
        custom_error_message="an object with type 'function' or 'custom'",
    ),
]


class Function(Body):
    """A function the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = Field(
        default=None, description="The arguments of its calls are always valid against `parameters`."
    )


class FunctionTool(Body):
    """A function as a tool."""

    type: Literal["function"]
    function: Function


class TextInput(Body):
    """Any text."""

    type: Literal["text"]


class ToolGrammar(Body):
    """A grammar and its syntax."""

    syntax: Literal["lark", "regex"]
    definition: str


class GrammarInput(Body):
    """A text that a grammar describes."""

    type: Literal["grammar"]
    grammar: ToolGrammar


def _input_kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return {"text": "<text>", "grammar": "<grammar>"}.get(kind) if isinstance(kind, str) else None


CustomInput = Annotated[
    Annotated[TextInput, Tag("<text>")] | Annotated[GrammarInput, Tag("<grammar>")],
    Discriminator(
        _input_kind,
        custom_error_type="custom_format",
        custom_error_message="an object with type 'text' or 'grammar'",
    ),
]


class Custom(Body):
    """A tool whose input is a text instead of JSON."""

    name: str
    description: str | None = None
    format: CustomInput | None = Field(default=None, description="Any text by default.")


class CustomTool(Body):
    """A custom tool."""

    type: Literal["custom"]
    custom: Custom


def _tool_kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return {"function": "<function>", "custom": "<custom>"}.get(kind) if isinstance(kind, str) else None


Tool = Annotated[
    Annotated[FunctionTool, Tag("<function>")] | Annotated[CustomTool, Tag("<custom>")],
    Discriminator(
        _tool_kind,
        custom_error_type="tool_kind",
        custom_error_message="an object with type 'function' or 'custom'",
    ),
]


class ToolName(Body):
    """A tool by its name."""

    name: str


class NamedFunction(Body):
    """One function."""

    type: Literal["function"]
    function: ToolName


class NamedCustomTool(Body):
    """One custom tool."""

    type: Literal["custom"]
    custom: ToolName


NamedTool = Annotated[
    Annotated[NamedFunction, Tag("<function>")] | Annotated[NamedCustomTool, Tag("<custom>")],
    Discriminator(
        _tool_kind,
        custom_error_type="tool_kind",
        custom_error_message="an object with type 'function' or 'custom'",
    ),
]


class AllowedTools(Body):
    """The only tools that may be called; with mode `required` one of them is."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedToolChoice(Body):
    """A choice among some of the declared tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


_CHOICES = {"function": "<function>", "custom": "<custom>", "allowed_tools": "<allowed>"}


def _choice_kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if isinstance(kind, str):
        return _CHOICES.get(kind)
    return "<word>" if value in ("auto", "none", "required") else None


ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("<word>")]
    | Annotated[NamedFunction, Tag("<function>")]
    | Annotated[NamedCustomTool, Tag("<custom>")]
    | Annotated[AllowedToolChoice, Tag("<allowed>")],
    Discriminator(
        _choice_kind,
        custom_error_type="tool_choice",
        custom_error_message="'auto', 'none', 'required', or an object with type 'function', 'custom' or "
        "'allowed_tools'",
    ),
]
