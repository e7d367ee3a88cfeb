"""The errors that cross a process boundary, each with its gRPC status and one sentence for the
user.

`cluster.frontend.errors` maps the same classes to HTTP; the edges translate by lookup and never
parse a message.
"""

import signal
from typing import ClassVar

_MAX_MESSAGE_CHARS = 1000
"""Maximum characters of a message, which may quote a name or an id from the client."""


class CantataError(Exception):
    """Base of all errors that a client may see; `message` says what to change."""

    status: ClassVar[str] = "INTERNAL"
    """Name of the gRPC status code."""
    retry_elsewhere: ClassVar[bool] = False
    """Whether the router may try the request on another replica."""
    retry_after_s: float | None = None
    """Seconds after which the client may retry; None if it should change the request, or may retry
    at once."""
    param: str | None = None
    """The field that is wrong, in the client's own spelling."""
    num_deaths: int = 0
    """Number of engines that died under the request before this error, as the router counts."""

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
    """The prompt, or the prompt and the requested output, is longer than the context."""


class UnknownAutomaton(CantataError):
    """A request names an automaton that the engine was never sent or has forgotten. The gateway's
    client then sends it; users never see this error."""

    status = "FAILED_PRECONDITION"


class ModelNotFound(CantataError):
    """The named model does not exist here."""

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


class ConstraintNotReady(Overloaded):
    """The engine had no room or no time to prepare the request's constraint, because of its load or
    of a grammar that is slow to compile."""


class DeadlineExceeded(CantataError):
    """The request's deadline passed before its last token."""

    status = "DEADLINE_EXCEEDED"


class Cancelled(CantataError):
    """The client disconnected."""

    status = "CANCELLED"


class EngineDead(CantataError):
    """The engine, or one of its ranks, is gone or shutting down.

    Attributes:
        under_request: whether it died while running the request, which may be the cause; False if
            it was not reached or is shutting down.
    """

    status = "UNAVAILABLE"
    retry_elsewhere = True
    retry_after_s = 1.0

    def __init__(self, message: str, *, under_request: bool = True) -> None:
        super().__init__(message)
        self.under_request = under_request


class NoReplica(CantataError):
    """No replica is ready to take the request: they are starting or restarting, which takes seconds
    at least."""

    status = "UNAVAILABLE"
    retry_elsewhere = True
    retry_after_s = 5.0


class CheckpointError(Exception):
    """A checkpoint cannot be loaded; the message is one sentence that names the file, tensor or
    field. Raised only at start-up."""


class ConfigError(Exception):
    """The configuration cannot work; the message names the field. Raised only at start-up."""


class RankCrashed(ConfigError):
    """A rank, or its trial of the C++ kernels, was ended by a signal that indicates a fault in its
    own program; restarting it unchanged will not help.

    Attributes:
        signal: one of the signals that `workers.exit_codes.crash` returns.
    """

    def __init__(self, message: str, number: signal.Signals) -> None:
        super().__init__(message)
        self.signal = number
