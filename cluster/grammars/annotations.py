"""What a JSON schema says that restricts no value, and that llguidance refuses or stumbles over."""

import re

FORMATS = (
    *("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
    "unknown",  # llguidance's name of any other
)
"""The formats that are enforced."""

_DRAFT = r"https?://json-schema\.org/(draft-0[467]|draft/20(19-09|20-12))/schema#?"
_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords with schemas by name."""
_FOREIGN = re.compile(
    r'"discriminator":|"uniqueItems":false'
    rf'|"\$schema":(?!"{_DRAFT}")|"format":"(?!({"|".join(FORMATS)})")'
)
_DATA = ("enum", "const", "default", "examples")


def may_have_annotations(text: str) -> bool:
    """Return whether a schema, as JSON without blanks, may have what `without_annotations`
    removes."""
    return _FOREIGN.search(text) is not None


def without_annotations(schema: dict[str, object]) -> dict[str, object]:
    """Return a schema without formats that are not enforced (JSON Schema has formats ignored that
    are not known), `uniqueItems: false`, `discriminator` of OpenAPI, and names of dialects that are
    no draft. The order of its keywords stays."""
    result: dict[str, object] = {}
    for keyword, value in schema.items():
        if keyword in _OF_SCHEMAS and isinstance(value, dict):
            result[keyword] = {name: _without_annotations(inner) for name, inner in value.items()}
        elif keyword in _DATA:
            result[keyword] = value
        elif not _is_annotation(keyword, value):
            result[keyword] = _without_annotations(value)
    return result


def _without_annotations(value: object) -> object:
    if isinstance(value, list):
        return [_without_annotations(entry) for entry in value]
    return without_annotations(value) if isinstance(value, dict) else value


def _is_annotation(keyword: str, value: object) -> bool:
    match keyword:
        case "format":
            return isinstance(value, str) and value not in FORMATS
        case "uniqueItems":
            return value is False
        case "$schema":
            return not isinstance(value, str) or not re.fullmatch(_DRAFT, value)
    return keyword == "discriminator"
