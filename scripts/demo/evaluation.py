"""Exactness of the demo model's answers, greedily: in this process or over HTTP."""

import json
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.message import FUNCTIONS, Message, MessageEnd
from cluster.harmony.parse import HarmonyParser
from cluster.harmony.tools import ToolDefinition
from scripts.demo.conversations import EVALUATED_SYSTEM_TEXTS, WEIGHTS, draw_skill
from scripts.demo.examples import EFFORTS, Example
from scripts.demo.split import Split
from workers.engine.llm import LLM, SamplingParams

_MAX_TOKENS = 250
_KV_CACHE_BYTES = 128 << 20
_TIMEOUT_S = 120.0
_CLIENTS = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """The last message of a turn.

    Attributes:
        tool: the called function; None for a final answer.
        text: the answer, or the arguments of the call.
    """

    tool: str | None
    text: str


class Answers(Protocol):
    """A way to ask the model."""

    def ask(self, examples: Sequence[Example]) -> list[Answer | None]:
        """Return the model's answers, greedily; None for a turn without one."""


def questions(count: int, split: Split = "held_out", seed: int = 0) -> list[Example]:
    """Return `count` examples of every skill, with each effort and each evaluated system text in
    turn."""
    found = []
    for skill in WEIGHTS:
        rng = random.Random(f"{seed} {skill} {split}")
        for index in range(count):
            system = EVALUATED_SYSTEM_TEXTS[index % len(EVALUATED_SYSTEM_TEXTS)]
            effort = EFFORTS[index // len(EVALUATED_SYSTEM_TEXTS) % len(EFFORTS)]
            found.append(draw_skill(rng, skill, split, system, effort))
    return found


def exactness(answers: Answers, examples: Sequence[Example]) -> dict[str, tuple[int, int]]:
    """Return, for each skill, the numbers of right answers and of questions."""
    counts: dict[str, tuple[int, int]] = {}
    for example, answer in zip(examples, answers.ask(examples), strict=True):
        right, asked = counts.get(example.skill, (0, 0))
        counts[example.skill] = (right + is_right(example, answer), asked + 1)
    return counts


def is_right(example: Example, answer: Answer | None) -> bool:
    """Return whether an answer is the expected one: a text to the letter, JSON by its value."""
    expected = expected_answer(example)
    if answer is None or answer.tool != expected.tool:
        return False
    if expected.tool is None and example.conversation.response_format is None:
        return answer.text == expected.text
    try:
        return bool(json.loads(answer.text) == json.loads(expected.text))
    except ValueError:
        return False


def expected_answer(example: Example) -> Answer:
    answer = _answer(example.answer)
    assert answer is not None
    return answer


def _answer(messages: Sequence[Message]) -> Answer | None:
    last = messages[-1] if messages else None
    if last is None or last.end not in ("return", "call") or last.kind == "reasoning":
        return None
    tool = None if last.recipient is None else last.recipient.removeprefix(FUNCTIONS)
    return Answer(tool, last.content)


class InProcess:
    """The engine in this process."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._encoding = HarmonyEncoding.load(checkpoint)

    def ask(self, examples: Sequence[Example]) -> list[Answer | None]:
        sampling = SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS)
        prompts = [example.prompt_ids(self._encoding) for example in examples]
        with LLM(self._checkpoint, kv_cache_bytes=_KV_CACHE_BYTES) as llm:
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return [self._parse(output.outputs[0].token_ids) for output in outputs]

    def _parse(self, token_ids: Sequence[int]) -> Answer | None:
        parser = HarmonyParser(self._encoding)
        events = [event for token_id in token_ids for event in parser.push(token_id)]
        events += parser.finish()
        return _answer([event.message for event in events if isinstance(event, MessageEnd)])


class OverHttp:
    """A running server. Schemas are sent as `response_format`, which the server enforces.

    Args:
        constraint: the request's `harmony_constraint`, except where a schema is enforced.
    """

    def __init__(self, url: str, model: str, constraint: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False)
        self._model = model
        self._constraint = constraint

    def ask(self, examples: Sequence[Example]) -> list[Answer | None]:
        with ThreadPoolExecutor(_CLIENTS) as clients:
            return list(clients.map(self._ask, examples))

    def _ask(self, example: Example) -> Answer | None:
        body: dict[str, object] = {
            "model": self._model,
            "messages": chat_messages(example.conversation.messages),
            "reasoning_effort": example.conversation.reasoning_effort,
            "temperature": 0,
            "max_completion_tokens": _MAX_TOKENS,
        }
        if example.conversation.tools:
            body["tools"] = [_tool(tool) for tool in example.conversation.tools]
        if (shown := example.conversation.response_format) is not None:
            json_schema = {"name": shown.name, "schema": shown.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        else:
            body["harmony_constraint"] = self._constraint
        response = self._client.post("/v1/chat/completions", json=body)
        if response.is_error:
            raise RuntimeError(f"the server answered {response.status_code}: {response.text}")
        choice = response.json()["choices"][0]
        calls = choice["message"].get("tool_calls")
        if calls:
            function = calls[-1]["function"]
            return Answer(function["name"], function["arguments"])
        content = choice["message"].get("content")
        return Answer(None, content) if content and choice["finish_reason"] == "stop" else None


def chat_messages(messages: Sequence[Message]) -> list[dict[str, object]]:
    """Return harmony messages as a chat request has them; reasoning is not sent back."""
    found: list[dict[str, object]] = []
    for number, message in enumerate(messages):
        if message.role == "tool":
            found.append({"role": "tool", "content": message.content, "tool_call_id": f"call_{number - 1}"})
        elif message.kind == "tool_call":
            function = {
                "name": (message.recipient or "").removeprefix(FUNCTIONS),
                "arguments": message.content,
            }
            call = {"id": f"call_{number}", "type": "function", "function": function}
            found.append({"role": "assistant", "tool_calls": [call]})
        elif message.role != "assistant" or message.kind == "text":
            role = "system" if message.role == "developer" else message.role
            found.append({"role": role, "content": message.content})
    return found


def _tool(tool: ToolDefinition) -> Mapping[str, object]:
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
    }


def report(counts: Mapping[str, tuple[int, int]]) -> str:
    """Return one line: the share of right answers by skill."""
    return ", ".join(f"{skill} {right / asked:.1%}" for skill, (right, asked) in counts.items())
