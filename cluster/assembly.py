"""Assembles a gateway from the configuration and a directory of replicas, under Ray Serve and
standalone alike."""

import asyncio
import logging
import time
from collections.abc import Callable

from cluster.config import AppConfig, GatewayConfig
from cluster.fleet.client import EngineClient
from cluster.fleet.directory import ReplicaSet
from cluster.fleet.probe import Patience
from cluster.fleet.table import Replica
from cluster.generation import ChatDefaults, GenerationService, Limits, ModelInfo
from cluster.harmony.encoding import HarmonyEncoding
from cluster.metrics import FleetView, GatewayMetrics
from workers.config import check_max_model_len, longest_context
from workers.errors import CantataError
from workers.model_config import load_model_config
from workers.parallel.shard import plan_shards
from workers.rpc.convert import EngineInfo

_PROBE_TIMEOUT_S = 5.0
_PROBE_PERIOD_S = 0.1
_MAX_PROBES = 100
"""Maximum number of probes of a new replica. One that does not answer is asked again when the list
changes."""

logger = logging.getLogger(__name__)


def load_encoding(config: AppConfig) -> HarmonyEncoding:
    """Load the tokenizer of the configured checkpoint, after a check that folder, config and
    tokenizer match.

    Raises:
        CheckpointError: one sentence.
    """
    model = load_model_config(config.engine.model_path)
    return HarmonyEncoding.load(config.engine.model_path, model.vocab_size)


def check_model(config: AppConfig) -> None:
    """Check what the configured checkpoint allows, before an engine starts.

    Raises:
        CheckpointError, ConfigError: one sentence.
    """
    model = load_model_config(config.engine.model_path)
    plan_shards(model, config.engine.parallel)
    check_max_model_len(config.engine, model)


def context_with_enough_memory(config: AppConfig) -> int:
    """Return the tokens per sequence that the engines would accept if memory were unlimited.

    Raises:
        CheckpointError: one sentence.
    """
    return longest_context(load_model_config(config.engine.model_path), config.engine.max_model_len)


def build_service(
    config: AppConfig, encoding: HarmonyEncoding, replicas: ReplicaSet, fleet: FleetView | None = None
) -> "tuple[GenerationService, ReplicaInfos]":
    """Build the service over these replicas, which may be none yet; until there is one, requests
    get NoReplica. Call it in an event loop; the caller closes the service."""
    gateway, model = config.gateway, load_model_config(config.engine.model_path)
    client = EngineClient(
        replicas.silent, Patience(gateway.probe_timeout_s, config.engine.heartbeat_timeout_s)
    )
    # Tasks are kept until they end, because the event loop holds only weak references to them.
    closing: set[asyncio.Task[None]] = set()

    def forget(replica: Replica) -> None:
        task = asyncio.ensure_future(client.forget(replica))
        closing.add(task)
        task.add_done_callback(closing.discard)

    replicas.on_gone(forget)
    created_unix_s = int(time.time())
    service = GenerationService(
        ModelInfo(
            config.model_name,
            longest_context(model, config.engine.max_model_len),
            model.vocab_size,
            created_unix_s=created_unix_s,
        ),
        encoding,
        replicas,
        client,
        GatewayMetrics(),
        defaults=chat_defaults(gateway),
        limits=limits(gateway),
        fleet=fleet,
    )

    def serve_as(info: EngineInfo) -> None:
        if info.max_model_len != service.model.max_model_len:
            logger.info(
                "requests may have %d tokens from now on: the shortest context of a replica",
                info.max_model_len,
            )
        service.set_model(ModelInfo.from_engine(info, config.model_name, created_unix_s))

    infos = ReplicaInfos(replicas, client, serve_as)
    replicas.on_change(infos.look)
    infos.look()
    return service, infos


def chat_defaults(gateway: GatewayConfig) -> ChatDefaults:
    """Return the defaults of chats that do not set these values themselves."""
    return ChatDefaults(gateway.conversation_date, gateway.reasoning_effort)


def limits(gateway: GatewayConfig) -> Limits:
    """Return the gateway's limits."""
    return Limits(gateway.max_in_flight_requests, gateway.request_timeout_s)


class ReplicaInfos:
    """Asks each new replica what it serves. The service promises the shortest context among them:
    without max_model_len each engine takes what its memory allows.

    Args:
        use: called with the info of the replica with the shortest context whenever it may have
            changed.
    """

    def __init__(self, replicas: ReplicaSet, client: EngineClient, use: Callable[[EngineInfo], None]) -> None:
        self._replicas = replicas
        self._client = client
        self._use = use
        self._known: dict[Replica, EngineInfo] = {}
        self._asking: dict[Replica, asyncio.Task[None]] = {}
        self._latest: EngineInfo | None = None
        self._answered = asyncio.Event()

    async def first(self) -> EngineInfo:
        """Wait for the first answer, and briefly for those of other replicas being asked; return
        what the service promises."""
        await self._answered.wait()
        if self._asking:
            await asyncio.wait(list(self._asking.values()), timeout=_PROBE_TIMEOUT_S)
        assert self._latest is not None
        return self._latest

    def look(self) -> None:
        """Compare the list of replicas: forget those that have left, ask those that are new."""
        listed = self._replicas.known()
        self._known = {replica: info for replica, info in self._known.items() if replica in listed}
        for replica in listed:
            if replica not in self._known and replica not in self._asking:
                self._asking[replica] = asyncio.ensure_future(self._ask(replica))
        if self._known:
            self._latest = min(self._known.values(), key=lambda info: info.max_model_len)
            self._use(self._latest)
            self._answered.set()

    async def _ask(self, replica: Replica) -> None:
        info = None
        try:
            for _ in range(_MAX_PROBES):
                if replica not in self._replicas.known():
                    return
                try:
                    info = await self._client.info(replica, _PROBE_TIMEOUT_S)
                except CantataError:
                    await asyncio.sleep(_PROBE_PERIOD_S)
                else:
                    break
        finally:
            del self._asking[replica]
        if info is not None:
            self._known[replica] = info
            self.look()  # the replica may have left meanwhile
