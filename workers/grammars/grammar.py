"""Grammars of bodies: a JSON schema, a regular expression, a list of texts or a Lark grammar, as
llguidance reads them.

The makers check only the form of what a client sent. Whether a grammar compiles is for
`cluster.grammars.check`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import orjson

from workers.errors import InvalidRequest
from workers.grammars.annotations import may_have_annotations, without_annotations
from workers.grammars.reduced import reduced

MAX_GRAMMAR_BYTES = 2**20
"""Maximum length of a grammar's text in bytes."""
MAX_CHOICES = 20_000
"""Maximum number of texts to choose from."""

_WHITESPACE = r"\x20|\r?\n[\x20\t]{0,64}"
"""What may stand between two tokens of a JSON text: one space, or a line break with an indent. A
model that could write any whitespace there may write nothing else."""
_JSON_OPTIONS = {
    "whitespace_pattern": _WHITESPACE,
    "json_allow_general_unicode_escapes": True,
    "coerce_one_of": True,
}
_MAX_CACHED_CHARS = 2**14
_OPTIONS_KEY = "x-guidance"
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar of a body.

    Attributes:
        text: in llguidance's JSON form.
    """

    text: str


def json_object() -> Grammar:
    """Return the grammar of any JSON object."""
    return _of_schema({"type": "object"})


def json_schema(schema: object, param: str) -> Grammar:
    """Return the grammar of JSON texts that are valid against a schema. Objects have the declared
    properties in the order in which the schema names them.

    Args:
        schema: a decoded JSON text.
        param: path of the schema in the request.
    Raises:
        InvalidRequest: it is no schema, cannot be written as JSON, or is too long.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, dict) and schema is not False:
        raise InvalidRequest(f"{param} must be a JSON schema: an object, true or false.", param)
    try:
        grammar = _of_schema(schema)
        if schema and may_have_annotations(grammar.text):
            grammar = _of_schema(without_annotations(schema))
        return grammar
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{param} cannot be written as JSON: {error}.", param) from None
    except _TooLong as error:
        raise InvalidRequest(f"{param} {error}", param) from None


def schema_types(schema: object) -> Grammar:
    """Return the grammar of objects whose parts have the types and enums of a schema, in any order.
    No property is required, and further ones are allowed; keywords beside `type`, `properties`,
    `items`, `enum` and references inside the schema do not count."""
    try:
        text = orjson.dumps(schema)
        return _types(text) if len(text) <= _MAX_CACHED_CHARS else _of_schema(reduced(schema))
    except (TypeError, ValueError, _TooLong):
        return json_object()


@lru_cache(maxsize=512)
def _types(text: bytes) -> Grammar:
    """Return `schema_types` of a schema as JSON: the same tools come with every request."""
    return _of_schema(reduced(orjson.loads(text)))


def regex(pattern: object, param: str) -> Grammar:
    """Return the grammar of the texts that a regular expression matches as a whole.

    Args:
        pattern: in the syntax of Rust's `regex`: no look-around and no back-references.
        param: its path in the request.
    Raises:
        InvalidRequest: it is no text, or too long.
    """
    pattern = _checked_text(pattern, param)
    return _of_lark(f"start: /{_in_slashes(pattern)}/", param)


def choice(options: object, param: str) -> Grammar:
    """Return the grammar of the texts in a list.

    Args:
        options: distinct texts.
        param: path of the list in the request.
    Raises:
        InvalidRequest: they are no texts, none, or too many.
    """
    if not isinstance(options, Sequence) or isinstance(options, str) or not options:
        raise InvalidRequest(f"{param} must be a list of one or more texts.", param)
    if len(options) > MAX_CHOICES:
        raise InvalidRequest(f"{param} must have at most {MAX_CHOICES} texts, not {len(options)}.", param)
    texts = [_checked_text(option, f"{param}[{index}]") for index, option in enumerate(options)]
    if texts == [""]:
        raise InvalidRequest(f"{param} must have a text that is not empty.", param)
    # One terminal: alternatives of a rule are items of the parser, which are few. A string of
    # Lark is one of JSON, but without U+007F.
    alternatives = "|".join(orjson.dumps(text).decode() for text in dict.fromkeys(texts))
    alternatives = alternatives.replace("\x7f", r"\u007f")
    return _of_lark(f"start: CHOICE\nCHOICE: {alternatives}", param)


