"""The Messages API with `gateway.unknown_fields: refuse` knows what Anthropic's clients send."""

import asyncio
import json
import typing
from typing import Any

import pytest
from anthropic.types import beta
from pydantic import BaseModel

from cluster.config import GatewayConfig
from cluster.frontend.anthropic import schema
from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import serving, turn

CACHED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


@pytest.mark.parametrize(
    ("own", "anthropic"),
    [
        (schema.TextBlock, beta.BetaTextBlockParam),
        (schema.ThinkingBlock, beta.BetaThinkingBlockParam),
        (schema.RedactedThinkingBlock, beta.BetaRedactedThinkingBlockParam),
        (schema.ToolUseBlock, beta.BetaToolUseBlockParam),
        (schema.ToolResultBlock, beta.BetaToolResultBlockParam),
        (schema.MessageTurn, beta.BetaUserMessageParam),
        (schema.ClientTool, beta.BetaToolParam),
        (schema.CallChoice, beta.BetaToolChoiceToolParam),
        (schema.ThinkingOption, beta.BetaThinkingConfigEnabledParam),
        (schema.AnswerFormat, beta.BetaJSONOutputFormatParam),
        (schema.OutputConfig, beta.BetaOutputConfigParam),
        (schema.Metadata, beta.BetaMetadataParam),
    ],
)
def test_fields_of_anthropic_s_types_are_known(own: type[BaseModel], anthropic: type) -> None:
    known = {field.alias or name for name, field in own.model_fields.items()}
    assert typing.get_type_hints(anthropic).keys() <= known


async def test_a_tool_loop_as_claude_code_sends_it(engine: FakeEngine, encoding: HarmonyEncoding) -> None:
    """The fields of its requests, with an answer of this server that comes back as Anthropic's
    library dumps it, and marks for the cache wherever they may be."""
    tool = {"name": "Read", "description": "Read a file.", "input_schema": {"type": "object"}, **CACHED}
    body: dict[str, Any] = {
        "model": "gpt-oss-test",
        "system": [{"type": "text", "text": "You are an agent.", **CACHED}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Read it.", **CACHED}]}],
        "tools": [{**tool, "eager_input_streaming": True}],
        "metadata": {"user_id": json.dumps({"session_id": "s"})},
        "max_tokens": 500,
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
    }
    ids = turn(encoding, reasoning="Look.", text="I look.", call=("Read", "{}"))
    engine.answer = lambda request: Script(ids)
    config = GatewayConfig(unknown_fields="refuse", stream_headers_s=60.0)
    async with serving(encoding, [engine], config=config) as gateway, asyncio.timeout(60):
        first = await gateway.http.post("/v1/messages?beta=true", json=body)
        assert first.status_code == 200, first.text
        blocks = beta.BetaMessage.model_validate_json(first.content).model_dump()["content"]
        assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use"]
        content = [{"type": "text", "text": "hello", **CACHED}]
        result = {"type": "tool_result", "tool_use_id": blocks[-1]["id"], "content": content, **CACHED}
        blocks[-1] = {**blocks[-1], "caller": {"type": "direct"}, **CACHED}
        body["messages"] += [
            {"role": "assistant", "content": blocks},
            {"role": "user", "content": [result]},
        ]
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            if path.endswith("count_tokens"):
                body = {name: body[name] for name in ("model", "system", "messages", "tools", "thinking")}
            second = await gateway.http.post(path, json=body)
            assert second.status_code == 200, second.text
        body["messages"][0]["content"][0]["cache_controls"] = {}
        refused = await gateway.http.post("/v1/messages/count_tokens", json=body)
        assert refused.status_code == 400
        assert "messages.0.content.0.cache_controls" in refused.json()["error"]["message"]
