"""Fixtures of the tests of benchmarks."""

import pytest

from tests.support.gpu_parts import Limits


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Limits:
    return Limits(monkeypatch)
