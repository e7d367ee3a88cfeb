"""What a JSON schema says that restricts no value, or says in another way than llguidance takes it:
what JavaScript and PHP libraries and older drafts write."""

import re

FORMATS = (
    *("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
    "unknown",  # llguidance's name of any other
)
"""The formats that are enforced."""

_DRAFT = r"https?://json-schema\.org/(draft-0[467]|draft/20(19-09|20-12))/schema#?"
_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords with schemas by name."""
_OF_ARRAYS = (*_OF_SCHEMAS, "additionalProperties")
"""Keywords with an object, which PHP writes as [] where it is empty."""
_FOREIGN = re.compile(
    r'"discriminator":|"uniqueItems":false|"required":false|"not":|"propertyNames":|"unevaluated'
    rf'|"\$schema":(?!"{_DRAFT}")|"format":"(?!({"|".join(FORMATS)})")'
    rf'|"(?:{"|".join(map(re.escape, _OF_ARRAYS))})":\[\]|"(?!default"|const")[^"\\]*+":null'
)
_DATA = ("enum", "const", "default", "examples")


def may_have_annotations(text: str) -> bool:
    """Return whether a schema, as JSON without blanks, may have what `without_annotations`
    removes."""
    return _FOREIGN.search(text) is not None


def without_annotations(schema: dict[str, object]) -> dict[str, object]:
    """Return a schema with the same instances: without formats that are not enforced (JSON Schema
    has formats ignored that are not known), `discriminator` of OpenAPI, names of dialects that are
    no draft, and keywords that restrict nothing, such as `uniqueItems: false`; with false for
    `{"not": {}}`. A keyword with the value null counts as absent, an array for an object of schemas
    as empty. The order of the keywords stays."""
    result: dict[str, object] = {}
    for keyword, value in schema.items():
        if keyword in _DATA and (value is not None or keyword in ("const", "default")):
            result[keyword] = value
        elif value is None:
            continue
        elif keyword in _OF_SCHEMAS and isinstance(value, dict):
            # As in `cluster.harmony.tools`, null is a schema of anything.
            result[keyword] = {
                name: True if inner is None else _without_annotations(inner) for name, inner in value.items()
            }
        elif keyword in _OF_ARRAYS and value == []:
            result[keyword] = {}
        elif not _is_annotation(keyword, value):
            result[keyword] = _without_annotations(value)
    return result


def _without_annotations(value: object) -> object:
    if isinstance(value, list):
        return [_without_annotations(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return False if _allows_all(value.get("not")) else without_annotations(value)


def _allows_all(schema: object) -> bool:
    return schema is True or schema == {}


def _is_annotation(keyword: str, value: object) -> bool:
    match keyword:
        case "format":
            return isinstance(value, str) and value not in FORMATS
        case "$schema":
            return not isinstance(value, str) or not re.fullmatch(_DRAFT, value)
        case "uniqueItems" | "required":
            return value is False
        case "propertyNames":
            return _allows_all(value) or value == {"type": "string"}
        case "unevaluatedProperties" | "unevaluatedItems":
            return _allows_all(value)
    return keyword == "discriminator"
