"""The errors that cross a process, each with its gRPC status and one sentence for the user.

`cluster.frontend.errors` maps the same classes to HTTP; the edges translate by lookup and never
parse a message.
"""

import signal
from typing import ClassVar

_MAX_MESSAGE_CHARS = 1000
"""Longest text of a message, which may quote a name or an id that the client sent."""


class CantataError(Exception):
    """Base of all errors that a client may see; `message` says what to change."""

    status: ClassVar[str] = "INTERNAL"
    """Name of the gRPC status code."""
    retry_elsewhere: ClassVar[bool] = False
    """Whether the router may try the request on another replica."""
    retry_after_s: float | None = None
    """When the client may try again; None: not as it is, or at once."""
    param: str | None = None
    """The field that is wrong, in the client's own spelling."""

    def __init__(self, message: str) -> None:
        if len(message) > _MAX_MESSAGE_CHARS:
            message = f"{message[:_MAX_MESSAGE_CHARS]}…"
        super().__init__(message)
        self.message = message


class InvalidRequest(CantataError):
    """The request cannot be served as it is; `param` names the field in the client's own
    spelling."""

    status = "INVALID_ARGUMENT"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthExceeded(InvalidRequest):
    """Prompt, or prompt plus `max_tokens`, is longer than the model's context."""


class UnknownAutomaton(CantataError):
    """The engine was never sent the automaton that a request names, or has forgotten it. The
    gateway's client sends it then; no user sees this."""

    status = "FAILED_PRECONDITION"


class ModelNotFound(CantataError):
    """No such model here."""

    status = "NOT_FOUND"
    param = "model"


class Overloaded(CantataError):
    """A queue or the KV cache is full; try again after `retry_after_s`."""

    status = "RESOURCE_EXHAUSTED"
    retry_elsewhere = True
    retry_after_s: float

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(CantataError):
    """The request's deadline passed before its last token."""

    status = "DEADLINE_EXCEEDED"


class Cancelled(CantataError):
    """The client left."""

    status = "CANCELLED"


class EngineDead(CantataError):
    """The engine, or one of its ranks, is gone or shutting down.

    Attributes:
        under_request: it died with the request in it, which may be the cause; False: it was not
            reached, or is shutting down.
    """

    status = "UNAVAILABLE"
    retry_elsewhere = True
    retry_after_s = 1.0

    def __init__(self, message: str, *, under_request: bool = True) -> None:
        super().__init__(message)
        self.under_request = under_request


class NoReplica(CantataError):
    """No replica is ready to take the request: it starts, or starts again, which takes seconds at
    least."""

    status = "UNAVAILABLE"
    retry_elsewhere = True
    retry_after_s = 5.0


class CheckpointError(Exception):
    """A checkpoint cannot be loaded; the message is one sentence that names the file, tensor or
    field. Seen at start-up only."""


class ConfigError(Exception):
    """The configuration cannot work; the message names the field. Seen at start-up only."""


class RankCrashed(ConfigError):
    """A rank, or its trial of the C++ kernels, ended by a signal that says that its own program is
    at fault; starting it again as it is will not help.

    Attributes:
        signal: which one, of those that `workers.exit_codes.crash` knows.
    """

    def __init__(self, message: str, number: signal.Signals) -> None:
        super().__init__(message)
        self.signal = number
