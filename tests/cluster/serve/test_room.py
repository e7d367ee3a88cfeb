"""The check that a cluster has room for a replica, and the message if it has none."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.config import AppConfig, load_config
from cluster.serve import gateway, launch, room
from workers.config import EngineConfig, ParallelConfig

EIGHT_GPUS = {"CPU": 64.0, "GPU": 8.0, "memory": 1e12}


def config_of(
    tensor: int, device: str, *, cpus: float | None = None, start_timeout_s: float = 300.0
) -> AppConfig:
    parallel = ParallelConfig(tensor, start_timeout_s=start_timeout_s)
    return AppConfig(
        engine=EngineConfig(Path("somewhere"), device=device, parallel=parallel), engine_cpus=cpus
    )


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> "Cluster":
    return Cluster(monkeypatch)


class Cluster:
    """A cluster with the resources that a test sets, as Ray reports them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.has([])

    def has(
        self,
        nodes: Sequence[Mapping[str, float]],
        *,
        used: Mapping[str, float] | None = None,
        pending: Sequence[Mapping[str, float]] = (),
    ) -> None:
        total = {name: sum(node.get(name, 0) for node in nodes) for node in nodes for name in node}
        free = {name: amount - (used or {}).get(name, 0) for name, amount in total.items()}
        groups = {
            "ready": {"state": "CREATED", "bundles": {0: {"CPU": 1.0}}},
            "waits": {"state": "PENDING", "bundles": dict(enumerate(pending))},
        }
        dead = {"Alive": False, "Resources": {"CPU": 1000.0, "GPU": 1000.0}}
        self._patch.setattr(room.ray, "is_initialized", lambda: True)
        self._patch.setattr(
            room.ray, "nodes", lambda: [dead, *({"Alive": True, "Resources": dict(node)} for node in nodes)]
        )
        self._patch.setattr(room.ray, "cluster_resources", lambda: total)
        self._patch.setattr(
            room.ray, "available_resources", lambda: {name: amount for name, amount in free.items() if amount}
        )
        self._patch.setattr(room, "placement_group_table", lambda: groups)


def test_bundles_of_a_replica() -> None:
    assert room.replica_bundles(config_of(1, "cpu", cpus=6)) == [{"CPU": 6}]
    assert room.replica_bundles(config_of(3, "cpu", cpus=8)) == [{"CPU": 2}] * 3
    assert room.replica_bundles(config_of(2, "cuda")) == [{"CPU": 1, "GPU": 1}] * 2
    assert room.replica_bundles(config_of(2, "cpu", cpus=0.5)) == [{"CPU": 0.25}] * 2


def test_cpus_are_whole_or_a_part_of_one() -> None:
    with pytest.raises(ValueError, match=r"2\.5 is neither a whole number nor less than 1"):
        config_of(1, "cpu", cpus=2.5)


def test_more_ranks_than_cores_share_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for tensor, replicas, cores, reserved in ((1, 3, 2, 0.66), (4, 1, 2, 0.99), (1, 2, 2, 1), (1, 1, 4, 4)):
        monkeypatch.setattr(launch, "usable_cores", lambda cores=cores: cores)
        monkeypatch.setattr("workers.cores.usable_cores", lambda cores=cores: cores)
        flags = {"engine.model_path": "somewhere", "replicas": replicas, "engine.parallel.tensor": tensor}
        config = launch._application(load_config(None, {}, flags))
        assert config.engine_cpus == pytest.approx(reserved, abs=0.01)
        total = sum(bundle["CPU"] for bundle in room.replica_bundles(config)) * replicas
        assert total <= cores
        assert ("share 2 CPUs" in capsys.readouterr().err) == (reserved < 1)


