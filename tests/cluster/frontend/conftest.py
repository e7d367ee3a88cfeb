"""A gateway over one fake engine, in the test's event loop."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from cluster.harmony.encoding import HarmonyEncoding
from cluster.rpc import inference_pb2_grpc
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import Gateway, make_encoding, serving, turn


@pytest.fixture
def encoding(tmp_path: Path) -> HarmonyEncoding:
    return make_encoding(tmp_path)


@pytest.fixture
async def engine(encoding: HarmonyEncoding) -> AsyncIterator[FakeEngine]:
    engine = await FakeEngine().start()
    ids = turn(encoding, reasoning="The user greets me.", text="Hello there, wörld 🎉!")
    engine.answer = lambda request: Script(ids)
    yield engine
    await engine.stop()


@pytest.fixture
async def gateway(encoding: HarmonyEncoding, engine: FakeEngine) -> AsyncIterator[Gateway]:
    async with serving(encoding, [engine]) as gateway:
        yield gateway


@pytest.fixture
async def stub(gateway: Gateway) -> AsyncIterator[inference_pb2_grpc.InferenceStub]:
    async with grpc.aio.insecure_channel(gateway.grpc_address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)
