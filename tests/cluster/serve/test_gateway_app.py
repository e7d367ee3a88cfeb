"""The app that a gateway on Ray Serve serves has the deployment's settings."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx

from cluster.config import GatewayConfig
from cluster.serve.gateway import GatewayReplica
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import make_encoding, serving

PAGE = "https://chat.example.com"


async def test_pages_may_call_it_and_unknown_fields_are_refused(tmp_path: Path) -> None:
    engine = await FakeEngine().start()
    try:
        async with serving(make_encoding(tmp_path), [engine]) as gateway:
            config = SimpleNamespace(gateway=GatewayConfig(cors_origins=(PAGE,), unknown_fields="refuse"))
            parts = SimpleNamespace(_service=gateway.service, _status=gateway.status, _config=config)
            app = GatewayReplica.__serve_build_asgi_app__(cast("Any", parts))
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://serve") as http:
                headers = {"origin": PAGE, "access-control-request-method": "POST"}
                asked = await http.options("/v1/chat/completions", headers=headers)
                body = {"messages": [{"role": "user", "content": "Hello"}], "frobnicate": 1}
                refused = await http.post("/v1/chat/completions", json=body, headers={"origin": PAGE})
    finally:
        await engine.stop()
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, PAGE)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (400, PAGE)
    assert refused.json()["error"]["param"] == "frobnicate"
