"""Synthetic harmony conversations: the skills of the demo model, and how often each is drawn."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cluster.chat_options import ReasoningEffort
from cluster.harmony.message import Message
from cluster.harmony.render import Conversation
from cluster.harmony.tools import ToolDefinition
from scripts.demo import arithmetic, memory, schemas, small_talk, tool_calls, words
from scripts.demo.examples import EFFORTS, Example, answer
from scripts.demo.split import OPERATORS, Operator, Split

SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer in one sentence.",
    "Be brief.",
    "Be friendly and brief.",
    "You are the demo model of Cantata.",
    "You are a careful assistant that calls tools when they fit.",
)
"""What clients put into the system or developer message."""
EVALUATED_SYSTEM_TEXTS = (None, "You are a helpful assistant.")
"""The README's request, which has none, and another one."""

Turn = tuple[Message, tuple[Message, ...]]
"""What the user says, and the turn that answers."""


def draw(rng: random.Random, split: Split = "train") -> Example:
    """Draw an example of any skill."""
    skill = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    return draw_skill(rng, skill, split)


def draw_skill(
    rng: random.Random,
    skill: str,
    split: Split,
    system: str | None = "any",
    effort: ReasoningEffort | None = None,
) -> Example:
    """Draw an example of one skill.

    Args:
        system: the text of the developer message, None for no text, "any" to draw one.
        effort: None to draw one.
    """
    if system == "any":
        system = rng.choice(SYSTEM_TEXTS) if rng.random() < 0.4 else None
    return _SKILLS[skill](rng, split, system, effort or rng.choices(EFFORTS, (3, 4, 2))[0])


def _conversation(
    rng: random.Random,
    messages: Sequence[Message],
    system: str | None,
    effort: ReasoningEffort,
    tools: Sequence[ToolDefinition] = (),
) -> Conversation:
    date = f"20{rng.randint(24, 27)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    developer = () if system is None else (Message("developer", system),)
    return Conversation(
        (*developer, *messages),
        tuple(tools),
        reasoning_effort=effort,
        current_date=date if rng.random() < 0.6 else None,
    )


def _user(text: str) -> Message:
    return Message("user", text)


def _arithmetic_turn(rng: random.Random, operator: Operator, split: Split, effort: ReasoningEffort) -> Turn:
    a, b = arithmetic.operands(rng, operator, split)
    return _user(arithmetic.question(rng, operator, a, b)), arithmetic.worked(operator, a, b, effort)


def _talk_turn(rng: random.Random, split: Split, effort: ReasoningEffort) -> Turn:
    if rng.random() < 0.25:
        about, question, text = (
            "asks what I do not know",
            small_talk.unknown(rng, split),
            small_talk.UNKNOWN_TEXT,
        )
    else:
        topic = rng.choice(small_talk.TOPICS)
        about, question, text = topic.about, rng.choice(topic.questions), topic.text
    return _user(question), small_talk.turn(about, text, effort)


def _repeat_turn(rng: random.Random, split: Split, effort: ReasoningEffort) -> Turn:
    text = " ".join(words.text_value(rng, split) for _ in range(rng.randint(1, 3)))
    question = rng.choice(("Repeat: {}", "Say {}", "Please repeat {}", "Repeat after me: {}", "Say '{}'"))
    analysis = {"low": "", "medium": "I repeat.", "high": "The user wants me to repeat some words, exactly."}
    return _user(question.format(text)), answer(analysis[effort], text)


def _any_turn(rng: random.Random, split: Split, effort: ReasoningEffort) -> Turn:
    """Draw a turn that stands between others."""
    kind = rng.random()
    if kind < 0.5:
        return _talk_turn(rng, split, effort)
    if kind < 0.85:
        return _arithmetic_turn(rng, rng.choice(OPERATORS), split, effort)
    return _repeat_turn(rng, split, effort)


def _with_history(
    rng: random.Random, turn: Turn, split: Split, system: str | None, effort: ReasoningEffort, skill: str
) -> Example:
    """Return an example of a turn, sometimes after another one, sometimes with tools that do not
    help."""
    before = [_any_turn(rng, split, effort)] if rng.random() < 0.15 else []
    tools = [tool_calls.distractor(rng, split)] if rng.random() < 0.12 else []
    history = [message for said, turn in before for message in (said, *turn)]
    return Example(skill, _conversation(rng, [*history, turn[0]], system, effort, tools), turn[1])


