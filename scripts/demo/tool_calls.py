"""Conversations in which declared functions are called, and their results are told."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.chat_options import ReasoningEffort
from cluster.harmony.message import FUNCTIONS, Message
from cluster.harmony.tools import ToolDefinition
from scripts.demo import word_lists, words
from scripts.demo.examples import answer, call
from scripts.demo.split import Split

Value = str | int | bool


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a function and the value that the user names."""

    name: str
    schema: Mapping[str, object]
    value: Value


@dataclass(frozen=True, slots=True)
class Request:
    """A request that a function fulfils.

    Attributes:
        text: the user's words.
        parameters: those that the user gives a value for.
    """

    tool: ToolDefinition
    text: str
    parameters: tuple[Parameter, ...]

    @property
    def arguments(self) -> str:
        return compact({parameter.name: parameter.value for parameter in self.parameters})


_KNOWN: Sequence[tuple[Sequence[str], str, Sequence[str], str, Sequence[str]]] = (
    (
        ("get_weather", "get_current_weather", "weather", "fetch_weather"),
        "Gets the weather of a place.",
        ("city", "location", "place"),
        "city",
        (
            "What is the weather in {}?",
            "What's the weather in {}?",
            "What is the weather like in {}?",
            "Weather in {}?",
            "How is the weather in {} today?",
            "Is it raining in {}?",
            "What's the weather like in {} today?",
            "Tell me the weather in {}.",
            "Is it cold in {}?",
        ),
    ),
    (
        ("get_time", "get_current_time", "current_time"),
        "Gets the time in a city.",
        ("city", "location", "zone"),
        "city",
        ("What time is it in {}?", "What is the time in {}?", "Tell me the time in {}.", "Time in {}?"),
    ),
    (
        ("search", "search_web", "web_search"),
        "Searches the web.",
        ("query", "text", "q"),
        "text",
        ("Search for {}.", "Please search for {}.", "Search the web for {}.", "Look up {}.", "Google {}."),
    ),
    (
        ("get_user", "find_user", "lookup_user"),
        "Finds a user by name.",
        ("name", "user", "username"),
        "person",
        ("Find the user {}.", "Who is the user {}?", "Look up the user {}.", "Show me the user {}."),
    ),
    (
        ("get_stock_price", "stock_price"),
        "Gets the price of a stock.",
        ("symbol", "ticker", "company"),
        "text",
        ("What is the stock price of {}?", "How much is the stock of {}?", "Stock price of {}?"),
    ),
)
"""Functions that newcomers try: names, description, names of the parameter, kind of its value, and
requests."""


def compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def request(rng: random.Random, split: Split) -> Request:
    """Draw a function and a request for it. Names and values belong to the part; the functions
    that newcomers try are only in training."""
    if split == "train" and rng.random() < 0.25:
        return _known_request(rng)
    return _made_request(rng, split)


def distractor(rng: random.Random, split: Split) -> ToolDefinition:
    """Draw a function that is declared but not needed."""
    return _made_request(rng, split).tool


def _made_request(rng: random.Random, split: Split) -> Request:
    name = words.tool_name(rng, split)
    action, description = _action(rng, name)
    given = _parameters(rng, split)
    extra = [_parameter(rng, split)] if rng.random() < 0.15 else []
    names = [parameter.name for parameter in (*given, *extra)]
    if len(set(names)) < len(names):
        return _made_request(rng, split)
    tool = ToolDefinition(name, description, _schema(rng, given, extra))
    return Request(tool, _request_text(rng, name, action, given), tuple(given))


def call_turn(request: Request, effort: ReasoningEffort) -> tuple[Message, ...]:
    """Return the turn that calls."""
    name = request.tool.name
    match effort:
        case "low":
            analysis = ""
        case "medium":
            analysis = f"I call {name}."
        case "high":
            given = ", ".join(parameter.name for parameter in request.parameters)
            analysis = (
                f"The user asks for something that a tool can do. The tool {name} fits. "
                f"I take its arguments from the words of the user: {given}. I call {name}."
            )
    return call(analysis, name, request.arguments)


def result(rng: random.Random, request: Request, split: Split) -> tuple[Message, str]:
    """Draw the result of a call. Return its message and the answer that tells it."""
    kind = rng.random()
    if kind < 0.7:
        values = dict(_result_value(rng, split) for _ in range(rng.randint(1, 3)))
        content = compact(values) if rng.random() < 0.5 else json.dumps(values, ensure_ascii=False)
        text = ", ".join(f"{key} {_spoken(value)}" for key, value in values.items())
        told = f"Here is the result: {text}."
    elif kind < 0.9:
        content = str(_result_value(rng, split)[1])
        told = f"Here is the result: {content}."
    else:
        reason = rng.choice(("not found", "no access", "timeout", words.text_value(rng, split)))
        content = compact({"error": reason})
        told = f"The tool reports an error: {reason}."
    name = f"{FUNCTIONS}{request.tool.name}"
    return Message("tool", content, name=name, recipient="assistant", channel="commentary"), told


