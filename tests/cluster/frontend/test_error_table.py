"""Every error class has a row; rows are what clients of OpenAI expect."""

import inspect
import sys

import grpc
import orjson
import pytest

from cluster.frontend import errors as frontend_errors
from cluster.frontend.errors import TABLE, as_cantata_error, body, headers, row_of
from cluster.state import errors as state_errors
from workers import errors
from workers.rpc.convert import error_to_metadata

CLASSES = [
    kind
    for module in (errors, frontend_errors, state_errors)
    for _, kind in inspect.getmembers(module, inspect.isclass)
    if issubclass(kind, errors.CantataError) and kind.__module__ == module.__name__
]
STATUSES = {
    "InvalidRequest": 400,
    "ContextLengthExceeded": 400,
    "UnknownAutomaton": 500,
    "ModelNotFound": 404,
    "Overloaded": 429,
    "ConstraintNotReady": 429,
    "DeadlineExceeded": 504,
    "Cancelled": 499,
    "EngineDead": 503,
    "NoReplica": 503,
    "CantataError": 500,
    "Unauthenticated": 401,
    "ForeignOrigin": 403,
    "BodyTooLarge": 413,
    "BrokenContent": 400,
    "HeadersTooLarge": 431,
    "RequestTimeout": 408,
    "UnsupportedMediaType": 415,
    "NotStored": 404,
    "ItemTooLarge": 400,
    "StateUnavailable": 503,
    "StateFull": 503,
    "PreviousResponseNotFound": 400,
    "UnknownRoute": 404,
    "WrongMethod": 405,
}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_has_a_row_and_a_grpc_status(kind: type[errors.CantataError]) -> None:
    assert TABLE[kind].http_status == STATUSES[kind.__name__]
    assert kind.status in grpc.StatusCode.__members__
    error = orjson.loads(body(kind("A sentence.")))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] == "A sentence."


def test_the_table_has_no_other_rows() -> None:
    assert set(TABLE) == set(CLASSES)
    assert len(CLASSES) == len(STATUSES)


def test_retry_after_is_whole_seconds() -> None:
    assert headers(errors.Overloaded("full", 0.2)) == {"retry-after": "1"}
    assert headers(errors.Overloaded("full", 2.1)) == {"retry-after": "3"}


def test_a_503_says_when_to_try_again() -> None:
    assert headers(errors.NoReplica("none")) == {"retry-after": "5"}
    assert headers(errors.EngineDead("gone")) == {"retry-after": "1"}
    assert dict(error_to_metadata(errors.NoReplica("none")))["retry-after-s"] == "5"
    unavailable = [kind for kind, row in TABLE.items() if row.http_status in (429, 503)]
    assert all("retry-after" in headers(kind("x")) for kind in unavailable)


def test_a_request_that_came_too_slowly_ends_its_connection() -> None:
    assert headers(frontend_errors.RequestTimeout("late")) == {"connection": "close"}


def test_what_is_not_ours_is_hidden_behind_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    shown = as_cantata_error(ValueError("the prompt was: secret"), "id-1")
    assert row_of(shown).http_status == 500
    assert "id-1" in shown.message
    assert "secret" not in shown.message + caplog.text
    assert "ValueError" in caplog.text
    ours = errors.NoReplica("none")
    assert as_cantata_error(ours, "id-2") is ours


def test_a_request_without_memory_may_come_again(caplog: pytest.LogCaptureFixture) -> None:
    """One request that is too large for what is left is no failure of the server."""
    with pytest.raises(MemoryError) as caught:
        bytearray(sys.maxsize)
    shown = as_cantata_error(caught.value, "id-1")
    assert row_of(shown).http_status == 429
    assert "memory" in shown.message
    assert "id-1" in caplog.text
    assert row_of(as_cantata_error(RuntimeError("can't start new thread"), "id-2")).http_status == 429
