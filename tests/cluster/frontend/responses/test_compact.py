"""A conversation as one sealed item."""

from openai.types.responses import CompactedResponse
from openresponses_types.types import CompactResource

from cluster.frontend.responses.compact import PROMPT
from cluster.frontend.responses.items import SUMMARY_PREFIX
from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, turn


def prompt(engine: FakeEngine, encoding: HarmonyEncoding) -> str:
    return encoding.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


async def test_the_summary_stands_for_the_conversation(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    engine.answer = lambda request: Script(turn(encoding, reasoning="Hm.", text="Ada asked for Bern."))
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "I am Ada. Weather in Bern?"},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "Sunny."},
        {"role": "assistant", "content": "Sunny."},
    ]
    body = {"input": items, "instructions": "You are an agent.", "tools": [{"type": "web_search"}]}
    answer = await gateway.http.post("/v1/responses/compact", json=body)
    assert answer.status_code == 200, answer.text
    compacted = answer.json()
    CompactedResponse.model_validate(compacted)
    CompactResource.model_validate(compacted)
    shown = prompt(engine, encoding)
    assert "# Instructions\n\nYou are an agent.\n\nBe brief." in shown
    assert shown.endswith(f"<|start|>user<|message|>{PROMPT}<|end|><|start|>assistant")
    assert engine.requests[-1].sampling.max_tokens == engine.max_model_len // 4
    (item,) = compacted["output"]
    assert "Ada" not in item["encrypted_content"]
    assert compacted["usage"]["input_tokens"] == len(engine.requests[-1].prompt_token_ids)
    follow = {"input": [item, {"role": "user", "content": "And?"}], "instructions": "You are an agent."}
    assert (await gateway.http.post("/v1/responses", json=follow)).status_code == 200
    shown = prompt(engine, encoding)
    assert "# Instructions\n\nYou are an agent.\n\nBe brief." in shown, "once each"
    assert f"<|start|>user<|message|>{SUMMARY_PREFIX}Ada asked for Bern.<|end|>" in shown
    assert "Weather in Bern?" not in shown
    again = await gateway.http.post("/v1/responses/compact", json={"input": follow["input"]})
    assert again.status_code == 200, "what was compacted can be compacted again"


async def test_a_conversation_that_is_too_long_is_compacted_too(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    items = [{"role": "user", "content": f"Question {number}: " + "word " * 40} for number in range(40)]
    answer = await gateway.http.post("/v1/responses/compact", json={"input": items})
    assert answer.status_code == 200, answer.text
    assert "Question 39" in prompt(engine, encoding)
    assert "Question 0:" not in prompt(engine, encoding)


async def test_bad_input(gateway: Gateway) -> None:
    for body, param in (
        ({}, "input"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "reasoning": {"effort": "most"}}, "reasoning.effort"),
        ({"input": [{"type": "compaction", "encrypted_content": "x"}]}, "input[0].encrypted_content"),
    ):
        answer = await gateway.http.post("/v1/responses/compact", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
