"""Fields of a chat's body that change the prompt or end the answer."""

import json

import pytest

from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, turn

CHAT = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(("parallel", "num_calls"), [(True, 2), (None, 2), (False, 1)])
async def test_a_second_call_ends_the_answer_if_calls_are_not_parallel(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding, parallel: bool | None, num_calls: int
) -> None:
    call = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|end|>"
    ids = encoding.encode_with_special(f"{call}<|start|>assistant{call}")
    engine.answer = lambda request: Script(ids, finish="length")
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [TOOL],
        "parallel_tool_calls": parallel,
    }
    (choice,) = (await gateway.http.post(CHAT, json=body)).json()["choices"]
    assert len(choice["message"]["tool_calls"]) == num_calls


async def test_the_name_of_a_user_is_shown_to_the_model(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    messages = [{"role": "user", "content": "x", "name": "anna"}, {"role": "user", "content": "y"}]
    assert (await gateway.http.post(CHAT, json={"messages": messages})).status_code == 200
    prompt = encoding.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert "<|start|>user:anna<|message|>x<|end|><|start|>user<|message|>y<|end|>" in prompt


@pytest.mark.parametrize(
    ("stop", "reason"), [({"stop": ["wo"]}, "wo"), ({"stop_token_ids": [33]}, 33), ({}, None)]
)
async def test_whole_or_in_a_stream_the_answer_names_the_stop_and_the_checkpoint(
    gateway: Gateway,
    engine: FakeEngine,
    encoding: HarmonyEncoding,
    stop: dict[str, object],
    reason: str | int | None,
) -> None:
    ids = turn(encoding, text="one two")
    engine.answer = lambda request: Script([*ids[:-1], 33] if reason == 33 else ids)
    body = {"messages": [{"role": "user", "content": "x"}], **stop}
    whole = (await gateway.http.post(CHAT, json=body)).json()
    lines = (await gateway.http.post(CHAT, json={**body, "stream": True})).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert {chunk["system_fingerprint"] for chunk in (whole, *chunks)} == {"fp_fake"}
    finished = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    for choice in (*whole["choices"], *finished):
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", reason)
    assert len(finished) == 1
