"""Schemas of tools: the check agrees with jsonschema's on everything but patterns, and no schema
raises, takes long or is kept."""

import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema_specifications import REGISTRY

from cluster.generation.json_schema import MAX_DEPTH, MAX_PATTERN_CHARS, SchemaCheck

VOCABULARIES = (
    "core",
    "applicator",
    "unevaluated",
    "validation",
    "meta-data",
    "format-annotation",
    "content",
)
METASCHEMAS = ["https://json-schema.org/draft/2020-12/schema"]
METASCHEMAS += [f"https://json-schema.org/draft/2020-12/meta/{name}" for name in VOCABULARIES]
KEYWORDS = sorted({keyword for uri in METASCHEMAS for keyword in REGISTRY.contents(uri)["properties"]})
# Texts and numbers that mean something to some keyword, so that a random schema is not always
# wrong.
SCALARS = st.sampled_from([None, True, False, "string", "object", "a", "#a", "", 0, 3, -1, 2.0, 1.5])


def schemas(inner: "st.SearchStrategy[Any]") -> "st.SearchStrategy[Any]":
    named = st.dictionaries(st.sampled_from(["a", "string"]), inner, max_size=2)
    return (
        st.dictionaries(st.sampled_from(KEYWORDS), inner | named | st.lists(inner, max_size=2), max_size=3)
        | named
    )


SCHEMAS = st.recursive(SCALARS | st.lists(SCALARS, max_size=3), schemas, max_leaves=12).filter(
    lambda value: isinstance(value, dict)
)
PATTERN_PIECES = [
    "a",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "*",
    "+",
    "?",
    "|",
    "\\",
    "^",
    "$",
    ".",
    "-",
    ",",
    "9",
    "99999999999999",
    "ü",
    "\n",
]
PATTERN_PIECES += [
    "(?<",
    "(?:",
    "(?=",
    "(?<!",
    "(?P<",
    "(?i)",
    ">",
    "\\p{L}",
    "\\u",
    "\\x",
    "\\k<",
    "\\c",
    "\\1",
    "\\d",
    "\\w-",
]


def problem(schema: Any) -> str | None:
    return SchemaCheck().problem(schema)


def with_pattern(pattern: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}}


@settings(max_examples=150, deadline=None)
@given(SCHEMAS)
def test_it_agrees_with_the_reference_validator(schema: dict[str, Any]) -> None:
    schema = {**schema, "type": "object"}
    validator = jsonschema.Draft202012Validator(jsonschema.Draft202012Validator.META_SCHEMA)
    assert (problem(schema) is None) == validator.is_valid(schema), (schema, problem(schema))


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_every_keyword_of_the_draft_is_checked(keyword: str) -> None:
    """The two keywords that take anything hold a value of the described document."""
    refused = [
        value
        for value in (None, 5, "5", [5], {"a": 5}, True, -1, {})
        if problem({"type": "object", keyword: value}) is not None
    ]
    assert bool(refused) == (keyword not in ("const", "default"))


@pytest.mark.parametrize("keyword", sorted({*KEYWORDS} - {"type"}))
def test_each_keyword_takes_what_the_draft_takes(keyword: str) -> None:
    validator = jsonschema.Draft202012Validator(jsonschema.Draft202012Validator.META_SCHEMA)
    texts: list[Any] = [[], ["a"], ["a", "b"], ["a", "a"], [1, 1]]
    for value in (
        None,
        True,
        False,
        -1,
        0,
        2.0,
        1.5,
        "a",
        *texts,
        {},
        {"a": True},
        *({"a": each} for each in texts),
    ):
        schema = {"type": "object", keyword: value}
        assert (problem(schema) is None) == validator.is_valid(schema), schema


@pytest.mark.filterwarnings("ignore:Possible")
@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PATTERN_PIECES), max_size=12).map("".join) | st.text(max_size=20))
def test_no_pattern_raises(pattern: str) -> None:
    for schema in (with_pattern(pattern), {"patternProperties": {pattern: {}}}):
        found = problem(schema)
        assert found is None or "regular expression" in found


@pytest.mark.parametrize(
    "pattern",
    ["a{99999999999999999999}", "(" * 5000 + ")" * 5000, "(", "a)", "[a", "a**", "\\", "a{3,2}", "[z-a]"],
)
def test_patterns_that_are_none_or_too_large_are_named(pattern: str) -> None:
    wrong = "is not a regular expression, or one too large for this server"
    assert problem(with_pattern(pattern)) == f"is not a JSON schema: properties.a.pattern {wrong}"
    assert (
        problem({"patternProperties": {pattern: {}}})
        == f"is not a JSON schema: patternProperties has a name that {wrong}"
    )


@pytest.mark.parametrize(
    "pattern",
    [
        r"^(\p{Extended_Pictographic}|\p{Emoji_Component})+$",  # what zod writes for an emoji
        r"^[\w-.]+@[\w-]+$",
        r"(?<year>\d{4})-\k<year>",
        r"[^]|[]",
        r"(?<=a+)b(?<!c)",
        r"\u{1F600}|\cA|\/",
        r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
    ],
)
def test_patterns_of_ecma_262_are_patterns(pattern: str) -> None:
    assert problem(with_pattern(pattern)) is None


def test_patterns_have_a_bound_over_all_tools() -> None:
    half = with_pattern("a" * (MAX_PATTERN_CHARS // 2))
    check = SchemaCheck()
    assert check.problem(half) is None
    assert check.problem(half) is None
    assert f"more than {MAX_PATTERN_CHARS} characters" in (check.problem(with_pattern("a")) or "")


def test_python_keeps_no_large_pattern() -> None:
    """`re` remembers what it compiled: 512 entries, without a bound on their size."""
    pattern = "xyzzy" * 1000
    assert problem(with_pattern(pattern)) is None
    assert not any(pattern in str(key) for key in re._cache)  # type: ignore[attr-defined]


def test_nesting() -> None:
    schema: dict[str, Any] = {}
    for _ in range(MAX_DEPTH // 2 - 1):
        schema = {"properties": {"a": schema}}
    assert problem(schema) is None
    deeper = f"is nested deeper than {MAX_DEPTH} levels"
    assert problem({"properties": {"a": {"items": schema}}}) == deeper
    assert problem({"items": schema}) is None, "MAX_DEPTH levels, with the empty one inside"
    assert problem({"items": {"items": schema}}) == deeper


def test_a_long_path_is_shown_by_its_end() -> None:
    schema: dict[str, Any] = {"type": 5}
    for _ in range(20):
        schema = {"properties": {"name" * 100: schema}}
    found = problem(schema)
    assert found is not None
    assert len(found) < 400
    assert found.endswith(".type must be the name of a JSON type, or an array of different ones")


def test_a_large_schema_takes_a_pass() -> None:
    """Quadratic or slow code, at a few microseconds a byte, would run into the suite's time
    limit."""
    described = {f"p{index}": {"type": "string", "description": "x" * 40} for index in range(20_000)}
    assert problem({"type": "object", "properties": described, "required": list(described)}) is None
    assert len(json.dumps(described)) > 1_500_000
