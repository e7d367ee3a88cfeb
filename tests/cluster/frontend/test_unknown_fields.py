"""Fields that the server does not know: ignored and named, unless they are typing errors or the
operator wants them refused."""

from pathlib import Path
from typing import Any

import orjson

from cluster.config import GatewayConfig
from cluster.frontend.schema import ChatCompletionRequest
from cluster.frontend.unknown_fields import HEADER, NOT_OFFERED, header_value, misspelt, num_edits
from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import Gateway, serving

USER = {"role": "user", "content": "Hello"}
CHAT = "/v1/chat/completions"
KNOWN = sorted(ChatCompletionRequest.model_fields.keys() | NOT_OFFERED.keys())

MISSPELT = {
    "temprature": "temperature",
    "tempreature": "temperature",
    "Temperature": "temperature",
    "maxTokens": "max_tokens",
    "max-tokens": "max_tokens",
    "max_token": "max_tokens",
    "max_completion_token": "max_completion_tokens",
    "topP": "top_p",
    "modle": "model",
    "modell": "model",
    "steam": "stream",
    "message": "messages",
    "masseges": "messages",
    "tool": "tools",
    "stops": "stop",
    "sede": "seed",
    "reasoning_efort": "reasoning_effort",
    "responce_format": "response_format",
    "N": "n",
    "guided_jsn": "guided_json",
}
OTHER_FIELDS = (
    "mode top_a top_n top_h min_k tfs_z mirostat mirostat_tau typical_p repeat_penalty xtc_threshold "
    "dry_base cache_prompt id_slot n_predict n_probs samplers reasoning_format "
    "think keep_alive options format template raw images num_ctx route provider transforms plugins "
    "usage preset debug trace id t k m no include input instructions truncation background "
    "conversation previous_response_id max_output_tokens text max_new_tokens do_sample details "
    "watermark safe_prompt random_seed prompt_mode context_management mcp_servers container "
    "search_parameters thinking_budget enable_search incremental_output chat_id features files "
    "tool_ids filter_ids variables model_item client_metadata anthropic_version system cache_control "
    "rid score timeout type api_key extra_body extra_headers max_tool_calls max_turns output_config "
    "inference_geo stop_sequences "
)
"""Fields of other servers and APIs, none of which is a typing error."""


def test_typing_errors_are_recognised() -> None:
    assert {name: misspelt(name, KNOWN) for name in MISSPELT} == MISSPELT


def test_fields_of_other_servers_are_no_typing_errors() -> None:
    found = {name: meant for name in OTHER_FIELDS.split() if (meant := misspelt(name, KNOWN))}
    assert found == {}
    assert misspelt("x" * 100_000, KNOWN) is None


def test_edits() -> None:
    pairs = (
        ("", "abc", 3),
        ("abc", "abc", 0),
        ("abc", "acb", 1),
        ("abcd", "abd", 1),
        ("kitten", "sitting", 3),
    )
    for first, second, count in pairs:
        assert num_edits(first, second, count) == num_edits(second, first, 9) == count
        assert count == 0 or num_edits(first, second, count - 1) is None


async def test_an_unknown_field_is_ignored_named_and_counted(gateway: Gateway) -> None:
    body = {"messages": [USER], "frobnicate": 1, "provider": {"order": ["x"]}, "request_id": "a", "rid": None}
    named = "frobnicate, provider, request_id"
    response = await gateway.http.post(CHAT, json=body)
    assert (response.status_code, response.headers[HEADER]) == (200, named)
    stream = await gateway.http.post(CHAT, json={**body, "stream": True})
    assert (stream.status_code, stream.headers[HEADER]) == (200, named)
    assert stream.text.endswith("data: [DONE]\n\n")
    refused = await gateway.http.post(CHAT, json={**body, "temperature": 9})
    assert (refused.status_code, refused.headers[HEADER]) == (400, named)
    completion = await gateway.http.post("/v1/completions", json={"prompt": "x", "messages": [USER]})
    assert (completion.status_code, completion.headers[HEADER]) == (200, "messages")
    assert HEADER not in (await gateway.http.post(CHAT, json={"messages": [USER]})).headers
    page = (await gateway.http.get("/metrics")).text.splitlines()
    counts = [line for line in page if line.startswith("cantata_gateway_ignored_fields_total")]
    labels = 'gateway="",process="gateway",replica=""'
    assert sorted(counts) == [
        f'cantata_gateway_ignored_fields_total{{endpoint="{CHAT}",{labels}}} 9.0',
        f'cantata_gateway_ignored_fields_total{{endpoint="/v1/completions",{labels}}} 1.0',
    ]


