"""What a gateway on Ray Serve makes of its deployment's settings and of Serve's gRPC contexts."""

import contextlib
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import httpx
import pytest
from ray.serve.grpc_util import RayServegRPCContext

from cluster.config import GatewayConfig
from cluster.frontend.grpc_api import InferenceServicer
from cluster.frontend.grpc_handlers import ReceivedHere
from cluster.rpc import inference_pb2 as pb
from cluster.serve.cluster_view import RefusedCall
from cluster.serve.gateway import GatewayReplica
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import make_encoding, serving

PAGE = "https://chat.example.com"


async def test_pages_may_call_it_and_unknown_fields_are_refused(tmp_path: Path) -> None:
    engine = await FakeEngine().start()
    try:
        async with serving(make_encoding(tmp_path), [engine]) as gateway:
            config = SimpleNamespace(gateway=GatewayConfig(cors_origins=(PAGE,), unknown_fields="refuse"))
            parts = SimpleNamespace(
                _service=gateway.service, _status=gateway.status, _config=config, _state=None
            )
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


class NativeContext:
    """The context of Serve's gRPC server, with what Serve reads of it and sets on it."""

    def __init__(self) -> None:
        self.sent: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("set_"):
            return lambda value: self.sent.update({name.removeprefix("set_"): value})
        return lambda: ()


@pytest.mark.parametrize("streams", [False, True], ids=["Chat", "ChatStream"])
@pytest.mark.parametrize("through_proxy", [False, True], ids=["direct", "through Serve's proxy"])
async def test_a_refused_grpc_call_names_its_field(
    tmp_path: Path, streams: bool, through_proxy: bool
) -> None:
    """Serve sends the metadata at a method's end or, through its proxy, with a message. What raises
    has its status alone, and a stream that ends without a message through the proxy is OK."""
    engine = await FakeEngine().start()
    received = ReceivedHere(pb.ChatRequest().SerializeToString())
    # The proxy receives the call in its own process.
    request = pickle.loads(pickle.dumps(received)) if through_proxy else received
    native, messages = NativeContext(), []
    context = RayServegRPCContext(cast("Any", native))
    try:
        async with serving(make_encoding(tmp_path), [engine]) as gateway:
            parts: Any = SimpleNamespace(_servicer=InferenceServicer(gateway.service, GatewayConfig()))
            raises = streams and through_proxy
            with pytest.raises(RefusedCall) if raises else contextlib.nullcontext():
                if streams:
                    messages = [event async for event in GatewayReplica.ChatStream(parts, request, context)]
                else:
                    await GatewayReplica.Chat(parts, request, context)
    finally:
        await engine.stop()
    assert messages == []
    context._set_on_grpc_context(cast("Any", native))
    assert native.sent["code"] is grpc.StatusCode.INVALID_ARGUMENT
    assert "messages" in native.sent["details"]
    assert ("param", "messages") in native.sent["trailing_metadata"]
