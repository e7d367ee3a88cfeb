"""The form of a text under vLLM's names: exactly one of a schema, a regular expression, a list of
texts, a Lark or GBNF grammar, or any JSON object."""

from collections.abc import Mapping

import orjson

from workers.errors import InvalidRequest
from workers.grammars import grammar as grammars
from workers.grammars.grammar import Grammar

KINDS = ("json", "regex", "choice", "grammar", "json_object")
"""The fields of `structured_outputs` of which a request has one."""


def only_kind(values: Mapping[str, object], param: str) -> str:
    """Return the kind that is asked for.

    Args:
        values: by kind; None for what is not asked for.
        param: the field that has them.
    Raises:
        InvalidRequest: there is not exactly one.
    """
    given = [kind for kind, value in values.items() if value is not None]
    if len(given) != 1:
        found = f"has {' and '.join(given)}" if given else "has none"
        raise InvalidRequest(f"{param} must have exactly one of {', '.join(KINDS)}, but {found}.", param)
    return given[0]


def grammar_of(kind: str, value: object, param: str) -> Grammar:
    """Return the grammar of the texts of a form.

    Args:
        kind: one of KINDS.
        value: not None; for `json` a schema or its text.
        param: the field as the client's API names it.
    Raises:
        InvalidRequest: with `param`.
    """
    match kind:
        case "json":
            return grammars.json_schema(parsed(value, param) if isinstance(value, str) else value, param)
        case "regex":
            return grammars.regex(value, param)
        case "choice":
            return grammars.choice(value, param)
        case "grammar":
            return grammars.lark_or_gbnf(value, param)
        case _:
            return grammars.json_object()


def parsed(text: str, param: str) -> object:
    """Return the value of a JSON text.

    Raises:
        InvalidRequest: with `param`.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"{param} is a text that is not JSON: {error}.", param) from None