def _arithmetic_skill(operator: Operator) -> "_Draw":
    def draw(rng: random.Random, split: Split, system: str | None, effort: ReasoningEffort) -> Example:
        turn = _arithmetic_turn(rng, operator, split, effort)
        return _with_history(rng, turn, split, system, effort, _ARITHMETIC[operator])

    return draw


def _talk(rng: random.Random, split: Split, system: str | None, effort: ReasoningEffort) -> Example:
    return _with_history(rng, _talk_turn(rng, split, effort), split, system, effort, "small talk")


def _repeat(rng: random.Random, split: Split, system: str | None, effort: ReasoningEffort) -> Example:
    return _with_history(rng, _repeat_turn(rng, split, effort), split, system, effort, "repetition")


def _tools(rng: random.Random, request: tool_calls.Request, split: Split) -> list[ToolDefinition]:
    """Return the tools of a request in any order: its own and up to two others."""
    tools = [
        request.tool,
        *(tool_calls.distractor(rng, split) for _ in range(rng.choices((0, 1, 2), (5, 4, 1))[0])),
    ]
    unique = list({tool.name: tool for tool in reversed(tools)}.values())
    rng.shuffle(unique)
    return unique


def _call(rng: random.Random, split: Split, system: str | None, effort: ReasoningEffort) -> Example:
    request = tool_calls.request(rng, split)
    tools = _tools(rng, request, split)
    history: list[Message] = []
    if rng.random() < 0.15:
        said, turn = _any_turn(rng, split, effort)
        history = [said, *turn]
    conversation = _conversation(rng, [*history, _user(request.text)], system, effort, tools)
    return Example("tool call", conversation, tool_calls.call_turn(request, effort))


def _tool_result(rng: random.Random, split: Split, system: str | None, effort: ReasoningEffort) -> Example:
    request = tool_calls.request(rng, split)
    tools = _tools(rng, request, split)
    result, told = tool_calls.result(rng, request, split)
    turn = tool_calls.call_turn(request, effort)
    # Many clients do not send the reasoning back.
    called = turn if rng.random() < 0.5 else turn[-1:]
    messages = [_user(request.text), *called, result]
    finish = tool_calls.told_turn(request, told, effort)
    if rng.random() < 0.2:  # what is said after a call and its answer
        said, after = _any_turn(rng, split, effort)
        return Example(
            "tool result", _conversation(rng, [*messages, *finish, said], system, effort, tools), after
        )
    return Example("tool result", _conversation(rng, messages, system, effort, tools), finish)


def _schema(rng: random.Random, split: Split, system: str | None, effort: ReasoningEffort) -> Example:
    request = schemas.request(rng, split)
    conversation = _conversation(rng, [_user(request.text)], system, effort)
    return Example(
        "JSON schema",
        replace(conversation, response_format=request.format),
        schemas.turn(request, effort),
    )


def _memory(rng: random.Random, split: Split, system: str | None, effort: ReasoningEffort) -> Example:
    turns = memory.turns(rng, split, effort, lambda: _any_turn(rng, split, effort))
    *before, last = turns
    history = [message for said, turn in before for message in (said, *turn)]
    return Example("memory", _conversation(rng, [*history, last[0]], system, effort), last[1])


_Draw = Callable[[random.Random, Split, str | None, ReasoningEffort], Example]
_ARITHMETIC: Mapping[Operator, str] = {"+": "sum", "-": "difference", "*": "product"}
_SKILLS: Mapping[str, _Draw] = {
    "sum": _arithmetic_skill("+"),
    "difference": _arithmetic_skill("-"),
    "product": _arithmetic_skill("*"),
    "small talk": _talk,
    "repetition": _repeat,
    "tool call": _call,
    "tool result": _tool_result,
    "JSON schema": _schema,
    "memory": _memory,
}
WEIGHTS: Mapping[str, float] = {
    "sum": 9,
    "difference": 10,
    "product": 8,
    "small talk": 18,
    "repetition": 8,
    "tool call": 22,
    "tool result": 8,
    "JSON schema": 10,
    "memory": 10,
}
"""Relative numbers of examples of each skill in training."""
