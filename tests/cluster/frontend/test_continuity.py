"""Clients that send a tool's result without the reasoning that led to the call: it is put back
while the tool loop goes on, for the same key, in chat and Messages alike."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cluster.config import GatewayConfig
from cluster.frontend import continuity
from cluster.harmony.encoding import HarmonyEncoding
from cluster.state.errors import StateUnavailable
from cluster.state.settings import StateConfig, location
from cluster.state.state import State, open_state
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, serving, turn

REASONING = "I need the weather."
ANALYSIS = f"<|start|>assistant<|channel|>analysis<|message|>{REASONING}<|end|>"
CALL = (
    "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    '{"city":"Oslo"}<|call|>'
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
QUESTION: dict[str, Any] = {"role": "user", "content": "Weather?"}
KEYS = ("first-key", "second-key")


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[State]:
    settings = StateConfig(url=f"sqlite:///{tmp_path}/state.sqlite3")
    state = await open_state(location(settings, several_hosts=False), settings)
    assert state is not None
    yield state
    await state.close()


@pytest.fixture
async def remembering(engine: FakeEngine, encoding: HarmonyEncoding, state: State) -> AsyncIterator[Gateway]:
    config = GatewayConfig(api_keys=KEYS)
    async with asyncio.timeout(120), serving(encoding, [engine], config=config, state=state) as gateway:
        yield gateway


class Chat:
    """A chat client that drops reasoning."""

    path = "/v1/chat/completions"
    tool: ClassVar[dict[str, Any]] = {
        "type": "function",
        "function": {"name": "get_weather", "parameters": PARAMETERS},
    }

    def __init__(self, gateway: Gateway, key: str, stream: bool) -> None:
        self._http = gateway.http
        self._headers = {"authorization": f"Bearer {key}"}
        self._stream = stream
        self._call_ids: list[str] = []
        self.messages: list[Any] = [QUESTION]

    async def ask(self, **fields: Any) -> None:
        """Get the next message; it is known but for the ids of its calls."""
        body = {"messages": self.messages, "tools": [self.tool], "max_tokens": 200, "stream": self._stream}
        body |= fields
        response = await self._http.post(self.path, json=body, headers=self._headers)
        assert response.status_code == 200, response.text
        self._call_ids = list(dict.fromkeys(re.findall(r'"id":"((?:call|toolu)_\w+)"', response.text)))
        self.messages.append({"role": "assistant", **self.reply(self._call_ids)})

    def give_result(self) -> None:
        self.messages += self.results(self._call_ids)

    def reply(self, ids: list[str]) -> dict[str, Any]:
        function = {"name": "get_weather", "arguments": '{"city":"Oslo"}'}
        calls = [{"id": id, "type": "function", "function": function} for id in ids]
        return {"content": "I look.", "tool_calls": calls} if calls else {"content": "It rains."}

    def results(self, ids: list[str]) -> list[Any]:
        return [{"role": "tool", "tool_call_id": id, "content": "rain"} for id in ids]


class Messages(Chat):
    """A Messages client that did not ask for thinking."""

    path = "/v1/messages"
    tool: ClassVar[dict[str, Any]] = {"name": "get_weather", "input_schema": PARAMETERS}

    def reply(self, ids: list[str]) -> dict[str, Any]:
        calls = [
            {"type": "tool_use", "id": id, "name": "get_weather", "input": {"city": "Oslo"}} for id in ids
        ]
        return {"content": [{"type": "text", "text": "I look." if ids else "It rains."}, *calls]}

    def results(self, ids: list[str]) -> list[Any]:
        blocks = [{"type": "tool_result", "tool_use_id": id, "content": "rain"} for id in ids]
        return [{"role": "user", "content": blocks}]


def prompt(engine: FakeEngine, encoding: HarmonyEncoding) -> str:
    return encoding.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


def restored(gateway: Gateway) -> tuple[float, float]:
    """Return how much reasoning was found and not found."""
    counter = gateway.service.metrics.restored_reasoning
    hit, miss = (counter.labels(result)._value.get() for result in ("hit", "miss"))
    return hit, miss


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("kind", [Chat, Messages])
async def test_reasoning_comes_back_until_the_final_message(
    remembering: Gateway, engine: FakeEngine, encoding: HarmonyEncoding, kind: type[Chat], stream: bool
) -> None:
    call = turn(encoding, reasoning=REASONING, text="I look.", call=("get_weather", '{"city":"Oslo"}'))
    engine.answer = lambda request: Script(call)
    client = kind(remembering, KEYS[0], stream)
    await client.ask()
    client.give_result()
    await client.ask()  # another call
    preamble = "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
    assert f"Weather?<|end|>{ANALYSIS}{preamble}{CALL}" in prompt(engine, encoding)
    assert restored(remembering) == (1, 0)
    client.give_result()
    loop = [*client.messages]
    engine.answer = lambda request: Script(turn(encoding, reasoning="Done.", text="It rains."))
    await client.ask()
    assert prompt(engine, encoding).count(ANALYSIS) == 2  # of both calls
    client.messages.append(QUESTION)
    await client.ask()
    assert REASONING not in prompt(engine, encoding)
    assert restored(remembering) == (3, 0)
    client.messages = loop  # what was kept is dropped after the final message
    await client.ask()
    assert REASONING not in prompt(engine, encoding)
    assert restored(remembering) == (3, 2)


async def test_reasoning_of_another_key_is_not_found(
    remembering: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    call = turn(encoding, reasoning=REASONING, text="I look.", call=("get_weather", '{"city":"Oslo"}'))
    engine.answer = lambda request: Script(call)
    first, second = (Chat(remembering, key, stream=False) for key in KEYS)
    await first.ask()
    first.give_result()
    second.messages = [*first.messages]
    await second.ask()
    assert ANALYSIS not in prompt(engine, encoding)
    await first.ask()
    assert ANALYSIS in prompt(engine, encoding)
    # A client that sends it itself gets it once.
    first.messages[1]["reasoning_content"] = REASONING
    first.messages = first.messages[:3]
    await first.ask()
    assert prompt(engine, encoding).count(ANALYSIS) == 1


async def test_reasoning_is_dropped_when_no_choice_goes_on(
    remembering: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    call = turn(encoding, reasoning=REASONING, call=("get_weather", '{"city":"Oslo"}'))
    final = turn(encoding, reasoning="Done.", text="It rains.")
    engine.answer = lambda request: Script(call)
    client = Chat(remembering, KEYS[0], stream=False)
    await client.ask()
    client.give_result()
    turns = [final, call, final]
    engine.answer = lambda request: Script(turns.pop())
    await client.ask(n=3)
    client.give_result()
    loop = [*client.messages]
    engine.answer = lambda request: Script(final)
    await client.ask(n=2)
    assert prompt(engine, encoding).count(ANALYSIS) == 2
    client.messages = loop
    await client.ask()
    assert ANALYSIS not in prompt(engine, encoding)


@pytest.mark.parametrize(("id", "misses"), [("call_" + 24 * "0", 1), ("call_0", 0), ("x" + 24 * "0", 0)])
async def test_calls_of_others_are_no_misses(
    remembering: Gateway, state: State, monkeypatch: pytest.MonkeyPatch, id: str, misses: int
) -> None:
    asked: list[str] = []
    get = state.continuity.get

    async def seen(owner: str, call_ids: list[str]) -> dict[str, str]:
        asked.extend(call_ids)
        return await get(owner, call_ids)

    monkeypatch.setattr(state.continuity, "get", seen)
    client = Chat(remembering, KEYS[0], stream=False)
    client.messages += [{"role": "assistant", **client.reply([id])}, *client.results([id])]
    await client.ask()
    assert restored(remembering) == (0, misses)
    assert asked == [id] * misses


async def test_an_answer_waits_once_for_a_state_that_hangs(
    remembering: Gateway,
    engine: FakeEngine,
    encoding: HarmonyEncoding,
    state: State,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[Any] = []

    async def hang(*asked: Any) -> None:
        kept.append(asked)
        await asyncio.Event().wait()

    monkeypatch.setattr(state.continuity, "put", hang)
    monkeypatch.setattr(continuity, "_PATIENCE_S", 0.01)
    engine.answer = lambda request: Script(
        turn(encoding, reasoning=REASONING, call=("get_weather", '{"city":"Oslo"}'))
    )
    client = Chat(remembering, KEYS[0], stream=False)
    await client.ask(n=3)
    assert len(kept) == 1
    await client.ask()
    assert len(kept) == 2  # the next one tries again


async def test_a_state_that_is_down_or_off_leaves_chats_alone(
    engine: FakeEngine,
    encoding: HarmonyEncoding,
    remembering: Gateway,
    gateway: Gateway,
    state: State,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def down(*_: Any) -> None:
        raise StateUnavailable("It does not answer.")

    call = turn(encoding, reasoning=REASONING, call=("get_weather", '{"city":"Oslo"}'))
    engine.answer = lambda request: Script(call)
    for name in ("get", "put", "drop"):
        monkeypatch.setattr(state.continuity, name, down)
    for server in (remembering, gateway):
        client = Chat(server, KEYS[0], stream=False)
        await client.ask()
        client.give_result()
        await client.ask()
        assert ANALYSIS not in prompt(engine, encoding)
