"""Rendering of a tool's JSON schema as the TypeScript-like type that gpt-oss was trained to read,
and the check that it can be rendered.

The text equals what openai/harmony's renderer writes (`json_schema_to_typescript` in its
src/encoding.rs), oddities included: the models know no other form. Among them: `anyOf`, `allOf` and
`$ref` become `any`, only `oneOf` lists its variants; the further lines of a property's description
have no `//`; the first variant of a `oneOf` loses its own description where the property has one.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from workers.grammars.grammar import Grammar

MAX_SCHEMA_DEPTH = 64
"""Maximum nesting depth of a schema's objects and arrays."""

_MAX_SHOWN_CHARS = 200
_Path = tuple["_Path", object] | None


@dataclass(frozen=True, slots=True)
class TextInput:
    """The input of a tool that takes a text instead of JSON.

    Attributes:
        grammar: of the text; None: any text.
        shown: the grammar as the client wrote it; empty: none.
    """

    grammar: Grammar | None = None
    shown: str = ""


@dataclass(frozen=True, slots=True)
class ToolFields:
    """The client API's names for the fields of a tool, for errors.

    Attributes:
        grammar: of the grammar of a custom tool's input.
    """

    name: str
    parameters: str
    strict: str
    grammar: str

    @classmethod
    def of_chat(cls, index: int, *, custom: bool = False) -> "ToolFields":
        """Return the names in OpenAI's chat API."""
        place = f"tools[{index}].{'custom' if custom else 'function'}"
        return cls(
            f"{place}.name", f"{place}.parameters", f"{place}.strict", f"{place}.format.grammar.definition"
        )


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A tool that the model may call: a function, or a custom tool, which takes a text.

    Attributes:
        fields: None: those of chat.
        parameters: JSON schema of a function's arguments; None: the function takes none.
        strict: the arguments must match the schema.
        text: the input of a custom tool; None: it is a function.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, object] | None = None
    strict: bool = False
    text: TextInput | None = None
    fields: ToolFields | None = field(default=None, compare=False, repr=False)

    def names(self, index: int) -> ToolFields:
        """Return the names of its fields, as the tool at this place of the request."""
        return self.fields or ToolFields.of_chat(index, custom=self.text is not None)


def schema_problem(schema: Mapping[str, object]) -> str | None:
    """Return why the schema of a function's arguments cannot be shown to the model, or None.

    Only the keywords that change what `typescript_type` writes are checked, and each may have the
    form of any draft; null counts as absent. The other keywords can have any value.

    Returns:
        The rest of a sentence that begins with the schema's name. Takes time in proportion to the
        schema and never raises.
    """
    if _deeper_than(schema, MAX_SCHEMA_DEPTH):
        return f"is nested deeper than {MAX_SCHEMA_DEPTH} levels"
    kind = schema.get("type")
    if kind not in (None, "object") and not (isinstance(kind, list) and "object" in kind):
        return "must describe an object: set type to 'object'"
    pending: list[tuple[_Path, object]] = [(None, schema)]
    while pending:
        path, node = pending.pop()
        if node is None or isinstance(node, bool):
            continue
        if not isinstance(node, Mapping):
            return f"is not a JSON schema: {_shown(path)} must be a schema: an object, true or false"
        for keyword, (form, fits) in _FORMS.items():
            value = node.get(keyword)
            if value is not None and not fits(value):
                return f"is not a JSON schema: {_shown((path, keyword))} must be {form}"
        pending += _inner_schemas(path, node)
    return None


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


_FORMS: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "type": (
        "the name of a JSON type, or an array of names",
        lambda value: isinstance(value, str) or _is_strings(value),
    ),
    # PHP writes its empty arrays as [], whatever they stand for.
    "properties": ("an object of schemas", lambda value: isinstance(value, Mapping) or value == []),
    # In drafts before 4 a property says of itself whether it is required.
    "required": (
        "an array of names of properties",
        lambda value: isinstance(value, bool) or _is_strings(value),
    ),
    "enum": ("an array", lambda value: isinstance(value, list)),
    "oneOf": ("an array of schemas", lambda value: isinstance(value, list)),
    # Drafts before 2020-12 also describe a tuple by an array, which is shown as any[].
    "items": (
        "a schema: an object, true or false",
        lambda value: isinstance(value, Mapping | bool | list),
    ),
}
"""The keywords that decide a type's text, with the form that their value must have."""


