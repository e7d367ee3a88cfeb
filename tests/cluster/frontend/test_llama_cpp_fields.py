"""What llama.cpp's clients send and read: `json_schema`, `grammar`, `timings_per_token`, `/props`,
`/apply-template`."""

import json
from typing import Any

from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway

USER = {"role": "user", "content": "Hello <|end|>"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
GBNF = 'root ::= "yes" | "no"'
PATHS = {"/v1/chat/completions": {"messages": [USER]}, "/v1/completions": {"prompt": "Hello"}}
TIMINGS = {
    *("cache_n", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second"),
    *("predicted_n", "predicted_ms", "predicted_per_token_ms", "predicted_per_second"),
}


async def test_a_form_under_llama_cpps_names(gateway: Gateway, engine: FakeEngine) -> None:
    for path, body in PATHS.items():
        for ours, theirs in (
            ({"guided_json": SCHEMA}, {"json_schema": SCHEMA}),
            ({"guided_grammar": GBNF}, {"grammar": GBNF}),
            ({}, {"grammar": "", "json_schema": None}),
        ):
            for more in (ours, theirs):
                answer = await gateway.http.post(path, json=body | more)
                assert answer.status_code == 200, answer.text
            first, second = (request.constraint for request in engine.requests[-2:])
            assert first == second
            assert (first is None) == (path == "/v1/completions" and not ours)
        for wrong, param in (
            ({"json_schema": SCHEMA, "grammar": GBNF}, "grammar"),
            ({"json_schema": "{}"}, "json_schema"),
            ({"grammar": "root ::= x"}, "grammar"),
        ):
            refused = await gateway.http.post(path, json=body | wrong)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def check_timings(found: dict[str, Any], usage: dict[str, Any]) -> None:
    assert set(found) == TIMINGS
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert (found["cache_n"], found["prompt_n"]) == (cached, usage["prompt_tokens"] - cached)
    assert found["predicted_n"] == usage["completion_tokens"]
    assert found["prompt_ms"] > 0
    assert found["predicted_ms"] > 0
    assert found["prompt_per_token_ms"] * found["prompt_n"] == found["prompt_ms"] or (
        abs(found["prompt_per_token_ms"] * found["prompt_n"] - found["prompt_ms"]) < 1e-6
    )
    rate = found["predicted_per_second"] * found["predicted_ms"]
    assert abs(rate - 1000 * found["predicted_n"]) < 1e-3


async def test_timings_where_they_are_asked_for(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    ids = encoding.encode_with_special("<|channel|>final<|message|>one two three<|return|>")
    engine.answer = lambda request: Script(ids, num_cached_tokens=2)
    for path, body in PATHS.items():
        asked = body | {"timings_per_token": True, "max_tokens": 50}
        answer = (await gateway.http.post(path, json=asked)).json()
        check_timings(answer["timings"], answer["usage"])
        assert "timings" not in (await gateway.http.post(path, json=body)).json()
        stream = await gateway.http.post(
            path, json=asked | {"stream": True, "stream_options": {"include_usage": True}}
        )
        *chunks, done, _ = stream.text.split("\n\n")
        assert done == "data: [DONE]"
        events = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
        assert all(set(event["timings"]) == TIMINGS for event in events)
        check_timings(events[-1]["timings"], events[-1]["usage"])
        counts = [event["timings"]["predicted_n"] for event in events]
        assert counts == sorted(counts)


async def test_the_template_is_applied(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    chat = {"messages": [{"role": "system", "content": "Be brief."}, USER], "reasoning_effort": "low"}
    applied = (await gateway.http.post("/apply-template", json=chat)).json()["prompt"]
    await gateway.http.post("/v1/chat/completions", json=chat)
    prompt = encoding.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert applied == prompt
    assert applied.endswith("<|start|>assistant")
    bare = await gateway.http.post("/apply-template", json=chat | {"add_generation_prompt": False})
    assert bare.json()["prompt"] == prompt.removesuffix("<|start|>assistant")
    begun = [*chat["messages"], {"role": "assistant", "content": "Hi"}]
    continued = {"messages": begun, "continue_final_message": True}
    assert (
        (await gateway.http.post("/apply-template", json=continued))
        .json()["prompt"]
        .endswith("<|message|>Hi")
    )
    refused = await gateway.http.post("/apply-template", json={"prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")


async def test_props(gateway: Gateway, engine: FakeEngine) -> None:
    props = (await gateway.http.get("/props")).json()
    assert props["default_generation_settings"]["n_ctx"] == engine.max_model_len
    assert (props["model_alias"], props["model_path"]) == ("gpt-oss-test", "fake")
    assert props["total_slots"] == 1024
    assert props["modalities"] == {"vision": False, "audio": False}
    assert props["eos_token"] == "<|return|>"
