"""The schemas inside a JSON schema, each with its place, and documents that hold some of them."""

import json
from collections.abc import Iterator

Place = tuple[str | int, ...]
"""The keys and indices that lead to a part of a schema."""

_OF_NAMES = ("properties", "patternProperties")
_ONE = ("items", "additionalProperties")
_SEVERAL = ("anyOf", "oneOf", "allOf", "prefixItems")
_WHOLE = "whole"


class Subschemas:
    """The parts of one schema.

    Args:
        schema: what an llguidance grammar has as `json_schema`.
    """

    def __init__(self, schema: dict[str, object]) -> None:
        self._schema = schema
        kept = {key: value for key, value in schema.items() if key in ("$schema", "x-guidance")}
        whole = {key: value for key, value in schema.items() if key not in (*kept, "$id", "id")}
        self._head = json.dumps(kept)[1:-1]
        self._whole = json.dumps({"$defs": {_WHOLE: _moved(whole)}})[1:-1]

    def document(self, schemas: list[object]) -> str:
        """Return the grammar of the values that one of these parts allows."""
        parts = [_moved(schema) for schema in schemas]
        text = json.dumps(parts[0] if len(parts) == 1 and _is_plain(parts[0]) else {"anyOf": parts})[1:-1]
        members = (self._head, self._whole if '"$ref"' in text else "", text)
        return f'{{"grammars": [{{"json_schema": {{{", ".join(filter(None, members))}}}}}]}}'

    def original(self, message: str | None) -> str | None:
        """Return an error about such a document as it would be about the schema."""
        return None if message is None else message.replace(f"/$defs/{_WHOLE}", "")

    def within(self, schema: object, place: Place) -> Iterator[tuple[Place, object]]:
        """Yield the schemas that stand directly in one, and what it refers to."""
        if not isinstance(schema, dict):
            return
        for keyword, value in schema.items():
            if keyword in _OF_NAMES and isinstance(value, dict):
                yield from (((*place, keyword, name), inner) for name, inner in value.items())
            elif keyword in _SEVERAL and isinstance(value, list):
                yield from (((*place, keyword, index), inner) for index, inner in enumerate(value))
            elif keyword in _ONE and isinstance(value, dict):
                yield (*place, keyword), value
            elif keyword == "$ref" and (found := self._target(value)) is not None:
                yield found

    def alone(self, schema: object) -> object:
        """Return a schema without those in it."""
        if not isinstance(schema, dict):
            return schema
        inner = {*_OF_NAMES, *_ONE, *_SEVERAL, "$ref"}
        return {keyword: value for keyword, value in schema.items() if keyword not in inner}

    def _target(self, reference: object) -> tuple[Place, object] | None:
        """Return what a reference such as `#/$defs/a` names."""
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return None
        place: list[str | int] = []
        node: object = self._schema
        for step in reference.split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and name in node:
                node = node[name]
                place.append(name)
            elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
                node = node[int(name)]
                place.append(int(name))
            else:
                return None
        return tuple(place), node


def _is_plain(schema: object) -> bool:
    """Return whether a schema can be the document's own."""
    return isinstance(schema, dict) and "$defs" not in schema


def _moved(schema: object) -> object:
    """Return a copy whose references lead into the whole schema where a document has it."""
    if isinstance(schema, list):
        return [_moved(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: f"#/$defs/{_WHOLE}{value[1:]}"
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value)
        for key, value in schema.items()
    }