def _inner_schemas(path: _Path, schema: Mapping[str, object]) -> Iterator[tuple[_Path, object]]:
    """Yield the schemas inside one whose keywords have their forms, with their paths."""
    properties, variants, items = schema.get("properties"), schema.get("oneOf"), schema.get("items")
    for name, inner in properties.items() if isinstance(properties, Mapping) else ():
        yield ((path, "properties"), name), inner
    for index, inner in enumerate(_sequence(variants) or ()):
        yield ((path, "oneOf"), index), inner
    if isinstance(items, Mapping):
        yield (path, "items"), items


def _shown(path: _Path) -> str:
    """Return a path such as `properties.a.oneOf[2]`; only its end where it is long."""
    parts: list[str] = []
    length = 0
    while path is not None and length <= _MAX_SHOWN_CHARS:
        path, part = path
        text = f"[{part}]" if isinstance(part, int) else str(part)[:_MAX_SHOWN_CHARS]
        parts.append(text if isinstance(part, int) or path is None else f".{text}")
        length += len(parts[-1])
    text = "".join(reversed(parts))
    return f"…{text[-_MAX_SHOWN_CHARS:]}" if len(text) > _MAX_SHOWN_CHARS or path is not None else text


def _deeper_than(value: object, limit: int) -> bool:
    level: list[object] = [value]
    for _ in range(limit):
        containers = [node for node in level if isinstance(node, Mapping | list)]
        values = (node.values() if isinstance(node, Mapping) else node for node in containers)
        level = [child for entries in values for child in entries]
        if not level:
            return False
    return True


def typescript_type(schema: object, indent: str = "") -> str:
    """Return the TypeScript type of a schema that is not deep, as `schema_problem` checks.

    Any value has a text. Linear in its size times its depth.
    """
    if not isinstance(schema, Mapping):
        return "any"
    variants = _sequence(schema.get("oneOf"))
    if variants is not None:
        return "".join(f"\n{indent} | {_variant(variant, indent)}" for variant in variants)
    kind = schema.get("type")
    union = [
        ("number" if name == "integer" else name) for name in _sequence(kind) or () if isinstance(name, str)
    ]
    if union:
        return " | ".join(union)
    match kind:
        case "object":
            return _object_type(schema, indent)
        case "string":
            choices = [
                f'"{value}"' for value in _sequence(schema.get("enum")) or () if isinstance(value, str)
            ]
            return " | ".join(choices) or "string"
        case "number" | "integer":
            return "number"
        case "boolean":
            return "boolean"
        case "array":
            return f"{typescript_type(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    return "any"


def _object_type(schema: Mapping[str, object], indent: str) -> str:
    lines: list[str] = []
    if isinstance(description := schema.get("description"), str):
        lines.append(f"{indent}// {description}")
    lines.append("{")
    properties = schema.get("properties")
    required = {name for name in _sequence(schema.get("required")) or () if isinstance(name, str)}
    for name, value in properties.items() if isinstance(properties, Mapping) else ():
        lines += _property(
            name, "" if name in required else "?", value if isinstance(value, Mapping) else {}, indent
        )
    lines.append(f"{indent}}}")
    return "\n".join(lines)


