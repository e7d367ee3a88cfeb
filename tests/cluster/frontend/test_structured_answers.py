"""Answers of a real engine with random weights over HTTP: whatever the model is, what it
writes is valid against the schema that the request has."""

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cluster.harmony.encoding import HarmonyEncoding
from tests.support.gateway import Gateway, make_encoding, serving
from tests.support.random_engine import RandomEngine, write_random_checkpoint

NUM_SCHEMAS = 8
BUDGET = {"max_tokens": 600, "max_reasoning_tokens": 6, "temperature": 1.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "model"
    return write_random_checkpoint(folder, make_encoding(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
async def random_gateway(checkpoint: Path, encoding: HarmonyEncoding) -> AsyncIterator[Gateway]:
    engine = await RandomEngine(checkpoint).start()
    try:
        async with serving(encoding, [engine]) as gateway:
            yield gateway
    finally:
        await engine.stop()


async def many_answered(gateway: Gateway, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the choices of chats that run at once, each with a seed of its own."""
    return await asyncio.gather(*(answered(gateway, seed=seed, **body) for seed, body in enumerate(bodies)))


async def answered(gateway: Gateway, **body: Any) -> dict[str, Any]:
    """Return the one choice of a chat."""
    messages = [{"role": "user", "content": "hello"}]
    answer = await gateway.http.post("/v1/chat/completions", json={"messages": messages, **BUDGET, **body})
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert isinstance(choice, dict)
    return choice


def some_schema(source: random.Random, depth: int = 0) -> dict[str, Any]:
    """Return a schema whose instances are short."""
    kinds = ["enum", "integer", "boolean", "string", "null", *(["object", "array", "anyOf"] * (2 - depth))]
    match source.choice(kinds):
        case "enum":
            return {"enum": ["red", "dark green", 'a "quote"', 7, None]}
        case "integer":
            return {"type": "integer", "minimum": -20, "maximum": source.randrange(1000)}
        case "string":
            return source.choice(
                [{"type": "string", "maxLength": 5}, {"type": "string", "pattern": "^[a-c]{1,4}$"}]
            )
        case "object":
            return some_object(source, depth + 1)
        case "array":
            return {
                "type": "array",
                "items": some_schema(source, depth + 1),
                "maxItems": source.randrange(4),
            }
        case "anyOf":
            return {"anyOf": [some_schema(source, depth + 1) for _ in range(2)]}
        case kind:
            return {"type": kind}


def some_object(source: random.Random, depth: int = 0) -> dict[str, Any]:
    names = source.sample(["id", "name of it", "größe", "z", "kind", "parts"], source.randrange(1, 5))
    return {
        "type": "object",
        "properties": {name: some_schema(source, depth) for name in names},
        "required": source.sample(names, source.randrange(len(names) + 1)),
        "additionalProperties": False,
    }


async def test_answers_are_valid_against_random_schemas(random_gateway: Gateway) -> None:
    schemas = [some_object(random.Random(seed)) for seed in range(NUM_SCHEMAS)]
    forms = [{"type": "json_schema", "json_schema": {"name": "out", "schema": schema}} for schema in schemas]
    choices = await many_answered(random_gateway, [{"response_format": form} for form in forms])
    for schema, choice in zip(schemas, choices, strict=True):
        assert choice["finish_reason"] == "stop", choice
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)


FORMS = [
    ({"regex": "[a-c]{2,5}-[0-9]{2}"}, "[a-c]{2,5}-[0-9]{2}"),
    ({"choice": ["yes", "no", "it depends"]}, "yes|no|it depends"),
    ({"grammar": 'start: a (", " a){0,3}\na: "apple" | "pear"'}, "(apple|pear)(, (apple|pear)){0,3}"),
]


async def test_answers_have_the_form(random_gateway: Gateway) -> None:
    choices = await many_answered(random_gateway, [{"structured_outputs": form} for form, _ in FORMS])
    for (_, pattern), choice in zip(FORMS, choices, strict=True):
        assert re.fullmatch(pattern, choice["message"]["content"]), choice


async def test_forced_calls_have_valid_arguments(random_gateway: Gateway) -> None:
    tools: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": f"tool_{n}", "parameters": some_object(random.Random(n))}}
        for n in range(3)
    ]
    asked = ["required", "required", {"type": "function", "function": {"name": "tool_1"}}]
    choices = await many_answered(
        random_gateway, [{"tools": tools, "tool_choice": forced} for forced in asked]
    )
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    for forced, choice in zip(asked, choices, strict=True):
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        name = call["function"]["name"]
        assert name == "tool_1" or forced == "required"
        jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[name])


async def test_the_documented_requests_work_as_they_are(random_gateway: Gateway) -> None:
    page = (Path(__file__).parents[3] / "docs/structured-output.md").read_text()
    requests = [json.loads(body) for body in re.findall(r"-d '(\{.*?\})'\n", page, re.DOTALL)]
    rows = re.findall(r"^\| `(\{.*?\})` \|", page, re.MULTILINE)
    assert (len(requests), len(rows)) == (4, 4)
    forms = [{"structured_outputs": json.loads(row.replace("\\|", "|"))} for row in rows[:3]]
    choices = await many_answered(random_gateway, [{**body, **BUDGET} for body in (*requests, *forms)])
    person, prime, weather, sum_, chosen, matched, parsed = (choice["message"] for choice in choices)
    schema = requests[0]["response_format"]["json_schema"]["schema"]
    jsonschema.validate(json.loads(person["content"]), schema)
    assert prime["content"] in ("yes", "no")
    assert json.loads(weather["tool_calls"][0]["function"]["arguments"])["city"] in ("Paris", "Oslo")
    assert re.fullmatch("[0-9]+( [+*-] [0-9]+)+", sum_["tool_calls"][0]["custom"]["input"])
    assert chosen["content"] in ("yes", "no")
    assert re.fullmatch("[A-Z]{2}-[0-9]{4}", matched["content"])
    assert parsed["content"] in ("a", "b")