async def test_the_header_is_short_and_has_no_text_of_the_client(gateway: Gateway) -> None:
    odd = {"": 1, "a b": 1, "x\r\nset-cookie: y": 1, "ü" * 9: 1, "y" * 65: 1, "<|end|>": 1}
    response = await gateway.http.post(CHAT, content=orjson.dumps({"messages": [USER], **odd}))
    assert response.status_code == 415
    headers = {"content-type": "application/json"}
    response = await gateway.http.post(
        CHAT, content=orjson.dumps({"messages": [USER], **odd}), headers=headers
    )
    assert (response.status_code, response.headers[HEADER]) == (200, "?, ?, ?, ?, ?, ?")
    assert "set-cookie" not in response.headers
    many = {"messages": [USER]} | {"z" * 40 + str(index): 1 for index in range(2000)}
    response = await gateway.http.post(CHAT, json=many)
    assert response.status_code == 200
    assert response.headers[HEADER].endswith(", and 1984 more")
    assert len(response.headers[HEADER]) < 1200
    assert header_value(["a"] * 16) == ", ".join("a" * 16)


async def test_a_typing_error_is_refused_with_the_right_name(gateway: Gateway) -> None:
    for path, wrong, right in (
        (CHAT, "temprature", "temperature"),
        ("/v1/completions", "temprature", "temperature"),
        ("/tokenize", "add_specialtoken", "add_special_tokens"),
    ):
        text = {"messages": [USER]} if path == CHAT else {"prompt": "x"}
        response = await gateway.http.post(path, json={**text, wrong: 0})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == wrong
        assert response.json()["error"]["message"] == f"Unknown field {wrong}: did you mean {right}?"


async def test_what_is_not_offered_is_refused_unless_it_is_off(gateway: Gateway) -> None:
    for name, offs in NOT_OFFERED.items():
        for off in (None, *offs):
            response = await gateway.http.post(CHAT, json={"messages": [USER], name: off})
            assert (response.status_code, response.headers.get(HEADER)) == (200, None)
        on = not offs[0] if offs else {"a": 1}
        response = await gateway.http.post(CHAT, json={"messages": [USER], name: on})
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)


def test_what_is_not_offered_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
    missing = [name for name in NOT_OFFERED if f"`{name}" not in page and not name.startswith("guided_")]
    assert missing == []


EVERYWHERE: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{**USER, "colour": 1}]}, "messages[0].colour"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}]},
        "messages[0].content[0].cache_control",
    ),
    (
        {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}, "defer": True}]},
        "tools[0].defer",
    ),
    (
        {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f", "cache": 1}}]},
        "tools[0].function.cache",
    ),
    (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "c", "function": {"name": "f", "thought": "x"}, "extra_content": {}}
                    ],
                },
            ]
        },
        "messages[1].tool_calls[0].extra_content",
    ),
    ({"messages": [USER], "reasoning": {"effort": "low", "generate": True}}, "reasoning.generate"),
    (
        {"messages": [USER], "chat_template_kwargs": {"add_vision_id": 1}},
        "chat_template_kwargs.add_vision_id",
    ),
    ({"messages": [USER], "stream": True, "stream_options": {"every": 1}}, "stream_options.every"),
    ({"messages": [USER], "response_format": {"type": "text", "x": 1}}, "response_format.x"),
]


async def test_unknown_fields_further_down_are_ignored(gateway: Gateway) -> None:
    for body, _ in EVERYWHERE:
        response = await gateway.http.post(CHAT, json=body)
        assert (response.status_code, response.headers.get(HEADER)) == (200, None), response.text


async def test_a_strict_operator_refuses_all_of_them(encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    async with serving(encoding, [engine], config=GatewayConfig(unknown_fields="refuse")) as gateway:
        for body, param in [*EVERYWHERE, ({"messages": [USER], "frobnicate": 1}, "frobnicate")]:
            response = await gateway.http.post(CHAT, json=body)
            assert response.status_code == 400, param
            error = response.json()["error"]
            assert error["param"] in (param, "messages[1].tool_calls[0].function.thought")
            assert error["message"].endswith(": this server has no such parameter.")
        image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
        response = await gateway.http.post(CHAT, json={"messages": [image]})
        assert "reads text only" in response.json()["error"]["message"]
        known = {"messages": [USER], "verbosity": "low", "echo": False, "separate_reasoning": True}
        response = await gateway.http.post(CHAT, json=known)
        assert (response.status_code, response.headers[HEADER]) == (200, "separate_reasoning")


async def test_fields_of_openais_reference_are_known(gateway: Gateway) -> None:
    body = {
        "messages": [USER],
        "audio": None,
        "metadata": {"run": 7},
        "moderation": {"model": "m"},
        "modalities": ["text"],
        "prediction": {"type": "content", "content": "x"},
        "prompt_cache_key": "k",
        "prompt_cache_options": {"mode": "implicit"},
        "prompt_cache_retention": "24h",
        "safety_identifier": "s",
        "service_tier": "auto",
        "store": True,
        "user": "u",
        "verbosity": "low",
        "web_search_options": {"search_context_size": "low"},
    }
    response = await gateway.http.post(CHAT, json=body)
    assert (response.status_code, response.headers.get(HEADER)) == (200, None), response.text
    response = await gateway.http.post(CHAT, json={"messages": [USER], "audio": {"voice": "alloy"}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "audio")
