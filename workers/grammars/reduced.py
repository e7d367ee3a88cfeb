"""JSON schemas reduced to the types of their parts: for arguments of functions whose schema is
advice to the model and no promise to the client."""

import re
from collections.abc import Iterable, Iterator, Mapping

_MAX_DEPTH = 64
"""Maximum nesting depth of what is kept of a schema."""
_MAX_PARTS = 5_000
"""Maximum number of subschemas and enum values that are kept."""
_MAX_TEXT_CHARS = 20_000
"""Maximum length of the enums' texts and the names of properties that are kept: llguidance makes a
state of its lexer for each character that a text has had, of at most
`workers.constraint.parser_limits.MAX_LEXER_STATES`."""
_MAX_PROPERTIES = 32
"""Maximum number of an object's properties whose types are kept: llguidance takes 10 ms to compile
so many that may come in any order, and 4 s for 200."""
_TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")


def reduced(schema: object) -> dict[str, object]:
    """Return the schema of an object with nothing but the types and enums of its parts.

    Every instance of the schema that is an object is an instance of the result, with its properties
    in any order. Its size is bounded, whatever the schema.
    """
    return _Reduction(schema).result()


class _Reduction:
    """One schema on its way.

    Args:
        root: what references are resolved in.
    """

    def __init__(self, root: object) -> None:
        self._root = root
        self._num_parts = 0
        self._num_text_chars = 0
        self._targets: dict[str, object] = {}
        """What a reference names, by reference: each may be long, and stand in every part."""
        self._names: dict[str, str] = {}
        """The name under `$defs` by reference."""
        self._pending: list[tuple[str, object]] = []
        """Definitions that are not written yet: name and schema."""

    def result(self) -> dict[str, object]:
        result = self._object(self._without_references(self._root), 0)
        definitions: dict[str, object] = {}
        while self._pending:
            name, schema = self._pending.pop()
            definitions[name] = self._part(schema, 0)
        return {**result, **({"$defs": definitions} if definitions else {})}

    def _without_references(self, schema: object) -> object:
        """Follow references until something else comes; None for what cannot be found."""
        for _ in range(_MAX_DEPTH):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                return schema
            schema = self._target(schema["$ref"])
        return None

    def _target(self, reference: object) -> object:
        if not isinstance(reference, str):
            return None
        if reference not in self._targets:
            self._targets[reference] = _target(self._root, reference)
        return self._targets[reference]

    def _object(self, schema: object, depth: int) -> dict[str, object]:
        whole = self._keywords(schema, depth) if isinstance(schema, Mapping) else {}
        return {"type": "object", **{key: whole[key] for key in ("patternProperties",) if key in whole}}

    def _part(self, schema: object, depth: int) -> dict[str, object]:
        self._num_parts += 1
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH or self._num_parts > _MAX_PARTS:
            return {}
        if "$ref" in schema:
            return self._reference(schema)
        return self._keywords(schema, depth)

    def _reference(self, schema: Mapping[str, object]) -> dict[str, object]:
        target = self._without_references(schema)
        reference = schema["$ref"]
        if not isinstance(target, Mapping) or not isinstance(reference, str):
            return {}
        if reference not in self._names:
            self._names[reference] = str(len(self._names))
            self._pending.append((self._names[reference], target))
        return {"$ref": f"#/$defs/{self._names[reference]}"}

    def _keywords(self, schema: Mapping[str, object], depth: int) -> dict[str, object]:
        result: dict[str, object] = {}
        types = list(_types(schema))
        if types:
            result["type"] = types if len(types) > 1 else types[0]
        if (values := self._enum(schema, types)) is not None:
            return {"enum": values}
        properties = schema.get("properties")
        if (
            isinstance(properties, Mapping)
            and 0 < len(properties) <= _MAX_PROPERTIES
            and (not types or "object" in types)
            and self._takes_texts(properties)
        ):
            # llguidance enforces the order of `properties`; a model that wrote a later one first
            # could not write the others.
            result["patternProperties"] = {
                f"^{re.escape(name)}$": self._part(inner, depth + 1) for name, inner in properties.items()
            }
        items = schema.get("items")
        # After `prefixItems` it describes only the entries that follow these.
        is_of_all = isinstance(items, Mapping) and schema.get("prefixItems") is None
        if is_of_all and (not types or "array" in types):
            result["items"] = self._part(items, depth + 1)
        return result

    def _enum(self, schema: Mapping[str, object], types: list[str]) -> list[object] | None:
        """Return the values, all of simple types; None where there are others."""
        values = schema.get("enum")
        if not isinstance(values, list) or not values:
            return None
        self._num_parts += len(values)
        if self._num_parts > _MAX_PARTS:
            return None
        if schema.get("nullable") is True and None not in values:
            values = [*values, None]
        kept = [value for value in values if not types or any(_is_of(value, name) for name in types)]
        if not kept or any(isinstance(value, dict | list | float) for value in kept):
            return None
        return kept if self._takes_texts(kept) else None

    def _takes_texts(self, values: Iterable[object]) -> bool:
        """Return whether there is room for these texts."""
        num_chars = sum(len(value) for value in values if isinstance(value, str))
        fits = self._num_text_chars + num_chars <= _MAX_TEXT_CHARS
        self._num_text_chars += num_chars if fits else 0
        return fits


def _types(schema: Mapping[str, object]) -> Iterator[str]:
    """Yield the names of types; none where one is unknown."""
    named = schema.get("type")
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not names or any(name not in _TYPES for name in names):
        return
    yield from dict.fromkeys(names)
    if schema.get("nullable") is True and "null" not in names:
        yield "null"


def _is_of(value: object, name: str) -> bool:
    match value:
        case None:
            return name == "null"
        case bool():
            return name == "boolean"
        case int():
            return name in ("integer", "number")
        case float():
            return name == "number" or (name == "integer" and value.is_integer())
        case str():
            return name == "string"
        case list():
            return name == "array"
        case _:
            return name == "object"


def _target(root: object, reference: str) -> object:
    """Return the part of the schema that a reference such as `#/$defs/a` names, or None."""
    if not (reference == "#" or reference.startswith("#/")):
        return None
    node = root
    for step in reference.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping):
            node = node.get(name)
        elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        else:
            return None
    return node
