"""What standalone serving tells its gateway about engines that died: unreachable until they serve
again, on the metrics page too."""

from pathlib import Path

from cluster.config import load_config
from cluster.fleet.client import EngineClient
from cluster.fleet.directory import ReplicaSet
from cluster.fleet.table import Replica
from cluster.generation import GenerationService, ModelInfo
from cluster.metrics import GatewayMetrics
from cluster.standalone.serve import _engines
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import VOCAB_SIZE, make_encoding


async def test_a_dead_engine_stays_on_the_metrics_page_as_down(tmp_path: Path) -> None:
    replicas = ReplicaSet()
    config = load_config(None, {}, {"engine.model_path": "somewhere/tiny", "replicas": 2})
    living, dying = _engines(config, replicas, tmp_path)
    fakes = [await FakeEngine().start() for _ in range(2)]
    service = GenerationService(
        ModelInfo("tiny", 1024, VOCAB_SIZE),
        make_encoding(tmp_path),
        replicas,
        EngineClient(),
        GatewayMetrics(),
    )
    try:
        for engine, fake in zip((living, dying), fakes, strict=True):
            engine._set_replica(Replica(engine.name, fake.address, "1"))
        assert await up(service) == {living.name: "1.0", dying.name: "1.0"}
        dying._set_replica(None)
        assert [replica.id for replica in replicas.known()] == [living.name]
        assert await up(service) == {living.name: "1.0", dying.name: "0.0"}
        dying._set_replica(Replica(dying.name, fakes[1].address, "2"))
        assert await up(service) == {living.name: "1.0", dying.name: "1.0"}
    finally:
        await service.close()
        for fake in fakes:
            await fake.stop()


async def up(service: GenerationService) -> dict[str, str]:
    """Replica to the value of its `cantata_process_up`."""
    prefix = 'cantata_process_up{gateway="",process="engine",replica="'
    lines = [
        line.removeprefix(prefix)
        for line in (await service.metrics_text()).splitlines()
        if line.startswith(prefix)
    ]
    return {line.partition('"')[0]: line.rpartition(" ")[2] for line in lines}