def told_turn(request: Request, told: str, effort: ReasoningEffort) -> tuple[Message, ...]:
    """Return the turn that tells a result."""
    analysis = {
        "low": "",
        "medium": "The tool has answered. I tell the result.",
        "high": f"The tool {request.tool.name} has answered. The user wants to know the result, so I tell "
        "it in one sentence and add nothing.",
    }[effort]
    return answer(analysis, told)


def _known_request(rng: random.Random) -> Request:
    names, description, parameters, kind, texts = rng.choices(_KNOWN, (5, 2, 2, 1, 1))[0]
    draw = {"city": words.city, "text": words.text_value, "person": words.person}[kind]
    parameter = Parameter(rng.choice(parameters), {"type": "string"}, draw(rng, "train"))
    schema: dict[str, object] = {"type": "object", "properties": {parameter.name: parameter.schema}}
    if kind == "city" and rng.random() < 0.3:
        unit = {"type": "string", "enum": ["celsius", "fahrenheit"]}
        schema["properties"] = {parameter.name: parameter.schema, "unit": unit}
    schema["required"] = [parameter.name]
    tool = ToolDefinition(rng.choice(names), description if rng.random() < 0.8 else "", schema)
    return Request(tool, rng.choice(texts).format(parameter.value), (parameter,))


def _action(rng: random.Random, name: str) -> tuple[str, str]:
    """Return what a function does, in the words of its name, and its description."""
    spaced = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name)
    verb, _, noun = spaced.replace("_", " ").partition(" ")
    action = f"{verb} the {noun}" if noun else f"use {verb}"
    description = rng.choice((f"{action.capitalize()}.", f"Use this to {action}.", action.capitalize(), ""))
    return action, description


def _parameters(rng: random.Random, split: Split) -> list[Parameter]:
    return [_parameter(rng, split) for _ in range(rng.choices((1, 2, 3), (5, 4, 1))[0])]


def _parameter(rng: random.Random, split: Split) -> Parameter:
    kind = rng.random()
    if kind < 0.68:
        name = words.parameter_name(rng, word_lists.TEXT_PARAMETERS, split)
        return Parameter(name, {"type": "string"}, words.text_value(rng, split))
    if kind < 0.86:
        name = words.parameter_name(rng, word_lists.NUMBER_PARAMETERS, split)
        return Parameter(name, {"type": rng.choice(("number", "integer"))}, rng.randint(0, 999))
    if kind < 0.94:
        name, choices = (
            words.parameter_name(rng, word_lists.TEXT_PARAMETERS, split),
            words.choices(rng, split),
        )
        return Parameter(name, {"type": "string", "enum": choices}, rng.choice(choices))
    return Parameter(
        words.parameter_name(rng, word_lists.FLAGS, split), {"type": "boolean"}, rng.random() < 0.6
    )


def _schema(rng: random.Random, given: Sequence[Parameter], extra: Sequence[Parameter]) -> dict[str, object]:
    ordered = [*given, *extra]
    described = rng.random() < 0.2
    properties = {
        parameter.name: {**parameter.schema, "description": f"The {parameter.name.replace('_', ' ')}."}
        if described
        else dict(parameter.schema)
        for parameter in ordered
    }
    return {"type": "object", "properties": properties, "required": [p.name for p in given]}


def _request_text(rng: random.Random, name: str, action: str, given: Sequence[Parameter]) -> str:
    spoken = [(parameter.name, _quoted(rng, parameter.value)) for parameter in given]
    if rng.random() < 0.2:
        rng.shuffle(spoken)
    if len(spoken) == 1 and rng.random() < 0.4:
        value = spoken[0][1]
        return rng.choice(
            (
                f"{action.capitalize()} {value}.",
                f"Please {action} for {value}.",
                f"Can you {action} of {value}?",
                f"{action.capitalize()} in {value}",
                f"Use {name} with {value}.",
                f"I need you to {action} {value}.",
            )
        )
    opening = rng.choice(
        (
            *(f"{action.capitalize()} with ", f"Please {action} with ", f"Can you {action}? "),
            *(f"Call {name} with ", f"Use {name}: ", f"I want to {action}. ", f"{action.capitalize()}, "),
        )
    )
    between = rng.choice((" ", " = ", ": ", " is "))
    join = rng.choice((", ", " and "))
    return (
        opening
        + join.join(
            f"{key.replace('_', ' ') if rng.random() < 0.3 else key}{between}{value}" for key, value in spoken
        )
        + rng.choice((".", "", "."))
    )


def _quoted(rng: random.Random, value: Value) -> str:
    text = _spoken(value)
    if not isinstance(value, str) or rng.random() < 0.75:
        return text
    quote = rng.choice(("'", '"'))
    return f"{quote}{text}{quote}"


def _spoken(value: Value) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def _result_value(rng: random.Random, split: Split) -> tuple[str, Value]:
    if rng.random() < 0.5:
        return words.parameter_name(rng, word_lists.NUMBER_PARAMETERS, split), rng.randint(0, 999)
    return words.parameter_name(rng, word_lists.TEXT_PARAMETERS, split), words.text_value(rng, split)
