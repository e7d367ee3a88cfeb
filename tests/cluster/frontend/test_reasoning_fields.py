"""What bodies say about reasoning, and the messages of earlier turns as clients and proxies send
them back."""

from typing import Any

from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import Gateway

USER = {"role": "user", "content": "Hello"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "ok"}
CHAT = "/v1/chat/completions"


async def prompt_of(gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding, **fields: Any) -> str:
    response = await gateway.http.post(CHAT, json={"messages": [USER], **fields})
    assert response.status_code == 200, response.text
    return encoding.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


EFFORTS: list[tuple[dict[str, Any], str]] = [
    ({}, "medium"),
    ({"reasoning_effort": "none"}, "low"),
    ({"reasoning_effort": "xhigh"}, "high"),
    ({"reasoning_effort": "max"}, "high"),
    ({"reasoning": {"effort": "high", "summary": "auto", "max_tokens": 100}}, "high"),
    ({"reasoning": {"enabled": True}}, "medium"),
    ({"reasoning": {"enabled": False}}, "low"),
    ({"reasoning": {"enabled": False, "effort": "high"}}, "high"),
    ({"enable_thinking": False}, "low"),
    ({"enable_thinking": True}, "medium"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "low"),
    ({"chat_template_kwargs": {"enable_thinking": True, "thinking": True}}, "medium"),
    ({"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "high"}}, "high"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "medium"),
    ({"thinking": {"type": "disabled"}}, "low"),
    ({"thinking": {"type": "disabled"}, "reasoning_effort": "medium"}, "medium"),
]


async def test_the_effort(gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding) -> None:
    for fields, effort in EFFORTS:
        prompt = await prompt_of(gateway, engine, encoding, **fields)
        assert f"Reasoning: {effort}" in prompt, fields


async def test_excluded_reasoning_is_left_out(gateway: Gateway) -> None:
    for exclude, shown in ((True, False), (False, True)):
        body = {"messages": [USER], "reasoning": {"exclude": exclude}}
        message = (await gateway.http.post(CHAT, json=body)).json()["choices"][0]["message"]
        assert ("reasoning" in message) is ("reasoning_content" in message) is shown
        stream = (await gateway.http.post(CHAT, json={**body, "stream": True})).text
        assert ('"reasoning"' in stream) is shown


PLACES: list[dict[str, Any]] = [
    {"provider_specific_fields": {"reasoning": "Because."}},
    {"provider_specific_fields": {"refusal": None, "reasoning_content": "Because."}},
    {"reasoning_content": "Because.", "provider_specific_fields": {"reasoning": "Because."}},
    {"thinking_blocks": [{"type": "thinking", "thinking": "Because.", "signature": ""}]},
    {"reasoning_details": [{"type": "reasoning.text", "text": "Because.", "index": 0}]},
    {"content": [{"type": "thinking", "thinking": "Because.", "signature": "s"}]},
    {"content": [{"type": "reasoning", "text": "Because."}, {"type": "redacted_thinking", "data": "x"}]},
    {"content": [{"type": "reasoning", "reasoning": "Because."}]},
    {"reasoning": "Because.", "content": [{"type": "thinking", "thinking": "Because."}]},
]


async def test_reasoning_of_a_tool_loop_is_read_wherever_it_is(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    for fields in PLACES:
        message = {"role": "assistant", "content": None, "tool_calls": [CALL], **fields}
        prompt = await prompt_of(gateway, engine, encoding, messages=[USER, message, RESULT])
        assert prompt.count("<|channel|>analysis<|message|>Because.<|end|>") == 1, fields
        assert prompt.count("Because.") == 1, fields


async def test_what_proxies_add_in_odd_forms_is_ignored(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    for odd in (1, "x", [], {}, [1], [[]], {"reasoning": 1}, [{"thinking": 1}], [{"type": "thinking"}]):
        message = {"role": "assistant", "content": "Hi."}
        message |= dict.fromkeys(("provider_specific_fields", "thinking_blocks", "reasoning_details"), odd)
        await prompt_of(gateway, engine, encoding, messages=[USER, message, USER])


async def test_reasoning_before_a_final_answer_is_not_shown_again(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    """LiteLLM's second turn."""
    message = {
        "role": "assistant",
        "content": "Hello there.",
        "reasoning_content": "Let me think.",
        "provider_specific_fields": {"reasoning": "Let me think."},
    }
    prompt = await prompt_of(gateway, engine, encoding, messages=[USER, message, USER])
    assert "Let me think." not in prompt
    assert "<|channel|>final<|message|>Hello there.<|end|>" in prompt


async def test_refusals_are_read_as_text(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    parts = [{"type": "output_text", "text": "Well. "}, {"type": "refusal", "refusal": "I will not."}]
    for message in (
        {"role": "assistant", "content": parts},
        {"role": "assistant", "content": None, "refusal": "Well. I will not."},
    ):
        prompt = await prompt_of(gateway, engine, encoding, messages=[USER, message, USER])
        assert "<|channel|>final<|message|>Well. I will not.<|end|>" in prompt


async def test_only_an_assistant_has_reasoning(gateway: Gateway) -> None:
    parts = [{"type": "text", "text": "x"}, {"type": "thinking", "thinking": "y"}]
    for role in ("user", "system"):
        response = await gateway.http.post(CHAT, json={"messages": [{"role": role, "content": parts}]})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages[0].content[1]")
