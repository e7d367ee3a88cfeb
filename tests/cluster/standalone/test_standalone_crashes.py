"""Standalone serving when its engines only crash: the server ends, with the reason."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from cluster import cli
from cluster.config import CantataConfig, load_config
from cluster.fleet.directory import ReplicaSet
from cluster.fleet.infos import ReplicaInfos
from cluster.standalone import serve as standalone
from cluster.standalone import supervisor
from cluster.standalone.supervisor import EngineFailed, EngineProcess
from tests.support.fake_engine import FakeEngine
from workers.rpc.convert import EngineInfo

CHILD = """
import json, os, signal, sys
address, marker = sys.argv[1:]
if os.path.exists(marker):
    os.kill(os.getpid(), signal.SIGILL)
print(json.dumps({"event": "ready", "address": address, "start_id": str(os.getpid())}), flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
while True:
    signal.pause()
"""


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in another process
            await asyncio.sleep(0.01)


async def test_the_server_ends_when_no_engine_will_serve_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, markers = tmp_path / "model", [tmp_path / f"marker-{index}" for index in range(2)]
    assert cli.main(["make-checkpoint", "--preset", "tiny", "--layers", "1", str(model)]) == 0
    fakes = [await FakeEngine().start() for _ in range(2)]
    engines: list[EngineProcess] = []
    make = standalone._engines

    def scripted(config: CantataConfig, replicas: ReplicaSet, sockets: Path) -> list[EngineProcess]:
        engines.extend(make(config, replicas, sockets))
        for index, (engine, fake) in enumerate(zip(engines, fakes, strict=True)):
            engine._command = [sys.executable, "-c", CHILD, fake.address, str(markers[index])]
        return engines

    drain, drain_times_s = standalone._drain, []

    async def spied(*arguments: Any) -> None:
        drain_times_s.append(arguments[-1])
        await drain(*arguments)

    monkeypatch.setattr(standalone, "_engines", scripted)
    monkeypatch.setattr(standalone, "_drain", spied)
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.01)
    flags = {
        "engine.model_path": str(model),
        "listen.http_port": 0,
        "listen.grpc_port": 0,
        "replicas": 2,
        "gateway_drain_timeout_s": 7,
    }
    serving = asyncio.create_task(standalone._serve(load_config(None, {}, flags)))
    try:
        await until(lambda: serving.done() or "Cantata serves:" in capsys.readouterr().out)
        for index, engine in enumerate(engines):
            assert not serving.done(), "with one engine left it serves"
            markers[index].touch()
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGILL)
            await until(engine.given_up.is_set)
        async with asyncio.timeout(60):
            assert await serving == 1
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cantata: ")]
        assert line == f"cantata: {engines[0].failure}"
        assert drain_times_s == [7]
        assert "SIGILL" in line
        assert "--cpu-isa" in line
    finally:
        serving.cancel()
        await asyncio.wait([serving])
        for fake in fakes:
            await fake.stop()


class SilentInfos:
    async def first(self) -> EngineInfo:
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize("given_up", [True, False])
async def test_a_start_ends_when_no_engine_answers(monkeypatch: pytest.MonkeyPatch, given_up: bool) -> None:
    """Engines reported that they were ready, and died for good before they reported their model; or
    they never report it."""
    engines = [EngineProcess(f"engine-{index}", ["unused"]) for index in range(2)]
    if not given_up:
        monkeypatch.setattr(standalone, "START_TIMEOUT_S", 0.1)
    start = asyncio.create_task(standalone._first_info(cast(ReplicaInfos, SilentInfos()), engines))
    if given_up:
        for engine in engines:
            await asyncio.sleep(0)
            assert not start.done(), "with one engine left it waits"
            engine.failure = f"{engine.name} crashed"
            engine.given_up.set()
    async with asyncio.timeout(20):
        with pytest.raises(
            EngineFailed, match="^engine-0 crashed$" if given_up else "within 0 s of its start"
        ):
            await start
