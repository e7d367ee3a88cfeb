"""The end of the grace period: requests that are left end with an error their clients see, before
the servers cut connections."""

import asyncio
from typing import cast

import pytest
import uvicorn

from cluster.frontend.grpc_api import GrpcServer
from cluster.generation import GenerationService
from cluster.standalone import serve as standalone


class Service:
    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def close(self) -> None:
        self.closed.set()


class Grpc:
    async def stop(self, grace_s: float) -> None:
        assert grace_s > standalone.DRAIN_S, "the servers cut connections before clients can be told"


class Http:
    should_exit = force_exit = False


async def test_requests_left_after_the_grace_period_are_ended_by_the_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(standalone, "DRAIN_S", 0.05)
    service = Service()

    async def serve() -> None:
        await service.closed.wait()

    async with asyncio.timeout(10):
        await standalone._drain(
            cast(uvicorn.Server, Http()),
            asyncio.create_task(serve()),
            cast(GrpcServer, Grpc()),
            cast(GenerationService, service),
            standalone.StopSignals(),
        )
    assert service.closed.is_set()