def _property(name: str, optional: str, schema: Mapping[str, object], indent: str) -> list[str]:
    lines: list[str] = []
    description = schema.get("description")
    if isinstance(title := schema.get("title"), str):
        lines += [f"{indent}// {title}", f"{indent}//"]
    if isinstance(description, str) and "oneOf" not in schema:
        lines.append(f"{indent}// {description}")
    if examples := _sequence(schema.get("examples")):
        lines.append(f"{indent}// Examples:")
        lines += [f'{indent}// - "{example}"' for example in examples if isinstance(example, str)]
    variants = _sequence(schema.get("oneOf"))
    if variants is not None:
        return lines + _one_of_property(name, optional, schema, variants, indent)
    comment = f" // {_default(schema)}" if "default" in schema and "oneOf" not in schema else ""
    lines.append(f"{indent}{name}{optional}: {_nullable_type(schema, f'{indent}    ')},{comment}")
    return lines


def _one_of_property(
    name: str, optional: str, schema: Mapping[str, object], variants: Sequence[object], indent: str
) -> list[str]:
    lines: list[str] = []
    description = schema.get("description")
    described_above = isinstance(description, str) and not (
        variants and _get(variants[0], "description") == description
    )
    if described_above:
        lines.append(f"{indent}// {description}")
    if "default" in schema:
        lines.append(f"{indent}// {_default(schema)}")
    lines.append(f"{indent}{name}{optional}:")
    for index, variant in enumerate(variants):
        comments = []
        own = _get(variant, "description")
        if isinstance(own, str) and own != description and not (index == 0 and described_above):
            comments.append(own)
        if isinstance(variant, Mapping) and "default" in variant:
            comments.append(_default(variant))
        trailing = f" // {' '.join(comments)}" if comments else ""
        lines.append(f"{indent} | {_nullable_type(variant, f'{indent}   ')}{trailing}")
    lines.append(f"{indent},")
    return lines


def _variant(variant: object, indent: str) -> str:
    text = _nullable_type(variant, f"{indent}   ")
    comments = []
    if isinstance(variant, Mapping):
        if isinstance(description := variant.get("description"), str):
            comments.append(description)
        if "default" in variant:
            comments.append(_default(variant, quote_enum=True))
    return f"{text} // {' '.join(comments)}" if comments else text


def _nullable_type(schema: object, indent: str) -> str:
    text = typescript_type(schema, indent)
    return f"{text} | null" if _get(schema, "nullable") is True and "null" not in text else text


def _default(schema: Mapping[str, object], quote_enum: bool = False) -> str:
    value = schema["default"]
    if isinstance(value, str):
        if not _sequence(schema.get("enum")):
            return f'default: "{value}"'
        return f"default: {json_text(value) if quote_enum else value}"
    return f"default: {json_text(value)}"


def json_text(value: object) -> str:
    """Return JSON as Rust's serde_json writes it: no blanks, characters unescaped, floats in their
    shortest form."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{json_text(key)}:{json_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(json_text, value)) + "]"
    if isinstance(value, float):
        return _float_text(value)
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**64:
        return _float_text(float(value))
    return json.dumps(value, ensure_ascii=False)


def _float_text(value: float) -> str:
    mantissa, _, exponent = repr(value).partition("e")
    negative, digits = mantissa.startswith("-"), mantissa.lstrip("-")
    sign = "-" if negative else ""
    whole, _, fraction = digits.partition(".")
    significant = (whole + fraction).lstrip("0")
    # point: where the decimal point stands, counted from the first significant digit.
    point = len(whole) + int(exponent or 0) - (len(whole + fraction) - len(significant))
    significant = significant.rstrip("0")
    if not significant:
        return f"{sign}0.0"
    if len(significant) <= point <= 16:
        return f"{sign}{significant}{'0' * (point - len(significant))}.0"
    if 0 < point <= 16:
        return f"{sign}{significant[:point]}.{significant[point:]}"
    if -5 < point <= 0:
        return f"{sign}0.{'0' * -point}{significant}"
    tail = f".{significant[1:]}" if len(significant) > 1 else ""
    return f"{sign}{significant[0]}{tail}e{'+' if point > 0 else ''}{point - 1}"


def _sequence(value: object) -> Sequence[object] | None:
    return value if isinstance(value, (list, tuple)) else None


def _get(schema: object, key: str) -> object:
    return schema.get(key) if isinstance(schema, Mapping) else None
