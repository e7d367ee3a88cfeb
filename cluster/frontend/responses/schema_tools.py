"""The tools of a Responses request, and which of them may be called."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic.json_schema import SkipJsonSchema

from cluster.frontend.responses.schema_items import IGNORED
from cluster.frontend.schema_base import Body, Ignored

OFFERED = "it offers function, custom and namespace"


class _Tool(Body):
    """What tools have in common."""

    name: str
    description: str | None = None
    defer_loading: Ignored = Field(default=None, description=IGNORED)
    allowed_callers: Ignored = Field(default=None, description=IGNORED)
    async_: Ignored = Field(default=None, alias="async", description=IGNORED)


class ResponseFunctionTool(_Tool):
    """A function."""

    type: Literal["function"]
    parameters: dict[str, object] | None = None
    strict: bool | None = Field(
        default=None, description="The arguments of its calls are always valid against `parameters`."
    )
    output_schema: Ignored = Field(default=None, description=IGNORED)


class ResponseTextInput(Body):
    """Any text."""

    type: Literal["text"]


class ResponseGrammarInput(Body):
    """A text that a grammar describes; it is enforced."""

    type: Literal["grammar"]
    syntax: Literal["lark", "regex"]
    definition: str


def _kind(value: Any) -> object:
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def _input_tag(value: Any) -> str | None:
    kind = _kind(value)
    return {"text": "<text>", "grammar": "<grammar>"}.get(kind) if isinstance(kind, str) else None


CustomInput = Annotated[
    Annotated[ResponseTextInput, Tag("<text>")] | Annotated[ResponseGrammarInput, Tag("<grammar>")],
    Discriminator(
        _input_tag,
        custom_error_type="custom_format",
        custom_error_message="an object with type 'text' or 'grammar'",
    ),
]


class ResponseCustomTool(_Tool):
    """A tool whose input is a text instead of JSON."""

    type: Literal["custom"]
    format: CustomInput | None = Field(default=None, description="Any text by default.")


class OtherTool(Body):
    """A tool that OpenAI's servers run themselves."""

    type: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        kind = str(_kind(value))[:40]
        raise ValueError(f"has the type {kind!r}, which this server does not offer yet; {OFFERED}")


def _inner_tag(value: Any) -> str | None:
    kind = _kind(value)
    tags = {"function": "<function>", "custom": "<custom>"}
    return tags.get(kind, "<other>") if isinstance(kind, str) else None


_TOOL_ERROR = "an object with type 'function', 'custom' or 'namespace'"
InnerTool = Annotated[
    Annotated[ResponseFunctionTool, Tag("<function>")]
    | Annotated[ResponseCustomTool, Tag("<custom>")]
    | Annotated[SkipJsonSchema[OtherTool], Tag("<other>")],
    Discriminator(
        _inner_tag,
        custom_error_type="inner_tool",
        custom_error_message="an object with type 'function' or 'custom'",
    ),
]


class NamespaceTool(Body):
    """Tools under a common name: the model sees each as `NAMESPACE__NAME`."""

    type: Literal["namespace"]
    name: str
    description: str | None = None
    tools: list[InnerTool]


def _tool_tag(value: Any) -> str | None:
    return "<namespace>" if _kind(value) == "namespace" else _inner_tag(value)


Tool = Annotated[
    Annotated[ResponseFunctionTool, Tag("<function>")]
    | Annotated[ResponseCustomTool, Tag("<custom>")]
    | Annotated[NamespaceTool, Tag("<namespace>")]
    | Annotated[SkipJsonSchema[OtherTool], Tag("<other>")],
    Discriminator(_tool_tag, custom_error_type="tool", custom_error_message=_TOOL_ERROR),
]


class NamedTool(Body):
    """A tool by its name; of a namespace all its tools, or one with `namespace` beside its name."""

    type: Literal["function", "custom", "namespace"]
    name: str
    namespace: str | None = None


def _named_tag(value: Any) -> str | None:
    kind = _kind(value)
    if not isinstance(kind, str):
        return None
    return "<named>" if kind in ("function", "custom", "namespace") else "<other>"


Named = Annotated[
    Annotated[NamedTool, Tag("<named>")] | Annotated[SkipJsonSchema[OtherTool], Tag("<other>")],
    Discriminator(_named_tag, custom_error_type="named_tool", custom_error_message=_TOOL_ERROR),
]


class ResponseAllowedTools(Body):
    """The only tools that may be called; with mode `required` one of them is."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[Named]


def _choice_tag(value: Any) -> str | None:
    if value in ("auto", "none", "required"):
        return "<word>"
    return "<allowed>" if _kind(value) == "allowed_tools" else _named_tag(value)


ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("<word>")]
    | Annotated[NamedTool, Tag("<named>")]
    | Annotated[ResponseAllowedTools, Tag("<allowed>")]
    | Annotated[SkipJsonSchema[OtherTool], Tag("<other>")],
    Discriminator(
        _choice_tag,
        custom_error_type="tool_choice",
        custom_error_message="'auto', 'none', 'required', or an object with type 'function', 'custom' or "
        "'allowed_tools'",
    ),
]
