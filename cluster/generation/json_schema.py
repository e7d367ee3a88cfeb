"""Check of a tool's JSON schema against draft 2020-12: the metaschema's conditions on each keyword.

One pass over the schema. The reference validator for Python takes a second for 90 kB of schema, and
raises on patterns that `re` cannot compile, so it serves as the tests' oracle only.
"""

import re
import warnings
from collections.abc import Callable, Mapping

MAX_DEPTH = 64
"""Maximum nesting depth of objects and arrays."""
MAX_PATTERN_CHARS = 65_536
"""Maximum number of characters of all regular expressions in a request's tools; compiling takes 4
to 20 µs each."""

_PURGE_FROM_CHARS = 256
_MAX_SHOWN_CHARS = 200
_SIMPLE_TYPES = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
_ANCHOR = re.compile(r"[A-Za-z_][-A-Za-z0-9._]*")

# ECMA-262's syntax where Python's differs.
_ECMA = re.compile(
    r"\[\^?(?P<set>(?:\\.|[^\]\\])*+)(?P<set_end>\]?)"
    r"|\\(?P<escaped>k<[^<>]*>|[pP]\{[^{}]*\}|u\{[0-9A-Fa-f]+\}|u[0-9A-Fa-f]{4}|x[0-9A-Fa-f]{2}|c[A-Za-z]|.)"
    r"|\(\?<(?P<behind>[=!])|(?P<group>\(\?<[^<>]*>)",
    re.DOTALL,
)
_SET_ESCAPES = re.compile(r"\\(?:[pP]\{[^{}]*\}|[dDsSwW])")
_PYTHON_ESCAPES = frozenset("bBdDsSwW")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")

# Of patterns that clients wrote: nothing for the server's log.
warnings.filterwarnings("ignore", "Possible (nested set|set )", FutureWarning)

_Path = tuple["_Path", object] | None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value >= 0 and float.is_integer(value) if isinstance(value, float) else value >= 0


def _is_strings(value: object) -> bool:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        return False
    return len(set(value)) == len(value)


def _is_type(value: object) -> bool:
    if isinstance(value, str):
        return value in _SIMPLE_TYPES
    return isinstance(value, list) and bool(value) and _is_strings(value) and _SIMPLE_TYPES.issuperset(value)


def _is_anchor(value: object) -> bool:
    return isinstance(value, str) and _ANCHOR.fullmatch(value) is not None


_TEXT = ("a string", lambda value: isinstance(value, str))
_NUMBER = ("a number", _is_number)
_COUNT = ("an integer of at least 0", _is_count)
_FLAG = ("true or false", lambda value: isinstance(value, bool))
_LIST = ("an array", lambda value: isinstance(value, list))
_STRINGS = ("an array of different strings", _is_strings)
_ANCHOR_NAME = ("a name", _is_anchor)

_VALUES: dict[str, tuple[str, Callable[[object], bool]]] = {
    **dict.fromkeys(("$ref", "$dynamicRef", "$recursiveRef", "$schema", "$comment"), _TEXT),
    **dict.fromkeys(
        ("title", "description", "format", "contentEncoding", "contentMediaType", "pattern"), _TEXT
    ),
    **dict.fromkeys(("$anchor", "$dynamicAnchor", "$recursiveAnchor"), _ANCHOR_NAME),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum"), _NUMBER),
    **dict.fromkeys(("maxLength", "minLength", "maxItems", "minItems", "maxContains", "minContains"), _COUNT),
    **dict.fromkeys(("maxProperties", "minProperties"), _COUNT),
    **dict.fromkeys(("uniqueItems", "deprecated", "readOnly", "writeOnly"), _FLAG),
    **dict.fromkeys(("enum", "examples"), _LIST),
    "$id": (
        "a URI reference without a fragment",
        lambda value: isinstance(value, str) and "#" not in value.removesuffix("#"),
    ),
    "$vocabulary": (
        "an object of true or false",
        lambda value: isinstance(value, Mapping) and all(isinstance(flag, bool) for flag in value.values()),
    ),
    "type": ("the name of a JSON type, or an array of different ones", _is_type),
    "required": _STRINGS,
    "dependentRequired": (
        "an object of arrays of different strings",
        lambda value: isinstance(value, Mapping) and all(map(_is_strings, value.values())),
    ),
    "multipleOf": ("a number above 0", lambda value: _is_number(value) and value > 0),  # type: ignore[operator]
}
_SCHEMA = frozenset(
    (
        *("items", "contains", "additionalProperties", "propertyNames", "if", "then", "else", "not"),
        *("unevaluatedItems", "unevaluatedProperties", "contentSchema"),
    )
)
_SCHEMAS = frozenset(("prefixItems", "allOf", "anyOf", "oneOf"))
_NAMED_SCHEMAS = frozenset(
    (
        *("$defs", "definitions", "properties"),
        *("patternProperties", "dependentSchemas", "dependencies"),
    )
)


