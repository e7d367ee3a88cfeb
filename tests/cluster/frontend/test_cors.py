"""Pages in browsers: the questions that a browser asks before a call, and the headers without which
it hides the answer from the page."""

import httpx
import pytest

from cluster.config import GatewayConfig, load_config
from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, serving
from workers.errors import ConfigError, Overloaded

PAGE = "https://chat.example.com"
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hello"}]}
ASKED = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
"""Headers that OpenAI's client sends from a browser, as Chrome lists them."""


async def preflight(gateway: Gateway, origin: str, path: str = CHAT, method: str = "POST") -> httpx.Response:
    """Ask as a browser does before the page's own request: without its key and its body."""
    async with httpx.AsyncClient(base_url=gateway.url, verify=False) as browser:
        return await browser.options(
            path,
            headers={
                "origin": origin,
                "access-control-request-method": method,
                "access-control-request-headers": ASKED,
                "sec-fetch-mode": "cors",
                "sec-fetch-site": "cross-site",
            },
        )


async def test_a_page_of_an_allowed_origin_can_call(encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    config = GatewayConfig(cors_origins=(PAGE, "http://localhost:3000"), api_keys=("key",))
    async with serving(encoding, [engine], config=config) as gateway:
        for origin in config.cors_origins:
            asked = await preflight(gateway, origin)
            assert asked.status_code == 200, asked.text
            assert asked.headers["access-control-allow-origin"] == origin
            assert "POST" in asked.headers["access-control-allow-methods"]
            allowed = asked.headers["access-control-allow-headers"].split(",")
            assert {name.strip() for name in allowed} >= set(ASKED.split(","))
            assert "origin" in asked.headers["vary"].lower()
        from_page = {"origin": PAGE}
        engine_answer = engine.answer
        for change, status in (({}, 200), ({"stream": True}, 200), ({"temperature": 9}, 400)):
            answer = await gateway.http.post(CHAT, json={**BODY, "odd": 1, **change}, headers=from_page)
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE)
            shown = {name.strip() for name in answer.headers["access-control-expose-headers"].split(",")}
            assert shown >= {"x-request-id", "x-cantata-ignored-fields", "retry-after"}
            assert shown >= {f"x-ratelimit-{name}-requests" for name in ("limit", "remaining", "reset")}
            assert {"x-request-id", "x-cantata-ignored-fields"} <= answer.headers.keys()
        without_key = await gateway.http.post(
            CHAT, json=BODY, headers={**from_page, "authorization": "Bearer wrong"}
        )
        assert (without_key.status_code, without_key.headers["access-control-allow-origin"]) == (401, PAGE)
        nowhere = await gateway.http.get("/nothing", headers=from_page)
        assert (nowhere.status_code, nowhere.headers["access-control-allow-origin"]) == (404, PAGE)
        engine.answer = lambda request: Script(refusal=Overloaded("The queue is full."))
        full = await gateway.http.post(CHAT, json=BODY, headers=from_page)
        engine.answer = engine_answer
        assert (full.status_code, full.headers["access-control-allow-origin"]) == (429, PAGE)
        assert "retry-after" in full.headers


async def test_other_pages_cannot(encoding: HarmonyEncoding, engine: FakeEngine, gateway: Gateway) -> None:
    async with serving(encoding, [engine], config=GatewayConfig(cors_origins=(PAGE,))) as restricted:
        for origin in ("https://evil.example", f"{PAGE}.evil.example", "null"):
            assert (await preflight(restricted, origin)).status_code == 400
            answer = await restricted.http.post(CHAT, json=BODY, headers={"origin": origin})
            assert "access-control-allow-origin" not in answer.headers
        assert (await preflight(restricted, PAGE, method="PUT")).status_code == 400
    asked = await preflight(gateway, PAGE)  # without the setting
    assert asked.status_code == 405
    answer = await gateway.http.post(CHAT, json=BODY, headers={"origin": PAGE})
    assert not [name for name in (*asked.headers, *answer.headers) if name.startswith("access-control")]


async def test_a_star_is_every_page(encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    async with serving(encoding, [engine], config=GatewayConfig(cors_origins=("*",))) as gateway:
        assert (await preflight(gateway, "null")).headers["access-control-allow-origin"] == "*"
        answer = await gateway.http.post(CHAT, json=BODY, headers={"origin": PAGE})
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers


def test_what_is_no_origin_is_refused_by_name() -> None:
    good = "https://a.example,http://localhost:3000, chrome-extension://abc, *"
    flags: dict[str, object] = {"engine.model_path": "m"}
    origins = load_config(None, {}, flags | {"gateway.cors_origins": good}).gateway.cors_origins
    assert origins == ("https://a.example", "http://localhost:3000", "chrome-extension://abc", "*")
    for wrong in ("a.example", "https://a.example/", "https://a.example/x", "https://", ""):
        with pytest.raises(ConfigError, match=r"gateway\.cors_origins: .* is not a web origin"):
            load_config(None, {}, flags | {"gateway.cors_origins": [wrong]})
