"""The engine deployment: one replica is one engine with its gRPC server. Serve starts, watches,
restarts and drains it. Requests do not pass through Serve: gateways call the replica's own
server."""

import asyncio
import contextlib
import logging
import os
import secrets
from typing import TYPE_CHECKING

from ray.util import get_node_ip_address

from cluster.serve.cluster_view import ADDRESS_KEY, SECRET_KEY, SERVE_LOGGER, START_ID_KEY
from cluster.serve.health import health_checks
from workers.config import EngineConfig, ModelConfig
from workers.config_json import engine_config_to_json
from workers.engine.collector import spare_collections
from workers.errors import ConfigError, EngineDead, RankCrashed

# What runs an engine imports torch, which takes seconds: it is imported where a replica starts, and
# not where an application is built or sent.
if TYPE_CHECKING:
    from workers.executor.base import Executor

logger = logging.getLogger(SERVE_LOGGER)

_CRASHED_PAUSE_S = 10.0
"""Seconds before a replica gives up that cannot start because its processes crash."""
_LAST_WORDS_S = 0.3
"""Seconds for the last messages of a dead engine's streams to reach their clients."""


class EngineReplica:
    """One replica of the deployment `engine`.

    Args:
        host: address that the engine's server binds; `auto` is this node's address.
        drain_timeout_s: seconds for running requests to end when Serve stops the replica.
    """

    async def __init__(self, config: EngineConfig, host: str, drain_timeout_s: float) -> None:  # type: ignore[misc]  # Serve awaits it
        from workers.engine.progress import summary
        from workers.engine.server import EngineServer
        from workers.executor.launch_ray import crash_notes

        self._drain_timeout_s = drain_timeout_s
        self._started = False
        # An engine that cannot start raises CheckpointError or ConfigError here; Serve shows it as
        # the application's status.
        self._stalled_s = health_checks(config.heartbeat_timeout_s).stalled_s
        self._secret = secrets.token_urlsafe(32)
        self._server = EngineServer(executor_factory=_executor, secret=self._secret)
        bind = _node_address() if host == "auto" else host
        try:
            crash_notes(engine_config_to_json(config), "engine").begin()
            self._address = await self._server.start(config, f"[{bind}]:0" if ":" in bind else f"{bind}:0")
        except RankCrashed:
            # Serve tries again at once, and without a limit if a replica has served before.
            await asyncio.sleep(_CRASHED_PAUSE_S)
            raise
        spare_collections()
        start_up = self._server.start_up
        table = summary(
            start_up.executor,
            model=f"{config.model_path} ({start_up.info.model_fingerprint[:12]})",
            longest_context=start_up.longest_context,
            address=self._address,
            metrics_address=None,
            grammars=self._server.engine.grammars,
        )
        logger.info("Cantata engine %s\n%s", start_up.info.version, table)
        self._leaving = asyncio.create_task(self._leave_when_it_ends())

    async def reconfigure(self, user_config: object) -> None:
        """Refuse a `user_config` (a hook of Serve, called at the start and when it changes): an
        engine has no run-time settings.

        Raises:
            ConfigError: it is not empty at the start.
        """
        if user_config and not self._started:
            raise ConfigError(
                "deployment engine: it has no run-time settings; use args.engine instead of user_config"
            )
        if user_config:
            # If this raised, Serve would stop this replica and start others that cannot start
            # either.
            logger.error(
                "the engine has no run-time settings: user_config is ignored; move it to args.engine"
            )
        self._started = True

    def record_replica_metadata(self) -> dict[str, str]:
        """Return the engine's address and secret once, when the replica is ready. Serve sends them
        to every gateway and nowhere outside the cluster."""
        return {
            ADDRESS_KEY: self._address,
            START_ID_KEY: self._server.start_up.info.start_id,
            SECRET_KEY: self._secret,
        }

    def record_routing_stats(self) -> dict[str, float]:
        """Return the number of sequences in the engine, by which gateways balance load. Serve calls
        this periodically. KV-cache usage is in the metrics and in GetLoad."""
        load = self._server.engine.load()
        return {"num_running": load.num_running, "num_waiting": load.num_waiting}

    async def check_health(self) -> None:
        """Raise when the engine has ended or hangs; Serve replaces the replica after several
        consecutive failures (`cluster.serve.health`). A stopped process gives no answer at all."""
        if self._server.ended.is_set():
            raise EngineDead(f"the engine has ended: {self._server.engine.error or 'it was drained'}")
        stalled_s = self._server.engine.watch.stalled_s
        if stalled_s > self._stalled_s:
            raise EngineDead(f"the engine hangs: its step loop has made no progress for {stalled_s:.0f} s")

    async def _leave_when_it_ends(self) -> None:
        # Serve would check our health three times, then wait for requests to end, and keep sending
        # more meanwhile. It replaces a process that has exited at once.
        await self._server.ended.wait()
        reason = self._server.engine.error or "it was drained"
        logger.error("the engine has ended, and this replica ends so that Serve starts another: %s", reason)
        await asyncio.sleep(_LAST_WORDS_S)
        await self._server.stop()
        os._exit(1)

    async def __del__(self) -> None:
        # Called by Serve at the end of a replica; __init__ may not have completed.
        with contextlib.suppress(AttributeError):
            server = self._server
            self._leaving.cancel()
            await server.drain(self._drain_timeout_s)
            await server.stop()


def _executor(config: EngineConfig, model: ModelConfig) -> "Executor":
    from workers.executor.distributed import DistributedExecutor
    from workers.executor.launch_ray import RayRanks
    from workers.executor.local import local_executor

    if config.parallel.tensor == 1:
        return local_executor(config, model, progress=_log_progress)
    return DistributedExecutor(config, model, RayRanks(), progress=_log_progress)


def _node_address() -> str:
    return str(get_node_ip_address())  # type: ignore[no-untyped-call]


def _log_progress(phase: str, done: int, total: int) -> None:
    if total == 0 or done == total or done * 10 // total != (done - 1) * 10 // total:
        logger.info("%s", f"{phase} ..." if total == 0 else f"{phase}: {done} of {total}")
