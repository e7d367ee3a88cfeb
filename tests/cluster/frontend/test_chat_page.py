"""The files of the page at `/`, over HTTP: headers, caching, prefixes."""

import gzip
import re
from urllib.parse import urljoin

import httpx

from cluster.config import GatewayConfig
from cluster.frontend import chat_page
from cluster.frontend.app import build_app
from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import Gateway, serving


def links(page: str) -> list[str]:
    """Return the files that the page's HTML names."""
    return sorted(set(re.findall(r'(?:src|href)="(page/[^"]*)"', page)))


async def test_files_are_safe_to_show_and_small(gateway: Gateway) -> None:
    page = await gateway.http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<script>" not in page.text
    assert not re.search(r"\s(?:style|on\w+)=", page.text), "the policy forbids inline styles and handlers"
    assert not re.search(r"https?://", page.text), "the page loads nothing from elsewhere"
    size = 0
    for path in sorted(chat_page.PATHS - {""}):
        file = await gateway.http.get(path)
        assert file.status_code == 200, path
        policy = file.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert file.headers["x-content-type-options"] == "nosniff"
        assert file.headers["content-encoding"] == "gzip"
        size += int(file.headers["content-length"])
    assert size < 60_000
    assert {f"/{link}" for link in links(page.text)} < chat_page.PATHS


async def test_a_browser_asks_whether_its_copy_is_current(gateway: Gateway) -> None:
    first = await gateway.http.get("/page/main.js")
    assert first.headers["cache-control"] == "no-cache"
    assert first.headers["vary"] == "accept-encoding"
    tag = first.headers["etag"]
    for known in (tag, f'"other", W/{tag}', "*"):
        again = await gateway.http.get("/page/main.js", headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert "content-encoding" not in again.headers
    assert (await gateway.http.get("/page/main.js", headers={"if-none-match": '"other"'})).status_code == 200
    for accepted in ("identity", "br", "gzip;q=0"):
        plain = await gateway.http.get("/page/main.js", headers={"accept-encoding": accepted})
        assert "content-encoding" not in plain.headers
        assert plain.content == first.content
        assert plain.headers["etag"] != tag
    head = await gateway.http.head("/")
    assert (head.status_code, head.content) == (200, b"")
    async with gateway.http.stream("GET", "/page/main.js") as raw:
        assert gzip.decompress(b"".join([part async for part in raw.aiter_raw()])) == first.content


async def test_without_the_page_its_paths_are_unknown(encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    async with serving(encoding, [engine], config=GatewayConfig(page=False)) as gateway:
        for path in ("/", "/page/main.js"):
            refused = await gateway.http.get(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "unknown_route")
    config = GatewayConfig(page=False, api_keys=("first",))
    async with serving(encoding, [engine], config=config) as gateway:
        assert (await gateway.http.get("/", headers={"authorization": ""})).status_code == 401


async def test_its_files_need_no_key(encoding: HarmonyEncoding, engine: FakeEngine) -> None:
    async with serving(encoding, [engine], config=GatewayConfig(api_keys=("first",))) as gateway:
        without_key = {"authorization": ""}
        for path in sorted(chat_page.PATHS - {""}):
            assert (await gateway.http.get(path, headers=without_key)).status_code == 200
        unknown = await gateway.http.get("/page/none.js", headers=without_key)
        assert unknown.status_code == 401
        assert (await gateway.http.get("/page/none.js")).json()["error"]["code"] == "unknown_route"


async def test_it_works_under_a_prefix(gateway: Gateway) -> None:
    """A prefix as Ray Serve's `route_prefix`: the path includes it, and `root_path` names it."""
    app = build_app(gateway.service, gateway.status, GatewayConfig(api_keys=("first",)))
    transport = httpx.ASGITransport(app=app, root_path="/models/demo")
    async with httpx.AsyncClient(transport=transport, base_url="http://host") as http:
        bare = await http.get("/models/demo")
        assert bare.status_code == 307
        address = urljoin("http://host/models/demo", bare.headers["location"])
        assert address == "http://host/models/demo/"
        page = await http.get(address)
        assert page.status_code == 200
        for link in links(page.text):
            assert (await http.get(urljoin(address, link))).status_code == 200, link
        assert (await http.get("/models/demo/health")).status_code == 200
        assert (await http.get("/models/demo/v1/models")).status_code == 401
