"""JSON Schema's own test suite (draft 2020-12), and the table in docs/structured-output.md: what is
enforced lets no invalid instance through, what is approximated does, and the rest is refused."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.grammars.compiling import Compiler
from tests.support.grammar_texts import Texts
from workers.errors import InvalidRequest
from workers.grammars.annotations import FORMATS
from workers.grammars.grammar import Grammar, json_schema

ROOT = Path(__file__).parents[3]
SUITE = ROOT / "tests/golden/json_schema_suite"

STRICTER = {
    "allOf": 2,  # the instance has another order than the schema
    "const": 5,  # 0.0 for 0; another order of an object
    "enum": 4,
    "ref": 2,  # another order
    "type": 1,  # 1.0 as an integer
    "format/email": 4,  # quoted local parts, addresses as domains
    "format/ipv6": 4,  # with the last part as an IPv4 address
}
"""Number of valid instances of each file that are not allowed."""
LOOSER = {
    "oneOf": 8,  # valid against several
    "format/date": 2,  # 29 February
    "format/date-time": 2,  # leap seconds at any time
    "format/time": 10,
}
"""Number of invalid instances of each file that are allowed."""
REFUSED = {
    "additionalProperties": 2,  # `propertyNames`, `dependentSchemas`
    "allOf": 2,  # no instance is valid
    "anyOf": 1,
    "boolean_schema": 1,  # false
    "maxItems": 1,  # 2.0
    "maxLength": 1,
    "maxProperties": 1,
    "minItems": 1,
    "minLength": 1,
    "minProperties": 1,
    "multipleOf": 1,
    "oneOf": 1,
    "patternProperties": 3,  # patterns overlap
    "ref": 6,  # a remote one, and keywords that are refused
}
"""Number of schemas of each file that are refused."""

SCHEMAS_OF_REFUSED = {
    "not": {"type": "null"},
    "uniqueItems": True,
    "propertyNames": {"maxLength": 3},
    "unevaluatedItems": False,
    "unevaluatedProperties": False,
    "minContains": 2,
    "$dynamicRef": "#",
    "$recursiveRef": "#",
    "$dynamicAnchor": "a",
}
"""Values of keywords that are refused; `{}` for the others."""


@dataclass
class Counts:
    refused: int = 0
    looser: int = 0
    stricter: int = 0


def texts(grammar: Grammar) -> Texts | None:
    return None if Compiler().verdict(grammar.text).reason else Texts(grammar)


def counted(file: Path) -> Counts:
    counts = Counts()
    for group in json.loads(file.read_text()):
        try:
            allowed = texts(json_schema(group["schema"], "schema"))
        except InvalidRequest:
            allowed = None
        if allowed is None:
            counts.refused += 1
            continue
        for test in group["tests"]:
            text = json.dumps(test["data"], ensure_ascii=False)
            counts.looser += text in allowed and not test["valid"]
            counts.stricter += text not in allowed and test["valid"]
    return counts


def files() -> list[str]:
    return sorted(file.relative_to(SUITE).with_suffix("").as_posix() for file in SUITE.rglob("*.json"))


@pytest.mark.parametrize("name", files())
def test_json_schema_suite(name: str) -> None:
    counts = counted(SUITE / f"{name}.json")
    assert counts == Counts(REFUSED.get(name, 0), LOOSER.get(name, 0), STRICTER.get(name, 0))


def table() -> Iterator[tuple[list[str], str]]:
    """Yield the keywords of a row of the documented table, and what they are."""
    for line in (ROOT / "docs/structured-output.md").read_text().splitlines():
        if found := re.match(r"\| (`[^|]*) \| (enforced|approximated|refused) \|", line):
            yield re.findall(r"`([^`]+)`", found[1]), found[2]


def test_the_table_says_what_the_suite_shows() -> None:
    kinds = {keyword: kind for keywords, kind in table() for keyword in keywords}
    for name in files():
        keyword = "format" if name.startswith("format/") else name
        if keyword in ("boolean_schema", "infinite-loop-detection", "default"):
            continue
        kind = kinds.pop(keyword, None) or ("approximated" if keyword == "format" else kinds["$" + keyword])
        assert kind == ("approximated" if name in LOOSER or keyword == "format" else "enforced"), name
    assert kinds.keys() - {"$ref", "$anchor", "$defs", "definitions"} == {
        keyword for keyword, kind in kinds.items() if kind == "refused"
    }


@pytest.mark.parametrize(
    "keyword", [keyword for keywords, kind in table() if kind == "refused" for keyword in keywords]
)
def test_what_the_table_calls_refused_is_refused_with_its_name(keyword: str) -> None:
    schema = {"properties": {"a": {keyword: SCHEMAS_OF_REFUSED.get(keyword, {})}}}
    verdict = Compiler().verdict(json_schema(schema, "schema").text)
    assert verdict.place == f".properties.a.{keyword}"


def examples() -> list[dict[str, object]]:
    """Return the schemas that the table has as examples."""
    lines = (ROOT / "docs/structured-output.md").read_text().splitlines()
    return [
        json.loads(text) for line in lines if "| refused |" in line for text in re.findall(r"`({.*?})`", line)
    ]


def test_the_table_has_an_example_of_each_exception() -> None:
    assert {name for schema in examples() for name in schema} == {
        *("uniqueItems", "propertyNames", "unevaluatedItems", "unevaluatedProperties", "not")
    }


@pytest.mark.parametrize("schema", examples(), ids=json.dumps)
def test_what_the_table_calls_an_exception_is_taken(schema: dict[str, object]) -> None:
    allowed = texts(json_schema({"properties": {"a": schema}}, "schema"))
    assert allowed is not None
    assert ('{"a": 1}' in allowed) == ("not" not in schema)


def test_items_of_older_drafts_are_enforced() -> None:
    allowed = Texts(json_schema({"items": [{"type": "string"}], "additionalItems": False}, "schema"))
    assert '["a"]' in allowed
    assert '["a", 1]' not in allowed
    assert "[1]" not in allowed


def test_the_table_names_the_formats_that_are_enforced() -> None:
    (line,) = [
        line
        for line in (ROOT / "docs/structured-output.md").read_text().splitlines()
        if line.startswith("| `format` |")
    ]
    assert set(re.findall(r"`([^`]+)`", line)) - {"format"} == set(FORMATS) - {"unknown"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "password"},
        {"type": "string", "format": "uri-reference"},
        {"type": "array", "uniqueItems": False},
        {"$schema": "https://example.com/my-dialect"},
        {"properties": {"a": {"discriminator": {}, "anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
        {"propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}},
        {"propertyNames": {}},
        {"propertyNames": True},
        {"unevaluatedProperties": True, "properties": {"a": {"unevaluatedItems": {}}}},
        {"properties": {"a": {"type": "integer", "required": False}}},
        {"required": None, "enum": None, "type": None, "title": None, "items": None, "minItems": None},
        {"properties": {"a": None, "b": {"pattern": None, "anyOf": None, "additionalProperties": None}}},
        {"properties": [], "patternProperties": [], "$defs": [], "additionalProperties": []},
    ],
)  # fmt: skip
def test_annotations_do_not_count(schema: object) -> None:
    allowed = texts(json_schema(schema, "schema"))
    assert allowed is not None
    assert any(text in allowed for text in ("{}", "[]", '""'))


def test_a_schema_of_nothing_is_enforced() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"not": {}}},
        "additionalProperties": {"description": "none", "not": True},
    }
    allowed = Texts(json_schema(schema, "schema"))
    assert '{"a": 1}' in allowed
    assert '{"b": 1}' not in allowed
    assert '{"c": 1}' not in allowed


def test_null_is_data_where_it_is_a_value() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"const": None}, "b": {"enum": [None, {"enum": None}]}, "c": {"minimum": None}},
        "propertyNames": {},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    allowed = Texts(json_schema(schema, "schema"))
    assert '{"a": null, "b": {"enum": null}, "c": 1}' in allowed
    assert '{"a": 1, "b": null}' not in allowed
    assert '{"a": null, "b": {}}' not in allowed


def test_what_looks_like_an_annotation_but_is_data_stays() -> None:
    schema = {
        "properties": {
            "discriminator": {"type": "integer"},
            "format": {"const": {"format": "x", "$schema": 1}},
        }
    }
    allowed = Texts(json_schema({"type": "object", **schema}, "schema"))
    assert '{"discriminator": 1, "format": {"format": "x", "$schema": 1}}' in allowed
    assert '{"discriminator": "x"}' not in allowed
    assert '{"format": {}}' not in allowed
