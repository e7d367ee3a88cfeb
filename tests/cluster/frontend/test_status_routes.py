"""Health, readiness, tokens, metrics, version, the OpenAPI document."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import GatewayConfig
from cluster.frontend.schema import ChatCompletionRequest, TokenizeRequest
from cluster.frontend.unknown_fields import HEADER as IGNORED_FIELDS
from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, serving, turn
from workers.errors import Overloaded

USER = {"role": "user", "content": "Hello <|end|> there"}


async def test_health_is_of_the_process_and_readiness_of_the_replicas(
    gateway: Gateway, engine: FakeEngine
) -> None:
    assert (await gateway.http.get("/ready")).status_code == 200
    engine.accepting = False
    refused = await gateway.http.get("/ready")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_replica")
    engine.accepting = True
    assert (await gateway.http.get("/ready")).status_code == 200
    await engine.stop()
    assert (await gateway.http.get("/ready")).status_code == 503
    assert (await gateway.http.get("/health")).json() == {"status": "ok"}


async def test_tokenize_and_back(gateway: Gateway, encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    text = "<|start|>user<|message|>Grüße 🎉"
    answer = (await gateway.http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    assert answer["tokens"] == encoding.encode_with_special(text)
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == engine.max_model_len
    assert answer["token_strs"][0] == "<|start|>"
    back = await gateway.http.post("/detokenize", json={"tokens": answer["tokens"], "model": "gpt-oss-test"})
    assert back.json() == {"prompt": text}
    without = (await gateway.http.post("/tokenize", json={"prompt": "", "add_special_tokens": True})).json()
    assert (without["tokens"], without["token_strs"]) == ([], None)


TOOL = {"type": "function", "function": {"name": "f"}}
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}}
CHATS: list[dict[str, Any]] = [
    {"tools": [TOOL], "chat_template_kwargs": {"reasoning_effort": "low", "current_date": "2026-02-03"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": POINT}}},
    {"response_format": {"type": "json_object"}},
    {"tools": [TOOL], "tool_choice": "none"},
    {"tools": [TOOL], "tool_choice": "required"},
    {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"reasoning_effort": "high"},
    {"reasoning": {"effort": "minimal"}},
    {"thinking": {"type": "disabled"}},
    {"enable_thinking": False},
]


@pytest.mark.parametrize("fields", CHATS, ids=json.dumps)
async def test_tokenize_of_a_chat_is_the_prompt_that_the_engine_gets(
    gateway: Gateway, engine: FakeEngine, fields: dict[str, Any]
) -> None:
    chat = {"messages": [{"role": "developer", "content": "Be brief."}, USER], **fields}
    answer = await gateway.http.post("/tokenize", json=chat)
    assert IGNORED_FIELDS not in answer.headers
    assert (await gateway.http.post("/v1/chat/completions", json=chat)).status_code == 200
    assert tuple(answer.json()["tokens"]) == engine.requests[0].prompt_token_ids


OTHER_FIELDS: dict[str, Any] = {
    "model": "gpt-oss-test",
    "max_tokens": 9,
    "max_completion_tokens": 9,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.1,
    "presence_penalty": 1,
    "frequency_penalty": 1,
    "repetition_penalty": 1.5,
    "logit_bias": {"5": 1},
    "seed": 1,
    "prompt_logprobs": 1,
    "timings_per_token": True,
    "json_schema": None,
    "grammar": "",
    "stop": "x",
    "stop_token_ids": [5],
    "min_tokens": 1,
    "n": 2,
    "ignore_eos": False,
    "stream": False,
    "stream_options": None,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "allowed_token_ids": None,
    "bad_words": ["x"],
    "priority": 1,
    "cache_salt": "a",
    "structured_outputs": {"json": POINT},
    "guided_json": POINT,
    "user": "u",
    "guided_regex": None,
    "guided_choice": None,
    "guided_grammar": None,
    "parallel_tool_calls": False,
    "max_parallel_tool_calls": 1,
    "logprobs": True,
    "top_logprobs": 1,
    "max_reasoning_tokens": 5,
    "thinking_token_budget": 5,
    "harmony_constraint": "headers",
    "include_reasoning": False,
    "modalities": ["text"],
    "functions": None,
    "function_call": None,
    "skip_special_tokens": True,
    "audio": None,
    "metadata": {"a": 1},
    "store": False,
    "service_tier": "auto",
    "prediction": {},
    "prompt_cache_key": "a",
    "prompt_cache_options": {},
    "prompt_cache_retention": "24h",
    "safety_identifier": "a",
    "moderation": {},
    "verbosity": "low",
    "web_search_options": {},
}
"""Fields of a chat that /tokenize does not have, with values that differ from the defaults where
they may; `truncate_prompt_tokens` is left out, which cuts the prompt afterwards."""


async def test_no_other_field_of_a_chat_changes_its_prompt(gateway: Gateway, engine: FakeEngine) -> None:
    without = ChatCompletionRequest.model_fields.keys() - TokenizeRequest.model_fields.keys()
    assert OTHER_FIELDS.keys() - {"model"} == without - {"truncate_prompt_tokens", "truncation_side"}
    plain = (await gateway.http.post("/tokenize", json={"messages": [USER]})).json()["tokens"]
    chat = await gateway.http.post("/v1/chat/completions", json={"messages": [USER], **OTHER_FIELDS})
    assert chat.status_code == 200, chat.text
    assert tuple(plain) == engine.requests[0].prompt_token_ids


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
         "response_format.json_schema.name"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
    ],
)  # fmt: skip
async def test_tokenize_refuses_what_a_chat_refuses(
    gateway: Gateway, fields: dict[str, Any], param: str
) -> None:
    for path in ("/tokenize", "/v1/chat/completions"):
        refused = await gateway.http.post(path, json={"messages": [USER], **fields})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), path


async def test_tokenize_needs_one_of_prompt_and_messages(gateway: Gateway) -> None:
    for body in ({}, {"prompt": "x", "messages": [USER]}):
        refused = await gateway.http.post("/tokenize", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    missing = await gateway.http.post("/detokenize", json={"tokens": [99999]})
    assert (missing.status_code, missing.json()["error"]["param"]) == (400, "tokens")


async def test_metrics_of_all_processes_on_one_page(encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    other = await FakeEngine().start()
    gone = await FakeEngine().start()
    await gone.stop()
    try:
        async with serving(encoding, [engine, other, gone]) as gateway:
            body = {"messages": [USER], "stream": True}
            assert (await gateway.http.post("/v1/chat/completions", json=body)).status_code == 200
            await gateway.http.post("/v1/chat/completions", json={})
            page = await gateway.http.get("/metrics")
    finally:
        await other.stop()
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = page.text.splitlines()
    heads = [line.split()[:3] for line in lines if line.startswith("# ")]
    assert len(heads) == len({tuple(head) for head in heads}), "a family appears twice"
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
    }

    def value(name: str, process: str, replica: str, **labels: str) -> float:
        return samples[
            (name, *sorted({**labels, "process": process, "replica": replica, "gateway": ""}.items()))
        ]

    assert value("cantata_process_up", "gateway", "") == 1
    assert (samples[("cantata_replicas_wanted",)], samples[("cantata_replicas_ready",)]) == (3, 2)
    assert [value("cantata_process_up", "engine", replica) for replica in ("r0", "r1", "r2")] == [1, 1, 0]
    assert [value("cantata_engine_preemptions_total", "engine", replica) for replica in ("r0", "r1")] == [
        3,
        3,
    ]
    path = "/v1/chat/completions"
    assert value("cantata_gateway_requests_total", "gateway", "", endpoint=path, status="200") == 1
    assert value("cantata_gateway_requests_total", "gateway", "", endpoint=path, status="400") == 1
    assert value("cantata_gateway_finished_choices_total", "gateway", "", finish_reason="stop") == 1
    tokens = {
        name: value(f"cantata_gateway_{name}_tokens_total", "gateway", "")
        for name in ("prompt", "cached", "reasoning", "output")
    }
    assert tokens["prompt"] > 0
    assert tokens["output"] > tokens["reasoning"] > 0
    assert value("cantata_gateway_time_to_first_token_seconds_count", "gateway", "") == 1
    assert value("cantata_gateway_inter_token_latency_seconds_count", "gateway", "") == tokens["output"] - 1
    assert value("cantata_harmony_repairs_total", "gateway", "", kind="no_markup") == 0


async def test_requests_that_every_replica_refuses_are_no_generations(
    gateway: Gateway, engine: FakeEngine
) -> None:
    served = engine.answer
    engine.answer = lambda request: Script(refusal=Overloaded("The queue is full."))
    assert (await gateway.http.post("/v1/chat/completions", json={"messages": [USER]})).status_code == 429
    lines = (await gateway.http.get("/metrics")).text.splitlines()
    label = '{gateway="",process="gateway",replica=""}'
    assert f"cantata_gateway_prompt_tokens_total{label} 0.0" in lines
    assert f"cantata_gateway_request_duration_seconds_count{label} 0.0" in lines
    assert f"cantata_gateway_in_flight_requests{label} 0.0" in lines
    engine.answer = served
    assert (await gateway.http.post("/v1/chat/completions", json={"messages": [USER]})).status_code == 200
    assert (
        f"cantata_gateway_request_duration_seconds_count{label} 1.0"
        in (await gateway.http.get("/metrics")).text
    )


async def test_version_and_openapi(gateway: Gateway) -> None:
    version = (await gateway.http.get("/version")).json()["version"]
    document = (await gateway.http.get("/openapi.json")).json()
    assert document["info"]["version"] == version
    assert {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ready",
    } <= set(document["paths"])
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    references = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert references <= set(schemas)
    assert {"temperature", "messages", "tools"} <= set(schemas["ChatCompletionRequest"]["properties"])
    assert "usage" in schemas["ChatCompletion"]["properties"]
    assert (await gateway.http.get("/docs")).status_code == 200


async def test_every_field_of_the_bodies_is_documented(gateway: Gateway) -> None:
    page = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
    schemas = (await gateway.http.get("/openapi.json")).json()["components"]["schemas"]
    for name in ("ChatCompletionRequest", "CompletionRequest", "TokenizeRequest", "DetokenizeRequest"):
        missing = [field for field in schemas[name]["properties"] if f"`{field}`" not in page]
        assert not missing, f"docs/api.md does not mention {missing} of {name}"


async def test_tokens_count_as_they_come(
    gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding
) -> None:
    """A rate over long answers must not stand still while they run and jump when they end."""
    ids = turn(encoding, reasoning="one two three", text="four five six seven")
    gate = asyncio.Event()
    engine.answer = lambda request: Script(ids, gate=gate, gate_after=len(ids) - 2, num_cached_tokens=3)
    stream = await gateway.client.chat.completions.create(model="gpt-oss-test", messages=[USER], stream=True)
    async with asyncio.timeout(20):
        while await counted(gateway, "output") < len(ids) - 2:
            await anext(stream)
    assert await counted(gateway, "prompt") == len(engine.requests[0].prompt_token_ids)
    assert await counted(gateway, "cached") == 3
    reasoning = await counted(gateway, "reasoning")
    assert reasoning > 0
    gate.set()
    async for _ in stream:
        pass
    assert [await counted(gateway, kind) for kind in ("output", "cached", "reasoning")] == [
        len(ids),
        3,
        reasoning,
    ]


async def counted(gateway: Gateway, kind: str) -> float:
    page = (await gateway.http.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(page)}
    return sum(sample.value for sample in families[f"cantata_gateway_{kind}_tokens"].samples)


async def test_the_docs_page_needs_no_other_server(encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    keys = GatewayConfig(api_keys=("first",))
    async with serving(encoding, [engine], config=keys) as gateway:
        without_key = {"authorization": ""}
        page = (await gateway.http.get("/docs", headers=without_key)).text
        links = re.findall(r'(?:src|href)="([^"]*)"|url: \'([^\']*)\'', page)
        paths = ["".join(link) for link in links]
        assert len(paths) == 4
        assert all(path.startswith("/") for path in paths)
        for path in paths:
            assert (await gateway.http.get(path, headers=without_key)).status_code == 200, path
        metrics = (await gateway.http.get("/metrics")).text
        for path in ("/docs", "/openapi.json"):
            assert f'endpoint="{path}",gateway="",process="gateway",replica="",status="200"}} 1.0' in metrics
        assert 'endpoint="unknown"' not in metrics
