"""Which chats have a constraint, and which one."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import openai
import pytest

from cluster.generation import ChatDefaults
from cluster.harmony.automaton import TurnAutomata
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.turn_grammar import ToolBody, TurnGrammar
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import Gateway, serving
from workers.constraint.codec import Constraint
from workers.grammars.grammar import json_object

HELLO = [{"role": "user", "content": "hello"}]
NAMES = ("look_up", "mcp.server-1")
TOOLS = [{"type": "function", "function": {"name": name}} for name in NAMES]
ON, OFF = {"harmony_constraint": "headers"}, {"harmony_constraint": "off"}


@pytest.fixture
async def loose(encoding: HarmonyEncoding, engine: FakeEngine) -> AsyncIterator[Gateway]:
    """A gateway whose default is off."""
    async with serving(encoding, [engine], defaults=ChatDefaults(harmony_constraint="off")) as gateway:
        yield gateway


async def constraint_of(
    gateway: Gateway, engine: FakeEngine, extra: Mapping[str, Any], **fields: Any
) -> Constraint | None:
    before = len(engine.requests)
    await gateway.client.chat.completions.create(
        model=gateway.service.served.info.id, messages=HELLO, extra_body=extra, **fields
    )
    (request,) = engine.requests[before:]
    return request.constraint


async def test_a_request_or_the_deployment_asks_for_it(
    gateway: Gateway, loose: Gateway, engine: FakeEngine
) -> None:
    assert await constraint_of(loose, engine, {}) is None
    assert await constraint_of(loose, engine, OFF) is None
    asked = await constraint_of(loose, engine, ON)
    assert asked is not None
    assert await constraint_of(gateway, engine, {}) == await constraint_of(gateway, engine, ON) == asked
    assert await constraint_of(gateway, engine, OFF) is None


async def test_it_allows_calls_of_the_tools_that_the_model_sees(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    automata = TurnAutomata(encoding, gateway.service.served.info.vocab_size)
    bodies = tuple(ToolBody(name, json_object()) for name in NAMES)
    none = Constraint.of(automata.of(TurnGrammar()))
    auto = Constraint.of(automata.of(TurnGrammar(bodies, "allowed")))
    assert await constraint_of(gateway, engine, ON) == none
    assert await constraint_of(gateway, engine, ON, tools=TOOLS) == auto
    assert await constraint_of(gateway, engine, ON, tools=TOOLS[::-1]) == auto
    assert await constraint_of(gateway, engine, ON, tools=TOOLS, tool_choice="none") == none
    assert none.id != auto.id


async def test_what_goes_on_after_a_turns_end_has_none(gateway: Gateway, engine: FakeEngine) -> None:
    assert await constraint_of(gateway, engine, {"ignore_eos": True}) is None


async def test_turns_of_certain_tokens_have_one_only_if_it_is_asked_for(
    gateway: Gateway, engine: FakeEngine
) -> None:
    """Classification takes one token of a few, without a header."""
    tokens = {"allowed_token_ids": [65, 66], "max_tokens": 1}
    assert await constraint_of(gateway, engine, tokens) is None
    plain = await constraint_of(gateway, engine, {})
    assert await constraint_of(gateway, engine, tokens | ON) == plain
    assert await constraint_of(gateway, engine, tokens | {"guided_regex": "A|B"}) not in (None, plain)


async def test_completions_have_none(gateway: Gateway, engine: FakeEngine) -> None:
    await gateway.client.completions.create(model=gateway.service.served.info.id, prompt="a")
    assert engine.requests[-1].constraint is None


async def test_another_value_is_refused_by_name(gateway: Gateway) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await gateway.client.chat.completions.create(
            model=gateway.service.served.info.id, messages=HELLO, extra_body={"harmony_constraint": "on"}
        )
    assert refused.value.param == "harmony_constraint"
    assert "'off' or 'headers'" in refused.value.message


async def test_too_many_long_names_of_tools_are_refused_before_an_engine_refuses_them(
    gateway: Gateway, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.service._constraints._automata, "_max_states", 150)
    tools = [{"type": "function", "function": {"name": f"{i:03}long"}} for i in range(10)]
    with pytest.raises(openai.BadRequestError) as refused:
        await constraint_of(gateway, engine, ON, tools=tools)
    assert refused.value.param == "tools"
    assert not engine.requests
    assert await constraint_of(gateway, engine, OFF, tools=tools) is None


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.001)


async def test_one_automaton_is_made_at_a_time(
    gateway: Gateway, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the client that asked for it has left."""
    begun, go_on = threading.Event(), threading.Event()
    order: list[object] = []
    make = TurnAutomata.of

    def slow(self: TurnAutomata, grammar: TurnGrammar) -> Any:
        order.append(tuple(tool.name for tool in grammar.tools))
        if not grammar.tools:
            begun.set()
            assert go_on.wait(60)
            order.append("made")
        return make(self, grammar)

    monkeypatch.setattr(TurnAutomata, "of", slow)
    first = asyncio.create_task(constraint_of(gateway, engine, ON))
    assert await asyncio.to_thread(begun.wait, 60)
    first.cancel()
    await asyncio.wait({first})
    await until(lambda: not gateway.service.num_in_flight)
    second = asyncio.create_task(constraint_of(gateway, engine, ON, tools=TOOLS))
    await until(lambda: gateway.service.num_in_flight > 0)
    assert order == [()]
    go_on.set()
    assert await second is not None
    assert order == [(), "made", NAMES]


async def test_what_is_kept_is_bounded(
    gateway: Gateway, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least recently used is made again, and is the same."""
    made = []
    make = TurnAutomata.of

    def counted(self: TurnAutomata, grammar: TurnGrammar) -> Any:
        made.append(tuple(tool.name for tool in grammar.tools))
        return make(self, grammar)

    monkeypatch.setattr(TurnAutomata, "of", counted)
    monkeypatch.setattr("cluster.generation.constraints.MAX_KEPT_BYTES", 1)
    first = await constraint_of(gateway, engine, ON)
    assert await constraint_of(gateway, engine, ON) == first
    await constraint_of(gateway, engine, ON, tools=TOOLS)
    assert await constraint_of(gateway, engine, ON) == first
    assert made == [(), NAMES, ()]
