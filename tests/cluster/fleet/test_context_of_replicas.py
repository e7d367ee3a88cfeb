"""Replicas of one model with different contexts: the gateway promises what each of them takes."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.assembly import build_gateway
from cluster.config import CantataConfig, load_config
from cluster.fleet.directory import ReplicaSet
from cluster.fleet.probe import Patience
from cluster.fleet.table import Replica, RoutingHint
from cluster.generation import CompletionRequest, GenerationService, ModelInfo
from cluster.harmony.encoding import HarmonyEncoding
from cluster.summary import Reach, start_up_summary
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import make_encoding
from tests.support.tiny_model import TINY, write_tiny_checkpoint
from workers.errors import NoReplica
from workers.rpc.convert import EngineInfo

WAIT_S = 60.0


class Late(FakeEngine):
    """An engine that fails twice before it answers with its model."""

    num_asked = 0

    def info(self) -> EngineInfo:
        self.num_asked += 1
        if self.num_asked < 3:
            raise RuntimeError("not yet")
        return super().info()


async def becomes(service: GenerationService, length: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while service.served.info.max_model_len != length:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.01)


@pytest.fixture
def config(tmp_path: Path) -> CantataConfig:
    return load_config(None, {}, {"engine.model_path": write_tiny_checkpoint(tmp_path)})


@pytest.fixture
def encoding(tmp_path: Path) -> HarmonyEncoding:
    return make_encoding(tmp_path)


@pytest.fixture
async def engines() -> AsyncIterator[list[FakeEngine]]:
    started = [await FakeEngine(max_model_len=length).start() for length in (4096, 2048, 8192, 3072)]
    yield started
    for engine in started:
        await engine.stop()


async def test_the_shortest_counts_as_replicas_come_and_go(
    config: CantataConfig, encoding: HarmonyEncoding, engines: list[FakeEngine]
) -> None:
    four, two, eight, three = [Replica(f"r{index}", engine.address) for index, engine in enumerate(engines)]
    replicas = ReplicaSet()
    replicas.replace([four, eight])
    gateway, infos = build_gateway(config, encoding, replicas)
    service = gateway.service

    try:
        assert (await infos.first()).max_model_len == service.served.info.max_model_len == 4096
        replicas.replace([four, two, eight])
        await becomes(service, 2048)
        replicas.replace([four, eight])
        await becomes(service, 4096)
        replicas.replace([eight])
        await becomes(service, 8192)
        replicas.replace([])  # no replica to ask
        await becomes(service, 8192)
        replicas.replace([Replica(eight.id, three.address)])  # started again, with less memory
        await becomes(service, 3072)
    finally:
        await service.close()


async def test_a_replica_that_does_not_answer_yet_is_asked_again(
    config: CantataConfig, encoding: HarmonyEncoding, engines: list[FakeEngine]
) -> None:
    replicas = ReplicaSet()
    replicas.replace([Replica("a", engines[0].address)])
    gateway, _ = build_gateway(config, encoding, replicas)
    service = gateway.service
    late = Late(max_model_len=1024)
    await late.start()
    try:
        replicas.replace([Replica("a", engines[0].address), Replica("b", late.address)])
        await becomes(service, 1024)
        assert late.num_asked == 3
    finally:
        await service.close()
        await late.stop()


async def test_a_service_without_replicas_refuses_and_serves_once_there_is_one(
    config: CantataConfig, encoding: HarmonyEncoding, engines: list[FakeEngine]
) -> None:
    replicas = ReplicaSet()
    named = config.gateway.model_copy(update={"model_aliases": ("hub/tiny",)})
    gateway, infos = build_gateway(config.model_copy(update={"gateway": named}), encoding, replicas)
    service = gateway.service
    first = asyncio.create_task(infos.first())
    try:
        model = service.served.info
        assert (model.id, model.max_model_len) == ("tiny-0", TINY.max_context_len)
        assert not await gateway.status.ready()
        with pytest.raises(NoReplica):
            await service.complete(CompletionRequest(prompts=((1, 2, 3),)))
        assert not first.done()
        replicas.replace([Replica("a", engines[0].address)])
        async with asyncio.timeout(WAIT_S):
            info = await first
        expected = ModelInfo.from_engine(info, "tiny-0", model.created_unix_s, ("hub/tiny",))
        assert service.served.info == expected
        assert await gateway.status.ready()
    finally:
        await service.close()


OF_THE_MODEL = (
    "1,024 tokens of the model's 131,072, limited by the KV cache; to raise it: --kv-cache-memory, "
)


@pytest.mark.parametrize(
    ("longest", "fp8_cache", "said"),
    [
        (1024, False, "1,024 tokens\n"),
        (
            131072,
            False,
            OF_THE_MODEL + "--kv-cache-dtype fp8 where the device has it, or a machine with more memory\n",
        ),
        (131072, True, OF_THE_MODEL + "or a machine with more memory\n"),
    ],
)
def test_the_summary_says_when_memory_is_the_limit(longest: int, fp8_cache: bool, said: str) -> None:
    text = start_up_summary(
        FakeEngine().info(),
        model_name="m",
        longest_context=longest,
        fp8_cache=fp8_cache,
        num_replicas=1,
        reach=Reach(http=("127.0.0.1", 8000), grpc=("127.0.0.1", 9000), needs_key=False),
        state="off",
    )
    assert "\n  state     off\n" in text
    assert f"\n  context   {said}" in text


async def test_a_silent_replica_is_avoided_after_the_time_that_is_set(
    tmp_path: Path, encoding: HarmonyEncoding, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.fleet.probe.PROBE_PERIOD_S", 0.01)
    flags = {"engine.model_path": write_tiny_checkpoint(tmp_path / "model"), "gateway.probe_timeout_s": 0.2}
    replicas = ReplicaSet()
    hung, other = [Replica(f"r{index}", engine.address, "1") for index, engine in enumerate(engines[:2])]
    replicas.replace([hung])
    config = load_config(None, {}, {**flags, "engine.heartbeat_timeout_s": 7})
    gateway, infos = build_gateway(config, encoding, replicas)
    service = gateway.service
    gate = asyncio.Event()
    engines[0].gate_of_load = gate
    engines[0].answer = lambda request: Script([5, 6], gate=gate, gate_after=1)
    try:
        await infos.first()
        generation = await service.complete(CompletionRequest(prompts=((1, 2, 3),)))
        replicas.replace([hung, other])
        busy = [await replicas.choose(RoutingHint(), frozenset({hung.key})) for _ in range(3)]
        async with asyncio.timeout(WAIT_S):
            while (chosen := await replicas.choose(RoutingHint(), frozenset())) == hung:
                replicas.release(hung)
                await asyncio.sleep(0.01)
        assert [*busy, chosen] == [other] * 4
        assert service._dispatcher._client._patience == Patience(0.2, 7)
        gate.set()
        await generation.aclose()
    finally:
        await service.close()
