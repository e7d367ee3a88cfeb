"""Names of tools, with dots or like a built-in's: declared, called, answered and shown again under
the same name."""

from typing import Any

import pytest

from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, turn

ASK = {"role": "user", "content": "Hello"}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": None, "parameters": None}}


async def call_of(gateway: Gateway, names: list[str], messages: list[Any]) -> dict[str, Any]:
    body = {"messages": messages, "tools": [tool(name) for name in names]}
    response = await gateway.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    (call,) = response.json()["choices"][0]["message"]["tool_calls"]
    assert isinstance(call, dict)
    return call


@pytest.mark.parametrize(
    "name",
    [
        "mcp.server-1.get_x",
        "browser.search",
        "python",
        "functions.f",
        "functions",
        "user",
        "a" * 128,
        ".",
        "a.final",
    ],
)
async def test_a_name_comes_back_as_it_was_declared(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding, name: str
) -> None:
    engine.answer = lambda request: Script(turn(encoding, call=(name, "{}")))
    call = await call_of(gateway, ["f", name], [ASK])
    assert call["function"]["name"] == name
    history = [ASK, {"role": "assistant", "tool_calls": [call]}]
    history.append({"role": "tool", "tool_call_id": call["id"], "content": "done"})
    assert (await call_of(gateway, ["f", name], history))["function"]["name"] == name
    prompt = encoding.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert f"\ntype {name} = () => any;\n" in prompt
    assert (
        f"<|start|>assistant<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>" in prompt
    )
    assert f"<|start|>functions.{name}<|channel|>commentary to=assistant<|message|>done" in prompt


@pytest.mark.parametrize(
    ("declared", "recipient", "name"),
    [
        ([], "browser.search", "browser.search"),
        (["f"], "python", "python"),
        (["browser.search"], "browser.search", "browser.search"),
        (["python"], "python", "python"),
        (["python"], "functions.python", "python"),
        (["a.b"], "a.b", "a.b"),
        (["functions.f"], "functions.f", "functions.f"),
        (["functions.f", "f"], "functions.f", "f"),
    ],
)
async def test_a_recipient_without_namespace_is_the_declared_tool_or_an_unknown_one(
    gateway: Gateway,
    engine: FakeEngine,
    encoding: HarmonyEncoding,
    declared: list[str],
    recipient: str,
    name: str,
) -> None:
    text = f"<|channel|>analysis to={recipient} code<|message|>x<|call|>"
    engine.answer = lambda request: Script(encoding.encode_with_special(text))
    call = await call_of(gateway, declared, [ASK])
    assert call["function"] == {"name": name, "arguments": "x"}
    unknown = gateway.service.metrics.repairs.labels("unknown_tool")._value.get()
    assert unknown == (0 if name in declared else 1)
