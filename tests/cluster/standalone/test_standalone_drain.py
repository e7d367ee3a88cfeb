"""The end of the grace period: requests that are left end with an error their clients see, before
the servers cut connections."""

import asyncio
from typing import Any, cast

import uvicorn

from cluster.assembly import Gateway
from cluster.config import load_config
from cluster.frontend.grpc_api import GrpcServer
from cluster.standalone import serve as standalone
from cluster.ways_of_serving import check_standalone

DRAIN_S = 0.05


class Service:
    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.state = State(self)

    async def close(self) -> None:
        assert self.state.is_stopped, "background responses fail"
        self.closed.set()


class State:
    def __init__(self, service: Service) -> None:
        self.service = service
        self.is_stopped = False

    async def stop(self) -> None:
        assert not self.service.closed.is_set()
        self.is_stopped = True


class Grpc:
    async def stop(self, grace_s: float) -> None:
        assert grace_s > DRAIN_S, "the servers cut connections before clients can be told"


class Http:
    should_exit = force_exit = False


async def test_requests_left_after_the_grace_period_are_ended_by_the_service() -> None:
    service = Service()
    parts: Any = (service, None, service.state)
    gateway = Gateway(*parts)

    async def serve() -> None:
        await service.closed.wait()

    async with asyncio.timeout(60):
        await standalone._drain(
            cast(uvicorn.Server, Http()),
            asyncio.create_task(serve()),
            cast(GrpcServer, Grpc()),
            gateway,
            standalone.StopSignals(),
            DRAIN_S,
        )
    assert service.closed.is_set()


def test_the_time_to_drain_is_a_setting_with_a_default_of_its_own() -> None:
    for value in (None, 0.0, 90.0, 1800.0):
        given = {} if value is None else {"gateway_drain_timeout_s": value}
        config = load_config(None, {}, {"engine.model_path": "somewhere", **given})
        check_standalone(config)
        assert standalone._drain_s(config) == (30.0 if value is None else value)
