"""Puts a gateway together from the configuration and a directory of replicas: the same under Ray Serve and standalone."""

import asyncio
import logging
import time

from cluster.config import AppConfig
from cluster.generation import ChatDefaults, GenerationService, Limits, ModelInfo
from cluster.harmony.encoding import HarmonyEncoding
from cluster.metrics import FleetView, GatewayMetrics
from cluster.replica_set import ReplicaSet
from cluster.router.client import EngineClient
from cluster.router.table import Replica
from cluster.router.watch import Patience
from workers.config import load_model_config, longest_context
from workers.errors import CantataError
from workers.rpc.convert import EngineInfo

_PROBE_TIMEOUT_S = 5.0
_PROBE_PERIOD_S = 0.1
_MAX_PROBES = 100
"""Of a new replica; one that does not answer is asked again when the list changes."""

logger = logging.getLogger(__name__)


def load_encoding(config: AppConfig) -> HarmonyEncoding:
    """The tokenizer of the configured checkpoint, after a check that folder, config and tokenizer belong together.

    Raises:
        CheckpointError: one sentence.
    """
    model = load_model_config(config.engine.model_path)
    return HarmonyEncoding.load(config.engine.model_path, model.vocab_size)


def context_with_enough_memory(config: AppConfig) -> int:
    """Tokens of a sequence that the engines would take if memory were no limit.

    Raises:
        CheckpointError: one sentence.
    """
    return longest_context(load_model_config(config.engine.model_path), config.engine.max_model_len)


async def build_service(
    config: AppConfig, encoding: HarmonyEncoding, replicas: ReplicaSet, fleet: FleetView | None = None
) -> tuple[GenerationService, EngineInfo]:
    """Waits until a replica says what it serves, then builds the service over them. The caller closes it; waiting ends by cancellation."""
    gateway = config.gateway
    client = EngineClient(replicas.silent, Patience(gateway.probe_timeout_s, config.engine.heartbeat_timeout_s))
    try:
        infos = await _first_infos(replicas, client)
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
    info = min(infos.values(), key=lambda info: info.max_model_len)
    service = GenerationService(
        ModelInfo.from_engine(info, config.model_name, int(time.time())),
        encoding,
        replicas,
        client,
        GatewayMetrics(),
        defaults=ChatDefaults(gateway.conversation_date, gateway.reasoning_effort),
        limits=Limits(gateway.max_in_flight_requests, gateway.request_timeout_s),
        fleet=fleet,
    )
    contexts = _Contexts(replicas, client, service, {replica: info.max_model_len for replica, info in infos.items()})
    replicas.on_change(contexts.look)
    contexts.look()
    return service, info


async def _first_infos(replicas: ReplicaSet, client: EngineClient) -> dict[Replica, EngineInfo]:
    """What those say that answer, once there is one."""
    while True:
        known = replicas.known()
        answers = await asyncio.gather(*(client.info(replica, _PROBE_TIMEOUT_S) for replica in known), return_exceptions=True)
        infos: dict[Replica, EngineInfo] = {}
        for replica, answer in zip(known, answers, strict=True):
            if isinstance(answer, EngineInfo):
                infos[replica] = answer
            elif not isinstance(answer, CantataError):
                raise answer
        if infos:
            return infos
        await asyncio.sleep(_PROBE_PERIOD_S)


class _Contexts:
    """Keeps the service's context limit at the shortest among the replicas: without a max_model_len each takes what its memory allows.

    Args:
        known: replica to its max_model_len, of those that have been asked.
    """

    def __init__(self, replicas: ReplicaSet, client: EngineClient, service: GenerationService, known: dict[Replica, int]) -> None:
        self._replicas = replicas
        self._client = client
        self._service = service
        self._known = known
        self._asking: dict[Replica, asyncio.Task[None]] = {}

    def look(self) -> None:
        """The list of replicas may have changed: forget those that left, ask those that are new."""
        listed = self._replicas.known()
        self._known = {replica: length for replica, length in self._known.items() if replica in listed}
        for replica in listed:
            if replica not in self._known and replica not in self._asking:
                self._asking[replica] = asyncio.ensure_future(self._ask(replica))
        self._apply()

    async def _ask(self, replica: Replica) -> None:
        try:
            for _ in range(_MAX_PROBES):
                if replica not in self._replicas.known():
                    return
                try:
                    self._known[replica] = (await self._client.info(replica, _PROBE_TIMEOUT_S)).max_model_len
                except CantataError:
                    await asyncio.sleep(_PROBE_PERIOD_S)
                else:
                    self.look()  # it may have left meanwhile
                    return
        finally:
            del self._asking[replica]

    def _apply(self) -> None:
        shortest = min(self._known.values(), default=self._service.model.max_model_len)
        if shortest != self._service.model.max_model_len:
            logger.info("requests may have %d tokens from now on: the shortest context of a replica", shortest)
            self._service.limit_context(shortest)
