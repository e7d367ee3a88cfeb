"""The headers `x-ratelimit-…`: what the gateway's admission really has room for."""

import asyncio

import httpx

from cluster.config import GatewayConfig
from cluster.generation import Capacity
from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import serving, turn

USER = {"role": "user", "content": "Hello"}
CHAT = "/v1/chat/completions"
CONFIG = GatewayConfig(api_keys=("key",), stream_headers_s=60.0)


def shown(answer: httpx.Response) -> tuple[str | None, ...]:
    return tuple(
        answer.headers.get(f"x-ratelimit-{name}-requests") for name in ("limit", "remaining", "reset")
    )


async def test_they_tell_the_room_of_the_gateway(encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    gate = asyncio.Event()
    ids = turn(encoding, text="one two")
    async with serving(encoding, [engine], config=CONFIG, capacity=Capacity(4, None)) as gateway:
        idle = await gateway.http.post(CHAT, json={"messages": [USER]})
        assert (idle.status_code, shown(idle)) == (200, ("4", "4", "0s"))
        engine.answer = lambda request: Script(ids, gate=gate, gate_after=4)
        body = {"messages": [USER], "stream": True}
        async with gateway.http.stream("POST", CHAT, json={**body, "n": 3}) as running:
            assert shown(running) == ("4", "1", "0s")
            async with gateway.http.stream(
                "POST", "/v1/completions", json={"prompt": "a", "stream": True}
            ) as last:
                assert shown(last) == ("4", "0", "1s")
                refused = await gateway.http.post(CHAT, json={"messages": [USER]})
                assert (refused.status_code, shown(refused)) == (429, ("4", "0", "1s"))
                assert refused.headers["retry-after"] == "1"
                wrong = await gateway.http.post(CHAT, json={"messages": [USER], "temperature": 9})
                assert (wrong.status_code, shown(wrong)) == (400, ("4", "0", "1s"))
                gate.set()
        for answer in (
            await gateway.http.post(CHAT, json={"messages": [USER]}, headers={"authorization": "Bearer x"}),
            await gateway.http.post("/tokenize", json={"prompt": "a"}),
            await gateway.http.get(CHAT),
        ):
            assert shown(answer) == (None, None, None)