class SchemaCheck:
    """The check of one request's schemas, which share a bound on their regular expressions."""

    def __init__(self) -> None:
        self._pattern_chars_left = MAX_PATTERN_CHARS

    def problem(self, schema: Mapping[str, object]) -> str | None:
        """Return what is wrong with the schema of a function's arguments, or None.

        Returns:
            The rest of a sentence that begins with the schema's name. Takes time in proportion to
            the schema and never raises.
        """
        if _deeper_than(schema, MAX_DEPTH):
            return f"is nested deeper than {MAX_DEPTH} levels"
        if schema.get("type", "object") != "object":
            return "must describe an object: set type to 'object'"
        found = self._broken_keyword(schema)
        if found is None:
            return None
        path, reason = found
        return f"is not a JSON schema: {_shown(path) if path else 'it'} {reason}"

    def _broken_keyword(self, root: object) -> tuple[_Path, str] | None:
        pending: list[tuple[_Path, object]] = [(None, root)]
        while pending:
            path, schema = pending.pop()
            if isinstance(schema, bool):
                continue
            if not isinstance(schema, Mapping):
                return path, "must be a schema: an object, true or false"
            for keyword, value in schema.items():
                here = (path, keyword)
                wanted = _VALUES.get(keyword)
                if wanted is not None and not wanted[1](value):
                    return here, f"must be {wanted[0]}"
                if keyword == "pattern":
                    problem = self._pattern_problem(value)
                    if problem:
                        return here, problem
                elif keyword in _SCHEMA:
                    pending.append((here, value))
                elif keyword in _SCHEMAS:
                    if not isinstance(value, list) or not value:
                        return here, "must be an array of at least one schema"
                    pending += [((here, index), entry) for index, entry in enumerate(value)]
                elif keyword in _NAMED_SCHEMAS:
                    if not isinstance(value, Mapping):
                        return here, "must be an object of schemas"
                    for name, entry in value.items():
                        problem = self._pattern_problem(name) if keyword == "patternProperties" else None
                        if problem:
                            return here, f"has a name that {problem}"
                        if keyword != "dependencies" or not _is_strings(entry):
                            pending.append(((here, name), entry))
        return None

    def _pattern_problem(self, pattern: str) -> str | None:
        self._pattern_chars_left -= len(pattern)
        if self._pattern_chars_left < 0:
            limit = f"{MAX_PATTERN_CHARS} characters"
            return f"has more than {limit}, together with the regular expressions before it"
        try:
            # Sets of other characters take Python 13 ms each.
            re.compile(_ECMA.sub(_in_python, _NOT_ASCII.sub("a", pattern)))
        except (re.error, OverflowError, RecursionError, MemoryError, ValueError):
            return "is not a regular expression, or one too large for this server"
        finally:
            if len(pattern) > _PURGE_FROM_CHARS:
                re.purge()  # it keeps the last 512, however large
        return None


def _in_python(match: re.Match[str]) -> str:
    """Return a piece of ECMA-262 syntax as one of the same shape in Python's.

    Patterns are compiled to find errors, and never searched for.
    """
    if match["set"] is not None:
        return f"[{_set_in_python(match['set'])}{match['set_end']}"
    if match["behind"] is not None:
        return f"(?{match['behind']}"  # ahead: Python's look-behind must have a fixed width
    if match["group"] is not None:
        return "("
    return _escape_in_python(match["escaped"])


def _escape_in_python(escaped: str) -> str:
    if len(escaped) == 1 and (escaped in _PYTHON_ESCAPES or not escaped.isalnum()):
        return f"\\{escaped}"
    return "a"


def _set_in_python(members: str) -> str:
    """Return a set's members for Python: each `[` escaped, and without classes such as `\\d`.

    A class cannot be the end of a range in Python; in ECMA-262 the hyphen beside it is a character.
    """
    text = _SET_ESCAPES.sub("", members).replace("[", r"\[")

    def escape(match: re.Match[str]) -> str:
        return match[0] if match["escaped"] is None else _escape_in_python(match["escaped"])

    return _ECMA.sub(escape, text).removeprefix("^") or "a"


def _shown(path: _Path) -> str:
    """Return a schema's path such as `properties.a.oneOf[2]`; only its end where it is long."""
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
