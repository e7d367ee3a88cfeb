"""The conversations on which the demo model is trained and measured."""

import json
import random
import re
from collections.abc import Iterator

import jsonschema
import pytest

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.message import Message, MessageEnd
from cluster.harmony.parse import HarmonyParser
from cluster.harmony.render import Conversation, render
from cluster.harmony.tools import schema_problem
from scripts.demo import arithmetic, split
from scripts.demo.conversations import WEIGHTS, draw, draw_skill
from scripts.demo.examples import EFFORTS, Example

SEED = 5
_NUMBERS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def examples(part: split.Split, count: int) -> Iterator[Example]:
    rng = random.Random(SEED)
    for skill in WEIGHTS:
        yield from (draw_skill(rng, skill, part) for _ in range(count))


def shown_text(example: Example) -> str:
    """Return all text that training on an example shows."""
    conversation = example.conversation
    tools = [json.dumps([tool.name, tool.description, tool.parameters]) for tool in conversation.tools]
    texts = [message.content for message in (*conversation.messages, *example.answer)]
    recipients = [message.recipient or "" for message in (*conversation.messages, *example.answer)]
    shown = conversation.response_format
    form = [] if shown is None else [shown.name, json.dumps(shown.schema)]
    return "\n".join([*texts, *tools, *recipients, *form]).lower()


def names_and_values(example: Example) -> Iterator[str]:
    """Yield the names and string values of a tool call."""
    for tool in example.conversation.tools:
        assert tool.parameters is not None
        properties = tool.parameters["properties"]
        assert isinstance(properties, dict)
        yield from (tool.name, *properties)
    yield from (value for value in json.loads(example.answer[-1].content).values() if isinstance(value, str))


def words_of(text: str) -> set[str]:
    return {*re.findall(r"[\w.\-]+", text), *re.findall(r"\w+", text)}


def test_names_and_values_that_are_held_out_occur_nowhere_in_training() -> None:
    rng = random.Random(SEED)
    trained = {word for _ in range(1500) for word in words_of(shown_text(draw(rng)))}
    held_out = [draw_skill(rng, "tool call", "held_out") for _ in range(200)]
    values = {value.lower() for example in held_out for value in names_and_values(example)}
    seen = {value for value in values if all(word in trained for word in value.split())}
    assert seen == set()
    assert len(values) > 500


@pytest.mark.parametrize("operator", split.OPERATORS)
def test_a_fifth_of_the_operands_is_held_out(operator: split.Operator) -> None:
    parts = [split.pair_split(operator, a, b) for a, b in split.pairs(operator)]
    assert parts.count("held_out") == len(parts) // 5
    assert all(
        split.pair_split(operator, a, b) == split.pair_split(operator, b, a) for a, b in ((7, 8), (31, 4))
    )


@pytest.mark.parametrize("operator", split.OPERATORS)
@pytest.mark.parametrize("effort", EFFORTS)
def test_analyses_are_right_and_contain_no_pair_that_is_held_out(
    operator: split.Operator, effort: str
) -> None:
    for pair in split.pairs(operator):
        for a, b in (pair, pair[::-1]):
            analysis, final = arithmetic.worked(operator, a, b, effort)  # type: ignore[arg-type]
            assert final.content == f"{a} {operator} {b} = {_NUMBERS[operator](a, b)}"
            equations = re.findall(r"([\d+*-]+)=(-?\d+)", analysis.content)
            assert equations
            for left, right in equations:
                operands = re.fullmatch(r"(\d+)([+*-])(\d+)", left)
                if operands is None:  # a carry or borrow, or a factor as a sum
                    assert re.fullmatch(r"\d+[+-]\d+[+-]1|\d+", left)
                    continue
                x, sign, y = int(operands[1]), operands[2], int(operands[3])
                assert _NUMBERS[sign](x, y) == int(right)
                assert split.pair_split(sign, x, y) == "train"  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_operands_belong_to_their_part(part: split.Split) -> None:
    rng = random.Random(SEED)
    for operator in split.OPERATORS:
        for _ in range(300):
            assert split.pair_split(operator, *arithmetic.operands(rng, operator, part)) == part


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_every_turn_is_parsed_as_it_was_written(part: split.Split, encoding: HarmonyEncoding) -> None:
    for example in examples(part, 40):
        tools = [tool.name for tool in example.conversation.tools]
        parser = HarmonyParser(encoding, tools)
        events = [event for token in example.completion_ids(encoding) for event in parser.push(token)]
        events += parser.finish()
        messages = tuple(event.message for event in events if isinstance(event, MessageEnd))
        assert messages == example.answer
        assert parser.turn_over
        assert not parser.repairs


def test_a_turn_has_the_ids_with_which_it_is_rendered_in_the_next_prompt(encoding: HarmonyEncoding) -> None:
    for example in examples("train", 10):
        *_, last = example.answer
        conversation = Conversation((Message("user", "Hi"), last))
        rendered = render(conversation, encoding, begins_answer=False)
        completion = example.completion_ids(encoding)
        start = max(index for index, token in enumerate(completion) if token == encoding.channel)
        end = encoding.call if last.end == "call" else encoding.end
        assert rendered[-len(completion[start:]) :] == [*completion[start:-1], end]


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_calls_match_their_schema_and_take_their_values_from_the_user(part: split.Split) -> None:
    rng = random.Random(SEED)
    for _ in range(200):
        example = draw_skill(rng, "tool call", part)
        call = example.answer[-1]
        tools = {f"functions.{tool.name}": tool for tool in example.conversation.tools}
        assert call.recipient is not None
        schema = tools[call.recipient].parameters
        assert schema is not None
        assert schema_problem(schema) is None
        arguments = json.loads(call.content)
        jsonschema.validate(arguments, schema)
        request = example.conversation.messages[-1].content
        assert all(str(value).lower() in request.lower() for value in arguments.values())


def test_json_answers_match_their_schema() -> None:
    rng = random.Random(SEED)
    for _ in range(100):
        example = draw_skill(rng, "JSON schema", "train")
        shown = example.conversation.response_format
        assert shown is not None
        jsonschema.validate(json.loads(example.answer[-1].content), shown.schema)


def test_effort_decides_how_long_the_analysis_is() -> None:
    def analysis_chars(skill: str, effort: str) -> int:
        rng = random.Random(SEED)
        drawn = [draw_skill(rng, skill, "train", None, effort) for _ in range(30)]  # type: ignore[arg-type]
        assert all("\n" not in e.answer[0].content for e in drawn if e.answer[0].channel == "analysis")
        return sum(
            len(message.content) for e in drawn for message in e.answer if message.channel == "analysis"
        )

    for skill in WEIGHTS:
        low, medium, high = (analysis_chars(skill, effort) for effort in EFFORTS)
        assert low < medium < high, skill


def test_the_same_seed_gives_the_same_examples() -> None:
    one, two = random.Random(SEED), random.Random(SEED)
    assert [draw(one) for _ in range(50)] == [draw(two) for _ in range(50)]
