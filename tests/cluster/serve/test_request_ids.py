"""Ray Serve gives each HTTP request its id, which an answer has once."""

import uuid
from pathlib import Path

import httpx
import pytest
from ray.serve._private.http_util import RequestIdMiddleware

from cluster.frontend.app import build_app
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import make_encoding, serving, turn

BODY = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.mark.parametrize("given", [None, "trace-1.a:b", "x" * 65, "a b"])
async def test_one_id_which_ids_of_generations_end_in(tmp_path: Path, given: str | None) -> None:
    encoding = make_encoding(tmp_path)
    engine = await FakeEngine().start()
    ids = turn(encoding, text="Hello!")
    engine.answer = lambda request: Script(ids)
    try:
        async with serving(encoding, [engine]) as gateway:
            app = RequestIdMiddleware(build_app(gateway.service, gateway.status, server_has_ids=True))
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://serve") as http:
                headers = {} if given is None else {"x-request-id": given}
                answer = await http.post("/v1/chat/completions", json=BODY, headers=headers)
                refused = await http.get("/nothing", headers=headers)
    finally:
        await engine.stop()
    (shown,) = answer.headers.get_list("x-request-id")
    assert len(refused.headers.get_list("x-request-id")) == 1
    id = answer.json()["id"].removeprefix("chatcmpl-")
    if given in (None, "trace-1.a:b"):
        assert id == shown
        assert given is None or shown == given
    else:
        assert uuid.UUID(id), "what the client sent is not fit for ids and logs"
