"""The items of a Responses request's input. Every item of an answer's output is one of them, and
can be sent back unchanged. What is declared as `object` is ignored."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic.json_schema import SkipJsonSchema

from cluster.frontend.schema_base import Body

IGNORED = "Ignored."


class ResponseTextPart(Body):
    """A piece of text."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: object = Field(default=None, description=IGNORED)
    logprobs: object = Field(default=None, description=IGNORED)
    parsed: object = Field(default=None, description="Ignored; openai's `parse` helper adds it.")


class ResponseRefusalPart(Body):
    """An assistant's refusal; read as its text."""

    type: Literal["refusal"]
    refusal: str


class ResponseOtherPart(Body):
    """Content that is not text; refused, because the model reads text only."""

    type: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        raise ValueError("is not text; this model reads text only, so send parts of type 'input_text'")


_PARTS = {
    "input_text": "<text_part>",
    "output_text": "<text_part>",
    "text": "<text_part>",
    "refusal": "<refusal_part>",
}


def _kind(value: Any) -> object:
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def _part_tag(value: Any) -> str | None:
    kind = _kind(value)
    return _PARTS.get(kind, "<other_part>") if isinstance(kind, str) else None


Part = Annotated[
    Annotated[ResponseTextPart, Tag("<text_part>")]
    | Annotated[ResponseRefusalPart, Tag("<refusal_part>")]
    | Annotated[SkipJsonSchema[ResponseOtherPart], Tag("<other_part>")],
    Discriminator(
        _part_tag, custom_error_type="part", custom_error_message="an object with type 'input_text'"
    ),
]


def _text_or_list(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<list>")],
    Discriminator(
        _text_or_list, custom_error_type="content", custom_error_message="a string or an array of text parts"
    ),
]


class _Item(Body):
    """What items have in common."""

    id: object = Field(default=None, description=IGNORED)
    status: object = Field(default=None, description=IGNORED)
    created_by: object = Field(default=None, description=IGNORED)


class MessageItem(_Item):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: Content
    phase: Literal["commentary", "final_answer"] | None = Field(
        default=None, description="Assistant: a preamble, or the answer; by what follows, if absent."
    )


class SummaryText(Body):
    """A piece of a summary of reasoning."""

    type: Literal["summary_text"]
    text: str


class ReasoningText(Body):
    """A piece of reasoning."""

    type: Literal["reasoning_text", "text"]
    text: str


class ReasoningItem(_Item):
    """The assistant's reasoning: its content, else what is encrypted, else its summary."""

    type: Literal["reasoning"]
    summary: list[SummaryText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None


class _CallItem(_Item):
    """What calls have in common."""

    call_id: str
    name: str
    namespace: str | None = None
    caller: object = Field(default=None, description=IGNORED)
    async_: object = Field(default=None, alias="async", description=IGNORED)


class FunctionCallItem(_CallItem):
    """A call of a function."""

    type: Literal["function_call"]
    arguments: str
    parsed_arguments: object = Field(default=None, description="Ignored; openai's `parse` helper adds it.")


class CustomCallItem(_CallItem):
    """A call of a custom tool."""

    type: Literal["custom_tool_call"]
    input: str


class _OutputItem(_Item):
    """What results have in common."""

    call_id: str
    output: Content
    name: object = Field(default=None, description=IGNORED)
    caller: object = Field(default=None, description=IGNORED)


class FunctionOutputItem(_OutputItem):
    """The result of a function."""

    type: Literal["function_call_output"]


class CustomOutputItem(_OutputItem):
    """The result of a custom tool."""

    type: Literal["custom_tool_call_output"]


class CompactionItem(_Item):
    """Earlier items in a short form, as `POST /v1/responses/compact` answers it."""

    type: Literal["compaction", "compaction_summary"]
    encrypted_content: str


class ItemReference(Body):
    """A stored item."""

    type: Literal["item_reference"] | None = None
    id: str


class OtherItem(Body):
    """An item that this server does not know."""

    type: str

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        kind = str(_kind(value))[:40]
        raise ValueError(
            f"has the type {kind!r}, which this server does not take; it takes {', '.join(ITEM_TYPES)}"
        )


_ITEMS = {
    "message": "<message>",
    "reasoning": "<reasoning>",
    "function_call": "<function_call>",
    "function_call_output": "<function_output>",
    "custom_tool_call": "<custom_call>",
    "custom_tool_call_output": "<custom_output>",
    "compaction": "<compaction>",
    "compaction_summary": "<compaction>",
    "item_reference": "<item_reference>",
}
ITEM_TYPES = tuple(kind for kind in _ITEMS if kind != "compaction_summary")


def _item_tag(value: Any) -> str | None:
    kind = _kind(value)
    if isinstance(kind, str):
        return _ITEMS.get(kind, "<other>")
    if kind is None and isinstance(value, dict):
        return "<message>" if "role" in value else "<item_reference>" if "id" in value else None
    return None


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionOutputItem, Tag("<function_output>")]
    | Annotated[CustomCallItem, Tag("<custom_call>")]
    | Annotated[CustomOutputItem, Tag("<custom_output>")]
    | Annotated[CompactionItem, Tag("<compaction>")]
    | Annotated[ItemReference, Tag("<item_reference>")]
    | Annotated[SkipJsonSchema[OtherItem], Tag("<other>")],
    Discriminator(
        _item_tag,
        custom_error_type="item",
        custom_error_message="an item: an object with a type, or a message with role and content",
    ),
]

Input = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Item], Tag("<list>")],
    Discriminator(
        _text_or_list, custom_error_type="input", custom_error_message="a string or an array of items"
    ),
]
