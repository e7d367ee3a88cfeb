"""Errors in the form of Anthropic's API, with the words by which its clients tell them apart."""

import re

import orjson

from cluster.frontend import errors
from cluster.frontend.errors import BodyTooLarge, ErrorForm, Unauthenticated
from workers.errors import CantataError, ContextLengthExceeded, InvalidRequest, ModelNotFound, Overloaded

PATH = "/v1/messages"
TOO_LONG = "prompt is too long"
"""Words on which clients shorten the conversation."""

_OVERLOADED = 529
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    _OVERLOADED: "overloaded_error",
}
"""Type of an error by its HTTP status; of others below 500 it is invalid_request_error, else
api_error."""
_PREFIXES: dict[type[CantataError], str] = {
    ContextLengthExceeded: TOO_LONG,
    ModelNotFound: "model",
    Unauthenticated: "invalid x-api-key",
    BodyTooLarge: "request_too_large",
}
"""Words with which the message of an error begins."""

_DETAILS = {"thread": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}}
"""Details of an error by its field: on these a client sends the whole conversation."""


def status(error: CantataError) -> int:
    """Return the HTTP status of an error."""
    return _OVERLOADED if isinstance(error, Overloaded) else errors.row_of(error).http_status


def kind(error: CantataError) -> str:
    """Return the `type` of an error."""
    code = status(error)
    return _TYPES.get(code, "invalid_request_error" if code < 500 else "api_error")


def message(error: CantataError) -> str:
    """Return the sentence of an error: fields are spelt as in `messages.0.content`."""
    text, param = error.message, error.param
    if isinstance(error, InvalidRequest) and param:
        dotted = re.sub(r"\[(\d+)\]", r".\1", param)
        text = f"{dotted}: Field required" if text == f"{param} is missing." else text.replace(param, dotted)
    prefix = _PREFIXES.get(type(error))
    return text if prefix is None or text.startswith(prefix) else f"{prefix}: {text}"


def body(error: CantataError, request_id: str) -> bytes:
    """Return Anthropic's error object as JSON."""
    shown: dict[str, object] = {"type": kind(error), "message": message(error)}
    if error.param in _DETAILS:
        shown["details"] = _DETAILS[error.param]
    return orjson.dumps({"type": "error", "error": shown, "request_id": request_id})


FORM = ErrorForm(status, body, id_header="request-id")
