"""A schema reduced to types: whatever it allows, the reduced one allows too."""

import json

import pytest

from tests.support.grammar_texts import Texts
from workers.constraint.parser_limits import parser_limits
from workers.grammars.grammar import json_object, schema_types
from workers.grammars.reduced import reduced

TREE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "pattern": "^x"},
        "a.b": {"type": ["integer", "null"]},
        "unit": {"type": "string", "enum": ["C", "F"]},
        'q"/\\é\n': {"type": "boolean"},
        "limit": {"type": "number", "nullable": True},
        "children": {"type": "array", "items": {"$ref": "#/$defs/Tree"}},
    },
    "required": ["name", "unit"],
    "additionalProperties": False,
    "$defs": {"Tree": {"type": "object", "properties": {"up": {"$ref": "#"}, "size": {"type": "integer"}}}},
}


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"name": ""},
        {"unit": "F", "name": "a"},
        {"a.b": None, "more": [1, {"x": 2}]},
        {"limit": None},
        {"limit": 1.5},
        {'q"/\\é\n': True},
        {"children": [{"size": 1, "up": {"children": [{"size": 2}]}}, {}]},
    ],
)
def test_types_are_kept_in_any_order(value: object) -> None:
    assert json.dumps(value, ensure_ascii=False) in Texts(schema_types(TREE))


@pytest.mark.parametrize(
    "value",
    [
        {"name": 1},
        {"a.b": "x"},
        {"unit": "K"},
        {'q"/\\é\n': 0},
        {"limit": "1"},
        {"children": [1]},
        {"children": [{"size": "1"}]},
        {"children": [{"up": {"children": [{"size": "1"}]}}]},
        [],
    ],
)
def test_other_types_are_not_allowed(value: object) -> None:
    assert json.dumps(value, ensure_ascii=False) not in Texts(schema_types(TREE))


@pytest.mark.parametrize(
    "schema",
    [
        None,
        True,
        False,
        {},
        [],
        {"type": "string"},
        {"type": "OBJECT"},
        {"$ref": "#"},
        {"$ref": "#/$defs/none"},
        {"$ref": "https://example.com/schema.json"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"anyOf": [{"type": "object"}], "properties": []},
        {"type": "object", "properties": {"value": {"type": "any"}}},
        {"type": "object", "properties": {"value": {"type": ["string", "file"]}}},
        {"type": "object", "properties": {"value": {"enum": [{"a": 1}, 1.5]}}},
        {"type": "object", "properties": {"value": {"type": "array", "items": [{"type": "string"}]}}},
        {
            "type": "object",
            "properties": {
                "value": {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "string"}}
            },
        },
        {"type": "object", "properties": {"value": {"$ref": "#/properties/value"}}},
        {"type": "object", "properties": {"value": {"$ref": 3}}},
        {"type": "object", "properties": {"value": False}},
        {"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(2000)}},
    ],
)
def test_what_has_no_types_to_keep_allows_any_object(schema: object) -> None:
    texts = Texts(schema_types(schema))
    assert '{"value": [1, "a"], "p1": 1}' in texts
    assert "[]" not in texts


def test_what_is_kept_is_bounded() -> None:
    deep: dict[str, object] = {"type": "integer"}
    for _ in range(3000):
        deep = {"type": "object", "properties": {"a": deep}}
    assert len(schema_types(deep).text) < 10_000
    values = [f"value {number}" for number in range(20_000)]
    assert '{"a": "none of them"}' in Texts(schema_types({"properties": {"a": {"enum": values}}}))
    # Each definition is written once, however often it is referred to.
    definitions: dict[str, object] = {
        f"d{level}": {"properties": {name: {"$ref": f"#/$defs/d{level + 1}"} for name in "abcd"}}
        for level in range(30)
    }
    wide = schema_types({"$ref": "#/$defs/d0", "$defs": {**definitions, "d30": {"type": "integer"}}})
    assert len(wide.text) < 10_000
    assert wide != json_object()


def of_enum(num_values: int) -> tuple[object, list[str]]:
    values = [f"{number:040x}"[::-1] for number in range(num_values)]
    halves = {"a": {"enum": values[::2]}, "b": {"type": "array", "items": {"enum": values[1::2]}}}
    return {"type": "object", "properties": halves}, values


def test_enums_have_no_more_texts_than_the_lexer_has_states_for() -> None:
    schema, values = of_enum(480)
    texts = Texts(schema_types(schema), parser_limits())
    assert '{"a": "x"}' not in texts
    assert '{"b": ["x"]}' not in texts
    for a, b in zip(values[::2], values[1::2], strict=True):
        assert json.dumps({"a": a, "b": [b]}) in texts
    schema, _ = of_enum(2000)
    assert '{"a": "x", "b": ["x"]}' in Texts(schema_types(schema))
    schema, _ = of_enum(700)  # one of the two
    texts = Texts(schema_types(schema))
    assert '{"a": "x"}' not in texts
    assert '{"b": ["x"]}' in texts


def test_the_names_of_properties_count_as_texts() -> None:
    schema = {"properties": {f"{number:1000}": {"type": "integer"} for number in range(25)}}
    assert schema_types(schema) == json_object()


def test_a_long_reference_is_followed_once() -> None:
    steps = 0

    class Reference(str):
        def split(self, *args: object) -> list[str]:  # type: ignore[override]
            nonlocal steps
            steps += 1
            return str.split(self, "/")

    long = Reference("#/$defs" + "/a" * 100)
    schema = {"properties": {f"p{n}": {"$ref": Reference(long)} for n in range(30)}}
    assert reduced(schema) == {"type": "object", "patternProperties": {f"^p{n}$": {} for n in range(30)}}
    assert steps == 1
