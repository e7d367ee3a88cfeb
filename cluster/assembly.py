"""Puts a gateway together from the configuration and a directory of replicas: the same under Ray Serve and standalone."""

import asyncio
import time

from cluster.config import AppConfig
from cluster.generation import ChatDefaults, GenerationService, Limits, ModelInfo
from cluster.harmony.encoding import HarmonyEncoding
from cluster.metrics import GatewayMetrics
from cluster.replica_set import ReplicaSet
from cluster.router.client import EngineClient
from cluster.router.table import Replica
from workers.config import load_model_config
from workers.errors import CantataError
from workers.rpc.convert import EngineInfo

_PROBE_TIMEOUT_S = 5.0
_PROBE_PERIOD_S = 0.1


def load_encoding(config: AppConfig) -> HarmonyEncoding:
    """The tokenizer of the configured checkpoint, after a check that folder, config and tokenizer belong together.

    Raises:
        CheckpointError: one sentence.
    """
    model = load_model_config(config.engine.model_path)
    return HarmonyEncoding.load(config.engine.model_path, model.vocab_size)


async def build_service(config: AppConfig, encoding: HarmonyEncoding, replicas: ReplicaSet) -> tuple[GenerationService, EngineInfo]:
    """Waits until a replica says what it serves, then builds the service over them. The caller closes it; waiting ends by cancellation."""
    client = EngineClient()
    try:
        info = await _first_info(replicas, client)
    except BaseException:
        await client.close()
        raise
    # Tasks are kept until they end: the event loop holds them only weakly.
    closing: set[asyncio.Task[None]] = set()

    def forget(replica: Replica) -> None:
        task = asyncio.ensure_future(client.forget(replica))
        closing.add(task)
        task.add_done_callback(closing.discard)

    replicas.on_gone(forget)
    gateway = config.gateway
    service = GenerationService(
        ModelInfo.from_engine(info, config.model_name, int(time.time())),
        encoding,
        replicas,
        client,
        GatewayMetrics(),
        defaults=ChatDefaults(gateway.conversation_date, gateway.reasoning_effort),
        limits=Limits(gateway.max_in_flight_requests, gateway.request_timeout_s),
    )
    return service, info


async def _first_info(replicas: ReplicaSet, client: EngineClient) -> EngineInfo:
    while True:
        for replica in replicas.known():
            try:
                return await client.info(replica, _PROBE_TIMEOUT_S)
            except CantataError:
                continue
        await asyncio.sleep(_PROBE_PERIOD_S)
