"""Requests for an answer that matches a small JSON schema."""

import random
from dataclasses import dataclass

from cluster.chat_options import ReasoningEffort
from cluster.harmony.message import Message
from cluster.harmony.render import ResponseFormat
from scripts.demo import word_lists, words
from scripts.demo.examples import answer
from scripts.demo.split import Split
from scripts.demo.tool_calls import compact

Field = str | int | bool | list[str]


@dataclass(frozen=True, slots=True)
class SchemaRequest:
    """A text, and the object that its values make."""

    format: ResponseFormat
    text: str
    value: dict[str, Field]


def request(rng: random.Random, split: Split) -> SchemaRequest:
    """Draw a schema and a text; names and values belong to the part."""
    if split == "train" and rng.random() < 0.2:
        value, text = _person(rng)
    else:
        value = dict(_field(rng, split) for _ in range(rng.choices((1, 2, 3), (2, 4, 3))[0]))
        text = _text(rng, value)
    name = rng.choice(("answer", "response", "result", "person", "data", words.word(rng, split)))
    return SchemaRequest(ResponseFormat(name, _schema(rng, value)), text, value)


def turn(request: SchemaRequest, effort: ReasoningEffort) -> tuple[Message, ...]:
    keys = ", ".join(request.value)
    analysis = {
        "low": "",
        "medium": "I answer in JSON.",
        "high": f"The answer has to be JSON that matches the schema, with the keys {keys}. I take the "
        "values from the words of the user and write nothing else.",
    }[effort]
    return answer(analysis, compact(request.value))


def _person(rng: random.Random) -> tuple[dict[str, Field], str]:
    name, city, age = words.person(rng, "train"), words.city(rng, "train"), rng.randint(1, 99)
    value: dict[str, Field] = {"name": name, "age": age, "city": city}
    text = rng.choice(
        (
            f"{name} is {age} years old and lives in {city}.",
            f"I am {name}, {age}, from {city}.",
            f"{name} from {city} is {age}.",
            f"My name is {name}, I am {age} years old and I live in {city}.",
        )
    )
    if rng.random() < 0.4:
        del value[rng.choice(("age", "city"))]
    return value, text


def _field(rng: random.Random, split: Split) -> tuple[str, Field]:
    kind = rng.random()
    if kind < 0.55:
        return words.parameter_name(rng, word_lists.TEXT_PARAMETERS, split), words.text_value(rng, split)
    if kind < 0.8:
        return words.parameter_name(rng, word_lists.NUMBER_PARAMETERS, split), rng.randint(0, 999)
    if kind < 0.9:
        return words.parameter_name(rng, word_lists.FLAGS, split), rng.random() < 0.5
    values = [words.text_value(rng, split) for _ in range(rng.randint(1, 3))]
    return words.parameter_name(rng, word_lists.TEXT_PARAMETERS, split), values


def _text(rng: random.Random, value: dict[str, Field]) -> str:
    between = rng.choice((" ", " = ", ": ", " is "))
    join = rng.choice((", ", " and ", "\n", "; "))
    pairs = [f"{key}{between}{_spoken(part)}" for key, part in value.items()]
    if rng.random() < 0.2:
        rng.shuffle(pairs)
    return (
        rng.choice(("", "Extract: ", "Please fill in: ", "The ")) + join.join(pairs) + rng.choice(("", "."))
    )


def _spoken(part: Field) -> str:
    if isinstance(part, list):
        return " + ".join(part)
    return ("true" if part else "false") if isinstance(part, bool) else str(part)


def _schema(rng: random.Random, value: dict[str, Field]) -> dict[str, object]:
    titled = rng.random() < 0.25
    properties = {}
    for key, part in value.items():
        properties[key] = _type(part) | ({"title": key.replace("_", " ").title()} if titled else {})
    schema: dict[str, object] = {"properties": properties, "required": list(value)}
    schema |= {"additionalProperties": False} if rng.random() < 0.5 else {}
    return {**schema, "type": "object"} if rng.random() < 0.4 else {"type": "object", **schema}


def _type(part: Field) -> dict[str, object]:
    match part:
        case bool():
            return {"type": "boolean"}
        case int():
            return {"type": "integer"}
        case list():
            return {"type": "array", "items": {"type": "string"}}
        case _:
            return {"type": "string"}
