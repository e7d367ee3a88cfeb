"""The bodies that ask for a form of the answer's text: OpenAI's `response_format` and vLLM's
`structured_outputs`."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictStr, Tag

from cluster.frontend.schema_base import Body


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object, or with a schema (as llama.cpp has it) only valid ones."""

    type: Literal["json_object"]
    schema_: dict[str, object] | None = Field(default=None, alias="schema")


class JsonSchema(Body):
    """A JSON schema with a name."""

    name: str
    description: str | None = None
    schema_: dict[str, object] = Field(alias="schema")
    strict: bool | None = Field(default=None, description="No effect: the schema is always enforced.")


class JsonSchemaFormat(Body):
    """JSON that is valid against a schema. The model sees the schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


_FORMATS = {"text": "<text>", "json_object": "<json_object>", "json_schema": "<json_schema>"}


def _format_kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return _FORMATS.get(kind) if isinstance(kind, str) else None


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    Discriminator(
        _format_kind,
        custom_error_type="response_format",
        custom_error_message="an object with type 'text', 'json_object' or 'json_schema' (structural_tag "
        "is not offered)",
    ),
]


_NO_EFFECT = "No effect: JSON has at most one space or line break between its tokens."


class StructuredOutputs(Body):
    """A form of the answer's text; exactly one of `json`, `regex`, `choice`, `grammar` and
    `json_object`."""

    json_: object = Field(default=None, alias="json", description="A JSON schema, or its text.")
    regex: str | None = None
    choice: list[StrictStr] | None = None
    grammar: str | None = Field(default=None, description="In llguidance's variant of Lark, or in GBNF.")
    json_object: bool | None = None
    disable_any_whitespace: bool | None = Field(default=None, description=_NO_EFFECT)
    whitespace_pattern: str | None = Field(default=None, description=_NO_EFFECT)
    disable_additional_properties: bool | None = Field(default=None, description="Only false.")
    structural_tag: object = Field(default=None, description="Only null.")