def lark(text: object, param: str) -> Grammar:
    """Return a grammar in llguidance's variant of Lark, whose first rule is called `start`.

    Args:
        param: its path in the request.
    Raises:
        InvalidRequest: it is no text, too long, or names tokens of the vocabulary.
    """
    text = _checked_text(text, param)
    if found := _UNSUPPORTED_PART.match(text):
        part, reason = found[str(found.lastgroup)], _UNSUPPORTED[str(found.lastgroup)]
        raise InvalidRequest(f"{param} has {part!r}: {reason}", param)
    return _of_lark(text, param)


def is_gbnf(text: str) -> bool:
    """Return whether a text is written in GBNF and not in Lark, which has no `::=`."""
    return _GBNF_RULE.search(text) is not None


def may_have_gbnf(data: bytes) -> bool:
    """Return whether a text in JSON may be or have GBNF. A short one, too, can take a tenth of a
    second to convert."""
    return b"::=" in data or b"\\u003" in data  # escaped: `:` is \u003a, `=` is \u003d


def lark_or_gbnf(text: object, param: str) -> Grammar:
    """Return `lark` of a grammar, or of one in llama.cpp's form whose first rule is called `root`.

    Raises:
        InvalidRequest: as `lark`, or it is no GBNF.
    """
    text = _checked_text(text, param)
    if not is_gbnf(text):
        return lark(text, param)
    # Imports llguidance, which no other request needs here.
    from workers.grammars.gbnf import gbnf_to_lark

    try:
        return _of_lark(gbnf_to_lark(text), param)
    except ValueError as error:
        raise InvalidRequest(f"{param} {error}.", param) from None


_OPTION = r"\b(?:max_tokens|temperature|stop|stop_capture)(?=\s*+=)"
# A grammar up to the first part that is not supported, divided as llguidance's lexer does. No part
# gives back what it has read, even if its end is missing (which llguidance refuses): the time is in
# proportion to the text.
_UNSUPPORTED_PART = re.compile(
    rf"""
    (?: "[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"?      # a string
      | //[^\n]*+ | \#[^\n]*+                # a comment
      | /[^/\\]*+(?:\\.[^/\\]*+)*+/?          # a regular expression, of one or more lines
      | [^"/\#<mst]++
      | (?!{_OPTION})[mst]
    )*+
    (?: (?P<token><[^<>\s]{{0,64}}>?) | (?P<option>{_OPTION}) )
    """,
    re.VERBOSE,
)
_UNSUPPORTED = {
    "token": "special tokens cannot be part of a grammar.",
    "option": "this option is not supported; `suffix` and `lazy` are.",
}


class _TooLong(Exception):
    """A grammar is longer than MAX_GRAMMAR_BYTES; the message is the rest of a sentence."""


def _of_schema(schema: dict[str, object] | Literal[False]) -> Grammar:
    if schema is False:
        return _of_document({"json_schema": False})
    options = {_OPTIONS_KEY: _JSON_OPTIONS}
    return _of_document({"json_schema": {**options, **schema, **options}})


def _of_lark(text: str, param: str) -> Grammar:
    try:
        return _of_document({"lark_grammar": text})
    except _TooLong as error:
        raise InvalidRequest(f"{param} {error}", param) from None


def _of_document(grammar: dict[str, object]) -> Grammar:
    """Raises TypeError for what is no JSON."""
    text = orjson.dumps({"grammars": [grammar]})
    if len(text) > MAX_GRAMMAR_BYTES:
        raise _TooLong(f"has {len(text)} bytes as JSON; the maximum is {MAX_GRAMMAR_BYTES}.")
    return Grammar(text.decode())


def _checked_text(text: object, param: str) -> str:
    if not isinstance(text, str):
        raise InvalidRequest(f"{param} must be a text.", param)
    if len(text) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(
            f"{param} has {len(text)} characters; the maximum is {MAX_GRAMMAR_BYTES} bytes as JSON.", param
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(f"{param} must be Unicode text without lone surrogates.", param) from None
    return text


def _in_slashes(pattern: str) -> str:
    """Return a regular expression, without lone surrogates, as it stands between slashes in
    Lark."""
    pattern = pattern.replace("\\\\", "\ud800")  # a backslash that escapes the next one is no other's
    pattern = pattern.replace("\\/", "/").replace("\\\n", "\n")
    return pattern.replace("/", "\\/").replace("\n", "\\n").replace("\ud800", "\\\\")
