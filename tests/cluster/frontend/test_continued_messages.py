"""`continue_final_message`: the prompt, where the constraint begins, and the answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, make_encoding, serving
from tests.support.random_engine import RandomEngine, write_random_checkpoint

USER = {"role": "user", "content": "Hello"}
OFF = {"harmony_constraint": "off"}
CONTINUES = {"continue_final_message": True, "add_generation_prompt": False}
SCHEMA = {
    "type": "object",
    "properties": {"ab": {"enum": [12, 13]}},
    "required": ["ab"],
    "additionalProperties": False,
}
FORM = {"guided_json": SCHEMA}


def body(content: str | None = "Hi th", reasoning: str | None = None, **more: Any) -> dict[str, Any]:
    last = {"role": "assistant", "content": content, "reasoning": reasoning}
    return {"messages": [USER, last], **CONTINUES, **more}


async def chat(gateway: Gateway, asked: dict[str, Any]) -> dict[str, Any]:
    answer = await gateway.http.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.parametrize(
    ("content", "reasoning", "begun"),
    [
        ("Hi <|end|>", None, "<|channel|>final<|message|>"),
        (
            "Hi",
            "I think.",
            "<|channel|>analysis<|message|>I think.<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        ("", None, "<|channel|>final<|message|>"),
        (None, "I thi", "<|channel|>analysis<|message|>"),
    ],
)
async def test_the_prompt_ends_with_the_begun_message(
    gateway: Gateway,
    engine: FakeEngine,
    encoding: HarmonyEncoding,
    content: str | None,
    reasoning: str | None,
    begun: str,
) -> None:
    ids = encoding.encode_with_special("ere.<|return|>")
    engine.answer = lambda request: Script(ids)
    without = (await gateway.http.post("/tokenize", json={"messages": [USER]})).json()["tokens"]
    text = (reasoning if content is None else content) or ""
    expected = [*without, *encoding.encode_with_special(begun), *encoding.encode(text)]
    asked = body(content, reasoning)
    assert (await gateway.http.post("/tokenize", json=asked)).json()["tokens"] == expected
    await chat(gateway, asked | OFF)
    answer = await chat(gateway, asked | {"max_tokens": 7, "min_tokens": 2, "return_token_ids": True})
    free, constrained = engine.requests
    assert list(free.prompt_token_ids) == expected
    assert free.output_token_ids == ()
    # With a constraint the automaton has to pass the begun message, so it counts as output.
    assert [*constrained.prompt_token_ids, *constrained.output_token_ids] == expected
    num_begun = len(constrained.output_token_ids)
    last = begun.rpartition("assistant")[2]
    assert list(constrained.output_token_ids) == [*encoding.encode_with_special(last), *encoding.encode(text)]
    assert (constrained.sampling.max_tokens, constrained.sampling.min_tokens) == (
        7 + num_begun,
        2 + num_begun,
    )
    assert answer["prompt_token_ids"] == expected
    assert answer["usage"]["prompt_tokens"] == len(expected)
    assert answer["usage"]["completion_tokens"] == len(ids)


async def test_the_answer_is_the_rest(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    rest = encoding.encode_with_special("ere, wörld<|return|>")
    engine.answer = lambda request: Script(rest)
    for extra in ({}, OFF):
        answer = await chat(gateway, body(logprobs=True, **extra))
        assert answer["choices"][0]["message"]["content"] == "ere, wörld"
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
        stream = await gateway.client.chat.completions.create(
            model="gpt-oss-test", messages=body()["messages"], stream=True, extra_body=CONTINUES | extra
        )
        deltas = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(deltas) == "ere, wörld"
    stopped = await chat(gateway, body(stop=["Hi th", ", w"]))
    assert stopped["choices"][0]["message"]["content"] == "ere"
    thought = encoding.encode_with_special(
        "nk.<|end|><|start|>assistant<|channel|>final<|message|>Hi.<|return|>"
    )
    engine.answer = lambda request: Script(thought)
    answer = await chat(gateway, body(None, "I thi", max_reasoning_tokens=50))
    message = answer["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("nk.", "Hi.")
    num_reasoning = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert num_reasoning == len(encoding.encode("nk."))
    limits = engine.requests[-1].constraint_limits
    await chat(gateway, {"messages": [USER], "max_reasoning_tokens": 50})
    plain = engine.requests[-1].constraint_limits
    assert limits.max_counted_tokens == (plain.max_counted_tokens or 0) + len(encoding.encode("I thi"))


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (body(add_generation_prompt=True), "continue_final_message"),
        ({"messages": [USER], **CONTINUES}, "continue_final_message"),
        ({"messages": [USER], "add_generation_prompt": False}, "add_generation_prompt"),
        (body(truncate_prompt_tokens=5, truncation_side="right"), "continue_final_message"),
        (body(truncate_prompt_tokens=2), "continue_final_message"),
        (body(None, "I thi", max_reasoning_tokens=0), "continue_final_message"),
        (body(None, "I thi", reasoning_effort="none"), "continue_final_message"),
        (
            body(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="required"),
            "continue_final_message",
        ),
        (body("{ x", **FORM), "continue_final_message"),
        (body('{"ab": 12}}', **FORM), "continue_final_message"),
    ],
)
async def test_what_cannot_be_continued_is_refused(
    gateway: Gateway, asked: dict[str, Any], param: str
) -> None:
    refused = await gateway.http.post("/v1/chat/completions", json=asked)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_a_call_is_not_continued(gateway: Gateway) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}
    last = {"role": "assistant", "content": "", "tool_calls": [call]}
    refused = await gateway.http.post("/v1/chat/completions", json={"messages": [USER, last], **CONTINUES})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "continue_final_message")


async def test_a_real_engine_goes_on_within_the_form(tmp_path: Path, encoding: HarmonyEncoding) -> None:
    """Its model has random weights: what it writes is decided by the form alone."""
    engine = await RandomEngine(write_random_checkpoint(tmp_path / "model", make_encoding(tmp_path))).start()
    try:
        async with serving(encoding, [engine]) as gateway:
            for begun in ('{"ab":', '{"ab": 1', '{"ab": 13}'):
                answer = await chat(gateway, body(begun, max_tokens=60, seed=3, **FORM))
                rest = answer["choices"][0]["message"]["content"] or ""
                assert json.loads(begun + rest)["ab"] in (12, 13)
                assert answer["choices"][0]["finish_reason"] == "stop"
    finally:
        await engine.stop()
