"""Schemas of tools: what any draft allows is taken and shown as oss-harmony shows it; what cannot
be shown is named; no schema raises or takes long."""

import json
from typing import Any

import jsonschema
import openai_harmony as oh
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.tools import MAX_SCHEMA_DEPTH, ToolDefinition, schema_problem, typescript_type
from tests.cluster.harmony.harmony_conversations import Chat, user
from tests.cluster.harmony.test_harmony_render import expected, render

DRAFTS = (
    jsonschema.Draft4Validator,
    jsonschema.Draft6Validator,
    jsonschema.Draft7Validator,
    jsonschema.Draft201909Validator,
    jsonschema.Draft202012Validator,
)
METASCHEMAS = [draft(draft.META_SCHEMA) for draft in DRAFTS]
SHOWN = ("type", "properties", "required", "enum", "items", "oneOf", "default", "nullable")
KEYWORDS = (*SHOWN, "description", "title", "examples", "anyOf", "$ref", "exclusiveMinimum", "not")
# Texts and numbers that mean something to some keyword, so that a random schema is not always
# wrong.
SCALARS = st.sampled_from(
    [None, True, False, "object", "array", "string", "integer", "null", "any", "a", "", "x\ny", 0, 1.5, -3]
)
JSON = st.recursive(
    SCALARS | st.lists(SCALARS, max_size=3),
    lambda inner: (
        st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=5)
        | st.dictionaries(st.sampled_from(["a", "b c", "type"]), inner, max_size=3)
        | st.lists(inner, max_size=3)
    ),
    max_leaves=20,
)
SCHEMAS = JSON.filter(lambda value: isinstance(value, dict)).map(lambda value: {**value, "type": "object"})


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SCHEMAS)
def test_what_any_draft_takes_is_taken(schema: dict[str, Any]) -> None:
    if any(metaschema.is_valid(schema) for metaschema in METASCHEMAS):
        assert schema_problem(schema) is None


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(inner=JSON, properties=SCHEMAS, description=st.sampled_from(["", "Two\n\nlines.\r\n"]))
def test_any_schema_is_shown_as_oss_harmony_shows_it(
    gpt_oss: HarmonyEncoding,
    oracle: oh.HarmonyEncoding,
    inner: object,
    properties: dict[str, Any],
    description: str,
) -> None:
    """This holds also for those that are refused."""
    schema = {"type": "object", "properties": {"a": inner, **properties}, "description": description}
    chat = Chat((user("q"),), tools=(ToolDefinition("mcp.server-1.f", description, schema),))
    assert render(chat, gpt_oss) == expected(chat, oracle)


def with_property(**keywords: object) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": keywords}}


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": ["object", "null"]},
        {"type": "object", "properties": []},
        {"type": None, "properties": None, "required": None, "description": None},
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            **with_property(items=[{"type": "string"}, True]),
        },
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "id": "#a",
            **with_property(type="integer", minimum=0, exclusiveMinimum=True, divisibleBy=0),
        },
        {"$schema": "http://json-schema.org/draft-03/schema#", **with_property(type="any", required=True)},
        {"$schema": "https://example.com/none", "$defs": {"a": 5}, **with_property(**{"$ref": "#/$defs/a"})},
        with_property(title=None, description=None, items=None, oneOf=None, enum=None, default=None),
        with_property(oneOf=[], enum=[], items=False, anyOf=None, allOf={}, minLength="3"),
        with_property(type="string", pattern=r"^\p{L}+$"),
        with_property(type="string", pattern=r"(?<y>\d{4})-\k<y>"),
        with_property(type="string", pattern="[^]"),
        with_property(type="string", pattern="a{99999999999999999999}" + "(" * 5000),
        {"type": "object", "patternProperties": {r"[\w-.]": {}, "(": {}}},
        with_property(type="str"),
        {"type": "object", "properties": {"a": None, "b": True}, "required": ["a", "a", "c"]},
    ],
)
def test_usable_schemas_are_taken(schema: dict[str, Any]) -> None:
    assert schema_problem(schema) is None
    typescript_type(schema)


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "string"}, "must describe an object: set type to 'object'"),
        ({"type": ["string"]}, "must describe an object: set type to 'object'"),
        ({"type": {"a": 1}}, "must describe an object: set type to 'object'"),
        ({"properties": ["a"]}, "properties must be an object of schemas"),
        ({"properties": {"a": "string"}}, "properties.a must be a schema: an object, true or false"),
        ({"required": "a"}, "required must be an array of names of properties"),
        ({"required": ["a", 5]}, "required must be an array of names of properties"),
        (with_property(type=5), "properties.a.type must be the name of a JSON type, or an array of names"),
        (
            with_property(type=["string", 5]),
            "properties.a.type must be the name of a JSON type, or an array of names",
        ),
        (with_property(enum="a"), "properties.a.enum must be an array"),
        (with_property(items=3), "properties.a.items must be a schema: an object, true or false"),
        (with_property(oneOf={}), "properties.a.oneOf must be an array of schemas"),
        (with_property(oneOf=[{}, 1]), "properties.a.oneOf[1] must be a schema: an object, true or false"),
        (with_property(items={"enum": 1}), "properties.a.items.enum must be an array"),
    ],
)
def test_what_cannot_be_shown_is_named(schema: dict[str, Any], problem: str) -> None:
    wanted = problem if problem.startswith("must") else f"is not a JSON schema: {problem}"
    assert schema_problem(schema) == wanted


def test_nesting() -> None:
    schema: dict[str, Any] = {}
    for _ in range(MAX_SCHEMA_DEPTH // 2 - 1):
        schema = {"properties": {"a": schema}}
    assert schema_problem(schema) is None
    deeper = f"is nested deeper than {MAX_SCHEMA_DEPTH} levels"
    assert schema_problem({"properties": {"a": {"items": schema}}}) == deeper
    assert schema_problem({"items": schema}) is None, "MAX_SCHEMA_DEPTH levels, with the empty one inside"
    assert schema_problem({"items": {"items": schema}}) == deeper
    assert schema_problem({"unread": {"unread": {"unread": schema}}}) == deeper, "also where it is not shown"


def test_a_long_path_is_shown_by_its_end() -> None:
    schema: dict[str, Any] = {"type": 5}
    for _ in range(20):
        schema = {"properties": {"name" * 100: schema}}
    found = schema_problem(schema)
    assert found is not None
    assert len(found) < 400
    assert found.endswith(".type must be the name of a JSON type, or an array of names")


def test_a_large_schema_takes_a_pass() -> None:
    """Quadratic or slow code, at a few microseconds a byte, would run into the suite's time
    limit."""
    described = {f"p{index}": {"type": "string", "description": "x" * 40} for index in range(20_000)}
    assert schema_problem({"type": "object", "properties": described, "required": list(described)}) is None
    variants = [{"type": "object", "properties": {"a": {"pattern": "(" * 100}}}] * 20_000
    assert schema_problem(with_property(oneOf=variants)) is None
    assert len(json.dumps(described)) > 1_500_000
