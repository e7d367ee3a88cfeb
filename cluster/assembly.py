"""Assembles a gateway from the configuration and a directory of replicas, under Ray Serve and
standalone alike."""

import asyncio
import datetime
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.config import AppConfig, Config, GatewayConfig
from cluster.fleet.client import EngineClient
from cluster.fleet.directory import ReplicaSet
from cluster.fleet.dispatch import Dispatcher
from cluster.fleet.infos import ReplicaInfos
from cluster.fleet.probe import Patience
from cluster.fleet.status import FleetStatus
from cluster.fleet.table import Replica, ReplicaDirectory
from cluster.generation import Capacity, ChatDefaults, GenerationService, ModelInfo, Prompts, ServedModel
from cluster.generation.prompts import utc_today
from cluster.harmony.encoding import HarmonyEncoding
from cluster.metrics import FleetView, GatewayMetrics
from cluster.sealing import kept_secret, new_secret
from cluster.state.settings import Location
from cluster.state.state import State
from workers.config import check_max_model_len, longest_context
from workers.model_config import load_model_config
from workers.parallel.shard import plan_shards
from workers.rpc.convert import EngineInfo

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


def with_secret(config: Config, place: Location) -> Config:
    """Return the settings of a deployment on this host with a secret. Without one in them it is
    drawn; beside an SQLite database it is kept, so that what clients have been given survives a
    restart.

    Raises:
        ConfigError: it cannot be kept there.
    """
    if config.gateway.secret is not None:
        return config
    secret = new_secret() if place.file is None else kept_secret(place.file.with_suffix(".secret"))
    return config.model_copy(update={"gateway": config.gateway.model_copy(update={"secret": secret})})


@dataclass(frozen=True, slots=True)
class Gateway:
    """The parts of a gateway; service and state are closed by their owner."""

    service: GenerationService
    status: FleetStatus
    state: State | None = None


def connect(
    model: ModelInfo,
    encoding: HarmonyEncoding,
    replicas: ReplicaDirectory,
    client: EngineClient,
    *,
    defaults: ChatDefaults | None = None,
    capacity: Capacity | None = None,
    view: FleetView | None = None,
    today: Callable[[], datetime.date] = utc_today,
) -> Gateway:
    """Build a gateway over these replicas. Call it in an event loop; the client is closed with the
    service.

    Args:
        view: the processes beside this one, for the metrics; None: there is one gateway.
        today: the current day in UTC, for `conversation_date: auto`.
    """
    metrics, served = GatewayMetrics(), ServedModel(model)
    client.on_constraint_left_out = lambda reason: metrics.constraints_left_out.labels(reason).inc()
    prompts = Prompts(encoding, served, defaults, today)
    service = GenerationService(served, prompts, Dispatcher(replicas, client, metrics), metrics, capacity)
    return Gateway(service, FleetStatus(replicas, client, metrics, view))


def build_gateway(
    config: AppConfig,
    encoding: HarmonyEncoding,
    replicas: ReplicaSet,
    view: FleetView | None = None,
    state: State | None = None,
) -> tuple[Gateway, ReplicaInfos]:
    """Build the configured gateway over these replicas, which may be none yet; until there is one,
    requests get NoReplica. Call it in an event loop; the caller closes service and state."""
    settings, model = config.gateway, load_model_config(config.engine.model_path)
    client = EngineClient(
        replicas.silent, Patience(settings.probe_timeout_s, config.engine.heartbeat_timeout_s)
    )
    # Tasks are kept until they end, because the event loop holds only weak references to them.
    closing: set[asyncio.Task[None]] = set()

    def forget(replica: Replica) -> None:
        task = asyncio.ensure_future(client.forget(replica))
        closing.add(task)
        task.add_done_callback(closing.discard)

    replicas.on_gone(forget)
    created_unix_s = int(time.time())
    context = longest_context(model, config.engine.max_model_len)
    gateway = connect(
        ModelInfo(
            config.model_name,
            context,
            model.vocab_size,
            created_unix_s=created_unix_s,
            root=config.engine.model_path.resolve().name,
            aliases=settings.model_aliases,
        ),
        encoding,
        replicas,
        client,
        defaults=chat_defaults(settings),
        capacity=capacity(settings),
        view=view,
    )
    served = gateway.service.served

    def serve_as(info: EngineInfo) -> None:
        if info.max_model_len != served.info.max_model_len:
            logger.info(
                "the context limit is now %d tokens, the shortest of all replicas",
                info.max_model_len,
            )
        served.info = ModelInfo.from_engine(info, config.model_name, created_unix_s, settings.model_aliases)

    infos = ReplicaInfos(replicas, client, serve_as)
    replicas.on_change(infos.look)
    infos.look()
    return replace(gateway, state=state), infos


def chat_defaults(gateway: GatewayConfig) -> ChatDefaults:
    """Return the defaults of chats that do not set these values themselves."""
    return ChatDefaults(
        gateway.conversation_date,
        gateway.reasoning_effort,
        gateway.harmony_constraint,
        gateway.tool_arguments,
        gateway.reasoning_wrap_up,
        gateway.reserve_answer,
    )


def capacity(gateway: GatewayConfig) -> Capacity:
    """Return the gateway's capacity."""
    return Capacity(gateway.max_in_flight_requests, gateway.request_timeout_s)
