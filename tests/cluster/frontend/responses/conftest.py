"""The fixtures of the front end's tests."""

from tests.cluster.frontend.conftest import encoding, engine, gateway, stub

__all__ = ["encoding", "engine", "gateway", "stub"]
