"""When launchers look at indices, which stops the host until the device is there."""

import pytest

from kernels import backend


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_indices_are_checked_where_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool
) -> None:
    monkeypatch.setattr(backend, "_interpreting", lambda: False)
    monkeypatch.delenv("CANTATA_CHECK_INDICES", raising=False)
    if value is not None:
        monkeypatch.setenv("CANTATA_CHECK_INDICES", value)
    assert backend.checks_indices() is expected


def test_the_interpreter_always_checks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_interpreting", lambda: True)
    monkeypatch.delenv("CANTATA_CHECK_INDICES", raising=False)
    assert backend.checks_indices()
