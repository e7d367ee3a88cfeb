"""A gateway that Serve no longer lists: its requests end only if Serve stops it."""

import asyncio
from typing import Any

import pytest

from cluster.serve import gateway


class Standing:
    def __init__(self, *answers: bool) -> None:
        self.answers = list(answers)
        self.asked = asyncio.Event()

    async def is_stopping(self) -> bool:
        self.asked.set()
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class Service:
    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.state = State()

    async def close(self) -> None:
        assert self.state.is_stopped, "background responses fail"
        self.closed.set()


class State:
    is_stopped = False

    async def stop(self) -> None:
        self.is_stopped = True


class Config:
    gateway_drain_timeout_s = 0.01


class Gateway(gateway.GatewayReplica):
    def __del__(self) -> None:  # type: ignore[override]
        """Serve awaits the product's."""


def replica(standing: Standing) -> Any:
    made: Any = object.__new__(Gateway)
    made._config, made._service, made._standing, made._ending = Config(), Service(), standing, None
    made._state = made._service.state
    return made


async def test_its_requests_end_after_the_drain_time_when_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "_STANDING_PERIOD_S", 0.0)
    one = replica(Standing(False, True))
    one._note_standing(True, 0)
    assert one._ending is None
    one._note_standing(False, 1)
    async with asyncio.timeout(20):
        await one._service.closed.wait()


async def test_a_controller_that_starts_again_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lists no gateways until it has found them."""
    monkeypatch.setattr(gateway, "_STANDING_PERIOD_S", 0.0)
    one = replica(Standing(False))
    one._note_standing(True, 1)
    one._note_standing(False, 0)
    async with asyncio.timeout(20):
        await one._standing.asked.wait()
    ending = one._ending
    one._note_standing(True, 1)
    await asyncio.wait([ending], timeout=20)
    assert ending.cancelled()
    assert one._ending is None
    assert not one._service.closed.is_set()


async def test_the_last_gateway_has_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "DRAIN_S", 0.0)
    monkeypatch.setattr(Config, "gateway_drain_timeout_s", 3600.0)
    one, other = replica(Standing(True)), replica(Standing(True))
    other._note_standing(False, 1)
    one._note_standing(False, 0)
    async with asyncio.timeout(20):
        await one._service.closed.wait()
    assert not other._service.closed.is_set()
    other._ending.cancel()
