"""When Serve replaces a hung engine: Ray's own code for health checks, over a clock of the test and
the checks of a built application."""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError
from ray.serve._private import deployment_state
from ray.serve._private.deployment_state import ActorReplicaWrapper

from cluster.config import AppConfig
from cluster.serve.app import application
from cluster.serve.health import health_checks
from cluster.serve.replica import EngineReplica
from workers.config import EngineConfig
from workers.errors import EngineDead

TURN_S = 0.1
"""Seconds between two turns of Serve's controller."""
HANGS_AT_S = 20.0


@dataclass
class Engine:
    """An engine that hangs from HANGS_AT_S for `hang_s` seconds, as Serve sees its actor.

    Attributes:
        stopped: the whole process does; otherwise its step loop alone.
    """

    heartbeat_timeout_s: float
    hang_s: float
    stopped: bool
    now_s: float = 0.0

    def time(self) -> float:
        return self.now_s

    @property
    def hangs(self) -> bool:
        return HANGS_AT_S <= self.now_s < HANGS_AT_S + self.hang_s

    @property
    def check_health(self) -> Any:
        return SimpleNamespace(remote=lambda: self.now_s)

    def is_answered(self, asked_s: float) -> bool:
        """Return whether the replica has answered; an answer takes 20 ms."""
        return self.now_s >= asked_s + 0.02 and not (self.stopped and self.hangs)

    def answer(self, asked_s: float) -> None:
        """Answer as the replica would."""
        stalled_s = self.now_s - HANGS_AT_S if self.hangs else 0.0
        server = SimpleNamespace(
            ended=SimpleNamespace(is_set=lambda: False),
            engine=SimpleNamespace(watch=SimpleNamespace(stalled_s=stalled_s)),
        )
        replica: Any = SimpleNamespace(
            _server=server, _stalled_s=health_checks(self.heartbeat_timeout_s).stalled_s
        )
        try:
            EngineReplica.check_health(replica).send(None)
        except StopIteration:
            return
        except EngineDead as error:
            raise RayError from error


def deployed(heartbeat_timeout_s: float) -> Any:
    """Return the engine's deployment as Serve reads it."""
    config = AppConfig(engine=EngineConfig(Path("somewhere"), heartbeat_timeout_s=heartbeat_timeout_s))
    gateway: Any = application(config)._bound_deployment
    return gateway._replica_config.init_args[0]._bound_deployment._deployment_config


def found_hung_after_s(engine: Engine, deployment: object, monkeypatch: pytest.MonkeyPatch) -> float:
    """Return the seconds from the beginning of the hang until Serve finds the replica unhealthy;
    infinity: it does not."""
    monkeypatch.setattr(deployment_state, "time", engine)
    monkeypatch.setattr(deployment_state, "check_obj_ref_ready_nowait", engine.is_answered)
    monkeypatch.setattr(deployment_state, "ray", SimpleNamespace(get=engine.answer))
    replica: Any = ActorReplicaWrapper.__new__(ActorReplicaWrapper)
    replica.__dict__.update(
        _replica_id="engine",
        _actor_handle=engine,
        _healthy=True,
        _health_check_ref=None,
        _last_health_check_time=0.0,
        _consecutive_health_check_failures=0,
        _version=SimpleNamespace(deployment_config=deployment),
    )
    while replica.check_health():
        if engine.now_s > HANGS_AT_S + 3 * engine.heartbeat_timeout_s + 30:
            return math.inf
        engine.now_s += TURN_S
    return engine.now_s - HANGS_AT_S


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "stalled"])
@pytest.mark.parametrize("timeout_s", [2.0, 10.0, 60.0])
def test_a_hung_engine_is_replaced_when_its_time_is_over(
    timeout_s: float, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    random.seed(1)  # Serve draws how long it waits
    deployment = deployed(timeout_s)
    for _ in range(10):
        after_s = found_hung_after_s(Engine(timeout_s, math.inf, stopped), deployment, monkeypatch)
        # Standalone: the timeout, and up to two turns of a second.
        assert timeout_s - TURN_S <= after_s <= timeout_s + 3.5


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "stalled"])
@pytest.mark.parametrize("timeout_s", [2.0, 10.0, 60.0])
def test_a_shorter_pause_is_no_hang(timeout_s: float, stopped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(1)
    deployment = deployed(timeout_s)
    for _ in range(10):
        engine = Engine(timeout_s, timeout_s - 0.2, stopped)
        assert found_hung_after_s(engine, deployment, monkeypatch) == math.inf
