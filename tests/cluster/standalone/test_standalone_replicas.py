"""The state of dead engines in standalone serving: unreachable for the gateway until they serve
again, on the metrics page too."""

from pathlib import Path

from cluster.assembly import connect
from cluster.config import load_config
from cluster.fleet.client import EngineClient
from cluster.fleet.directory import ReplicaSet
from cluster.fleet.status import FleetStatus
from cluster.fleet.table import Replica
from cluster.generation import ModelInfo
from cluster.standalone.serve import _engines
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import VOCAB_SIZE, make_encoding


async def test_a_dead_engine_stays_on_the_metrics_page_as_down(tmp_path: Path) -> None:
    replicas = ReplicaSet()
    config = load_config(None, {}, {"engine.model_path": "somewhere/tiny", "replicas": 2})
    living, dying = _engines(config, replicas, tmp_path)
    fakes = [await FakeEngine().start() for _ in range(2)]
    gateway = connect(ModelInfo("tiny", 1024, VOCAB_SIZE), make_encoding(tmp_path), replicas, EngineClient())
    try:
        for engine, fake in zip((living, dying), fakes, strict=True):
            engine._set_replica(Replica(engine.name, fake.address, "1"))
        assert await up(gateway.status) == {living.name: "1.0", dying.name: "1.0"}
        dying._set_replica(None)
        assert [replica.id for replica in replicas.known()] == [living.name]
        assert await up(gateway.status) == {living.name: "1.0", dying.name: "0.0"}
        dying._set_replica(Replica(dying.name, fakes[1].address, "2"))
        assert await up(gateway.status) == {living.name: "1.0", dying.name: "1.0"}
    finally:
        await gateway.service.close()
        for fake in fakes:
            await fake.stop()


async def up(status: FleetStatus) -> dict[str, str]:
    """Return the value of `cantata_process_up` by replica."""
    prefix = 'cantata_process_up{gateway="",process="engine",replica="'
    lines = [
        line.removeprefix(prefix)
        for line in (await status.metrics_text()).splitlines()
        if line.startswith(prefix)
    ]
    return {line.partition('"')[0]: line.rpartition(" ")[2] for line in lines}