@pytest.mark.parametrize(
    ("tensor", "replicas", "nodes", "strategy", "said"),
    [
        (8, 1, [EIGHT_GPUS], "STRICT_PACK", None),
        (
            8,
            2,
            [EIGHT_GPUS],
            "STRICT_PACK",
            "2 replicas of 8 ranks need 16 CPUs and 16 GPUs; 64 of 64 CPUs and 8 of 8 GPUs free",
        ),
        (16, 1, [EIGHT_GPUS, EIGHT_GPUS], "PACK", None),
        (
            9,
            1,
            [EIGHT_GPUS],
            "PACK",
            "1 replica of 9 ranks needs 9 CPUs and 9 GPUs; 64 of 64 CPUs and 8 of 8 GPUs free",
        ),
        # Enough of each, but not on the same nodes.
        (
            2,
            1,
            [{"CPU": 64.0}, {"GPU": 8.0}],
            "PACK",
            "1 replica of 2 ranks needs 2 CPUs and 2 GPUs; 64 of 64 CPUs and 8 of 8 GPUs free",
        ),
        (
            1,
            1,
            [{"CPU": 1.0}],
            "PACK",
            "1 replica of 1 rank needs 1 CPU and 1 GPU; 1 of 1 CPU and 0 of 0 GPUs free",
        ),
        (1, 1, [], "PACK", "1 replica of 1 rank needs 1 CPU and 1 GPU; 0 of 0 CPUs and 0 of 0 GPUs free"),
    ],
)
def test_what_fits_and_what_does_not(
    cluster: Cluster,
    tensor: int,
    replicas: int,
    nodes: list[dict[str, float]],
    strategy: str,
    said: str | None,
) -> None:
    cluster.has(nodes)
    bundles = room.replica_bundles(config_of(tensor, "cuda"))
    assert room.bundle_strategy(bundles) == strategy
    assert room.shortage(bundles, replicas) == said


def test_what_others_use_is_not_free(cluster: Cluster) -> None:
    bundles = room.replica_bundles(config_of(4, "cuda"))
    cluster.has([EIGHT_GPUS], used={"GPU": 6}, pending=[{"CPU": 1.0, "GPU": 1.0}] * 4)
    assert (
        room.shortage(bundles)
        == "1 replica of 4 ranks needs 4 CPUs and 4 GPUs; 64 of 64 CPUs and 2 of 8 GPUs free"
    )
    # Our engines have their GPUs and load; another application waits for other resources.
    cluster.has([EIGHT_GPUS], used={"GPU": 6}, pending=[{"CPU": 1.0, "GPU": 1.0}] * 5)
    assert room.shortage(bundles) is None


class Directory:
    """The part of ServeReplicas that the watch looks at."""

    def __init__(self) -> None:
        self.replicas: list[str] = []

    def known(self) -> list[str]:
        return self.replicas


@pytest.mark.parametrize(
    ("nodes", "kinds"),
    [
        ([{"CPU": 4.0}], None),
        ([{"CPU": 4.0, "GPU": 8.0}], None),
        ([{"CPU": 4.0}, {"CPU": 4.0, "GPU": 8.0, "accelerator_type:H100": 1.0}], {"H100"}),
        (
            [{"GPU": 8.0, "accelerator_type:H100": 1.0}, {"GPU": 8.0, "accelerator_type:H200": 1.0}],
            {"H100", "H200"},
        ),
        ([{"GPU": 8.0, "accelerator_type:H100": 1.0}, {"GPU": 8.0}], None),
    ],
)
def test_kinds_of_gpus(cluster: Cluster, nodes: list[Mapping[str, float]], kinds: set[str] | None) -> None:
    cluster.has(nodes)
    assert room.accelerators() == kinds


@pytest.mark.parametrize(
    ("used", "said"),
    [
        ({}, r"no engine has served for \d+ s: there is room, so they are loading or fail"),
        (
            {"CPU": 2},
            r"no engine has been able to start for \d+ s: 1 replica of 4 ranks needs 4 CPUs; "
            r"2 of 4 CPUs free; lower",
        ),
    ],
)
async def test_a_gateway_without_engines_says_what_is_missing_and_waits_on(
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    used: dict[str, float],
    said: str,
) -> None:
    cluster.has([{"CPU": 4.0}], used=used, pending=[{"CPU": 1.0}] * 4 if used else [])
    monkeypatch.setattr(gateway, "_REPORT_PERIOD_S", 0.01)
    directory: Any = Directory()
    watch = asyncio.create_task(gateway._watch_engines(directory, config_of(4, "cpu", start_timeout_s=0.01)))
    try:
        async with asyncio.timeout(60):
            while len(re.findall(said, caplog.text)) < 5:  # many times as long as start_timeout_s
                assert not watch.done()
                await asyncio.sleep(0.01)
        directory.replicas.append("engine")
        await asyncio.sleep(0.05)
        caplog.clear()
        await asyncio.sleep(0.05)
        assert caplog.text == ""
    finally:
        watch.cancel()
