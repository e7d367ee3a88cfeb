"""Grammars have the texts that a client asked for, and no others."""

import contextlib
import json
import time

import pytest

from tests.support.grammar_texts import Texts
from workers.errors import InvalidRequest
from workers.grammars.grammar import (
    MAX_CHOICES,
    MAX_GRAMMAR_BYTES,
    Grammar,
    choice,
    json_object,
    json_schema,
    lark,
    regex,
)

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "ages": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name", "ages"],
    "additionalProperties": False,
}
VALUE = {"name": "A\tü", "ages": [1, 2]}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(VALUE, separators=(",", ":")),
        json.dumps(VALUE, ensure_ascii=False),
        json.dumps(VALUE, indent=2),
        json.dumps(VALUE, indent="\t").replace("\n", "\r\n"),
        '{ "name" : "" , "ages" : [ ] }',
        '{"name":"\\u0041\\ud83d\\ude00","ages":[]}',
    ],
)
def test_a_schema_has_every_usual_way_to_write_a_value(text: str) -> None:
    assert text in Texts(json_schema(SCHEMA, "s"))


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"name":1,"ages":[]}',
        '{"name":"","ages":[1.5]}',
        '{"name":"","ages":[],"more":1}',
        '{"name":"\\ud83d","ages":[]}',
        '{  "name":"","ages":[]}',
        '{"name":"","ages":[\n\n]}',
        '{"name":"","ages":[\n' + " " * 65 + "]}",
        ' {"name":"","ages":[]}',
    ],
)
def test_a_schema_has_nothing_else_and_no_whitespace_without_end(text: str) -> None:
    assert text not in Texts(json_schema(SCHEMA, "s"))


def test_a_boolean_schema_allows_any_value_or_none() -> None:
    assert "[1]" in Texts(json_schema(True, "s"))
    assert "[1]" in Texts(json_schema({}, "s"))
    with pytest.raises(AssertionError, match="nsatisfiable"):
        Texts(json_schema(False, "s"))


def test_the_options_of_llguidance_are_ours() -> None:
    schema = {**SCHEMA, "x-guidance": {"lenient": True, "whitespace_flexible": True}}
    assert json_schema(schema, "s") == json_schema(SCHEMA, "s")


def test_json_object() -> None:
    texts = Texts(json_object())
    assert '{"a": [1, {"b": null}]}' in texts
    assert "[1]" not in texts


@pytest.mark.parametrize("schema", [None, [], "string", 1])
def test_what_is_no_schema_is_refused(schema: object) -> None:
    with pytest.raises(InvalidRequest, match=r"a\.b must be a JSON schema") as caught:
        json_schema(schema, "a.b")
    assert caught.value.param == "a.b"


def nested(depth: int) -> object:
    schema: dict[str, object] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"const": "\ud800"}, "cannot be written as JSON"),
        ({"minimum": 10**30}, "cannot be written as JSON"),
        (nested(5000), "cannot be written as JSON"),
        ({"description": "x" * MAX_GRAMMAR_BYTES}, "the maximum is"),
    ],
    ids=["surrogate", "integer", "nesting", "size"],
)
def test_a_schema_that_cannot_be_written_is_refused(schema: object, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^s .*{reason}"):
        json_schema(schema, "s")


@pytest.mark.parametrize(
    ("pattern", "text", "other"),
    [
        (r"^\d{2}/\w+$", "12/ab", "1/ab"),
        (r"a\/[/]b", "a//b", "a/b"),
        ("a\nb\\\nc", "a\nb\nc", "anbnc"),
        (r"\\/", "\\/", "/"),
        ("é|ü", "ü", "u"),
        ("(?i)yes|no", "NO", "maybe"),
    ],
)
def test_a_regex_matches_the_whole_text(pattern: str, text: str, other: str) -> None:
    texts = Texts(regex(pattern, "r"))
    assert text in texts
    assert other not in texts


def test_a_choice_has_its_texts() -> None:
    options = ["yes", "yes, but", 'a "quoted"\n\\text', "é😀", "", "\x7f\x1b\b", "yes"]
    texts = Texts(choice(options, "c"))
    assert all(option in texts for option in options)
    assert "ye" not in texts


@pytest.mark.parametrize(
    ("options", "param"),
    [([], "c"), ("ab", "c"), (None, "c"), ([""], "c"), (["a", 1], "c[1]"), (["a", "\udfff"], "c[1]")],
)
def test_what_is_no_choice_is_refused(options: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        choice(options, "c")
    assert caught.value.param == param


def test_choices_are_bounded_in_number() -> None:
    with pytest.raises(InvalidRequest, match=f"at most {MAX_CHOICES}"):
        choice([str(number) for number in range(MAX_CHOICES + 1)], "c")


def test_a_lark_grammar() -> None:
    text = """
        // <not a token>, temperature=1
        start: NAME "<|" /</ rest   # <nor here>
        rest[suffix=";"]: /stop=[a-z]+/
        NAME: /[a-z]+\\/</
    """
    assert "ab/<<|<stop=x;" in Texts(lark(text, "g"))


@pytest.mark.parametrize(
    "text",
    [
        "start: <|call|>",
        "start: <[97]>",
        "start: <[*]>",
        'start: "a"\nb[max_tokens=3]: /a/',
        'a[stop = ""]: /b/',
        'start: /a\n"/ <[97]> "b"',
        'start: "a" /* b "*/ <[97]> "',
        'start: "a\\\\" <[97]> "b"',
    ],
)
def test_what_is_about_tokens_is_no_part_of_a_lark_grammar(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^g has "):
        lark(text, "g")


@pytest.mark.parametrize("make", [regex, lark])
@pytest.mark.parametrize("text", [None, 1, "\ud800", "x" * (MAX_GRAMMAR_BYTES + 1)])
def test_what_is_no_text_is_refused(make: object, text: object) -> None:
    assert callable(make)
    with pytest.raises(InvalidRequest, match=r"^t "):
        make(text, "t")


UNCLOSED = ["<", "</", '"\\"', '\\"', "/\\", "/a", '"/', '/\n"', "stop ", "#/", "\\", "\n", "\\/"]


@pytest.mark.parametrize("start", ["", '"', "/", "<", "stop"])
@pytest.mark.parametrize("part", UNCLOSED)
def test_the_time_for_a_lark_grammar_or_regex_is_in_proportion_to_its_length(part: str, start: str) -> None:
    text = start + part * (2**18 // len(part))
    began_s = time.process_time()
    for make in (lark, regex):
        with contextlib.suppress(InvalidRequest):
            make(text, "t")
    # A twentieth of a second; minutes if each opening character reads up to the end.
    assert time.process_time() - began_s < 5


def test_what_is_too_long_is_not_read() -> None:
    with pytest.raises(InvalidRequest, match=r"^t has \d+ characters; the maximum is"):
        lark("<" * (MAX_GRAMMAR_BYTES + 1), "t")


def test_grammars_are_equal_by_text() -> None:
    assert len({json_object(), Grammar(json_object().text)}) == 1
