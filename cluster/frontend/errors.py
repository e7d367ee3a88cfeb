"""Errors as HTTP answers: one table from class to status, `type` and `code`, in OpenAI's body
form. Other APIs have forms of their own (`anthropic/errors.py`)."""

import logging
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import orjson

from cluster.state import errors as state_errors
from workers import errors
from workers.out_of_memory import is_out_of_memory

_log = logging.getLogger(__name__)


class Unauthenticated(errors.CantataError):
    """The API key is missing or wrong."""

    status = "UNAUTHENTICATED"


class ForeignOrigin(errors.CantataError):
    """A web page of an origin that may not use the server."""

    status = "PERMISSION_DENIED"


class BodyTooLarge(errors.InvalidRequest):
    """The body is over the limit."""


class HeadersTooLarge(errors.InvalidRequest):
    """The request's line and headers are over the limit."""


class RequestTimeout(errors.InvalidRequest):
    """The request did not arrive in time."""


class UnsupportedMediaType(errors.InvalidRequest):
    """The body is not declared as JSON, or it is compressed."""


class BrokenContent(errors.InvalidRequest):
    """Encrypted content that this deployment did not make for this API key, or that was changed."""


class PreviousResponseNotFound(errors.InvalidRequest):
    """The response that a request continues, or one that this one continues, is not there."""


class UnknownRoute(errors.CantataError):
    """The path does not exist."""

    status = "UNIMPLEMENTED"


class WrongMethod(errors.CantataError):
    """The path exists for other methods, which `allow` lists as HTTP does."""

    status = "UNIMPLEMENTED"

    def __init__(self, message: str, allow: str = "") -> None:
        super().__init__(message)
        self.allow = allow


@dataclass(frozen=True, slots=True)
class Row:
    """The HTTP form of an error class.

    Attributes:
        type, code: fields of OpenAI's error object.
    """

    http_status: int
    type: str
    code: str | None = None


TABLE: dict[type[errors.CantataError], Row] = {
    errors.InvalidRequest: Row(400, "invalid_request_error"),
    errors.ContextLengthExceeded: Row(400, "invalid_request_error", "context_length_exceeded"),
    errors.UnknownAutomaton: Row(500, "server_error", "internal_error"),
    errors.ModelNotFound: Row(404, "invalid_request_error", "model_not_found"),
    errors.Overloaded: Row(429, "rate_limit_error", "overloaded"),
    errors.ConstraintNotReady: Row(429, "rate_limit_error", "overloaded"),
    errors.DeadlineExceeded: Row(504, "timeout_error", "deadline_exceeded"),
    errors.Cancelled: Row(499, "client_closed_request", "cancelled"),
    errors.EngineDead: Row(503, "server_error", "engine_unavailable"),
    errors.NoReplica: Row(503, "server_error", "no_replica"),
    errors.CantataError: Row(500, "server_error", "internal_error"),
    state_errors.NotStored: Row(404, "invalid_request_error", "not_found"),
    state_errors.ItemTooLarge: Row(400, "invalid_request_error", "item_too_large"),
    state_errors.StateUnavailable: Row(503, "server_error", "state_unavailable"),
    state_errors.StateFull: Row(503, "server_error", "state_full"),
    Unauthenticated: Row(401, "invalid_request_error", "invalid_api_key"),
    ForeignOrigin: Row(403, "invalid_request_error", "foreign_origin"),
    BodyTooLarge: Row(413, "invalid_request_error", "body_too_large"),
    HeadersTooLarge: Row(431, "invalid_request_error", "headers_too_large"),
    RequestTimeout: Row(408, "invalid_request_error", "request_timeout"),
    UnsupportedMediaType: Row(415, "invalid_request_error", "unsupported_media_type"),
    BrokenContent: Row(400, "invalid_request_error", "invalid_encrypted_content"),
    PreviousResponseNotFound: Row(400, "invalid_request_error", "previous_response_not_found"),
    UnknownRoute: Row(404, "invalid_request_error", "unknown_route"),
    WrongMethod: Row(405, "invalid_request_error", "method_not_allowed"),
}
"""HTTP form by error class. Every class has a row; a test looks for those without."""


def row_of(error: errors.CantataError) -> Row:
    """Return the row of the error's class."""
    return TABLE[type(error)]


def body(error: errors.CantataError) -> bytes:
    """Return OpenAI's error object as JSON."""
    row = row_of(error)
    return orjson.dumps(
        {"error": {"message": error.message, "type": row.type, "param": error.param, "code": row.code}}
    )


@dataclass(frozen=True, slots=True)
class ErrorForm:
    """How an API writes its errors.

    Attributes:
        status: returns the HTTP status.
        body: returns the body, given the request id.
        id_header: a second header of all answers that has the request id, for the API's clients.
    """

    status: Callable[[errors.CantataError], int]
    body: Callable[[errors.CantataError, str], bytes]
    id_header: str | None = None


OPENAI = ErrorForm(lambda error: row_of(error).http_status, lambda error, _: body(error))


def headers(error: errors.CantataError) -> dict[str, str]:
    """Return the headers that an error's status needs."""
    if error.retry_after_s is not None:
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, RequestTimeout):
        return {"connection": "close"}
    if isinstance(error, Unauthenticated):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, WrongMethod):
        return {"allow": error.allow}
    return {}


def as_cantata_error(error: Exception, request_id: str) -> errors.CantataError:
    """Return the error that a client may see. An exception of another kind is logged and becomes a
    generic error with the request id."""
    if isinstance(error, errors.CantataError) and type(error) is not errors.CantataError:
        return error
    if is_out_of_memory(error):
        _log.error("request %s: this process is out of memory", request_id)
        return errors.Overloaded(
            "The server has too little memory for this request now; send a smaller one, or retry later."
        )
    # The frames and the type, never the exception's text: it may quote a prompt.
    frames = "".join(traceback.format_tb(error.__traceback__))
    _log.error("request %s failed with %s\n%s", request_id, type(error).__name__, frames)
    return errors.CantataError(
        f"The server failed on this request; its log says more under the request id {request_id}."
    )
