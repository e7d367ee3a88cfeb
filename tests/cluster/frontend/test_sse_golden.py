"""The bytes of streams, against transcripts. `python3 -m tests.cluster.frontend.test_sse_golden`
writes them again."""

import asyncio
import re
import tempfile
from pathlib import Path

import pytest

from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, make_encoding, serving, turn

GOLDEN = Path(__file__).parents[2] / "golden" / "sse"
USER = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CASES = {
    "chat": ("/v1/chat/completions", {"messages": [USER], "stream_options": {"include_usage": True}}),
    "chat_tools": ("/v1/chat/completions", {"messages": [USER], "tools": [TOOL]}),
    "chat_logprobs": (
        "/v1/chat/completions",
        {"messages": [USER], "logprobs": True, "top_logprobs": 1, "return_token_ids": True},
    ),
    "completions": (
        "/v1/completions",
        {"prompt": "Once", "logprobs": 1, "stream_options": {"include_usage": True}},
    ),
}


def script(encoding: HarmonyEncoding, name: str) -> Script:
    if name == "chat_tools":
        return Script(
            turn(encoding, reasoning="Call it.", text="One moment.", call=("f", '{"a": "ü"}')), per_message=3
        )
    return Script(turn(encoding, reasoning="Be kind.", text="Hi 🎉 you!"), per_message=2)


async def transcript(gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding, name: str) -> str:
    engine.answer = lambda request: script(encoding, name)
    path, body = CASES[name]
    text = (await gateway.http.post(path, json={**body, "stream": True})).text
    text = re.sub(r'"(chatcmpl|cmpl)-[0-9a-f]{32}"', r'"\1-ID"', text)
    text = re.sub(r'"call_[0-9a-f]{24}"', '"call_ID"', text)
    return re.sub(r'"created":\d+', '"created":0', text)


@pytest.mark.parametrize("name", CASES)
async def test_transcript(gateway: Gateway, engine: FakeEngine, encoding: HarmonyEncoding, name: str) -> None:
    assert await transcript(gateway, engine, encoding, name) == (GOLDEN / f"{name}.txt").read_text()


async def _write() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        encoding = make_encoding(Path(folder))
    engine = await FakeEngine().start()
    async with serving(encoding, [engine]) as gateway:
        for name in CASES:
            (GOLDEN / f"{name}.txt").write_text(await transcript(gateway, engine, encoding, name))
    await engine.stop()


if __name__ == "__main__":
    asyncio.run(_write())
