"""Errors of the state that clients see."""

from workers.errors import CantataError, InvalidRequest


class NotStored(CantataError):
    """No object of the caller has this id: it never had, or was deleted, expired, or belongs to
    another key."""

    status = "NOT_FOUND"


class ItemTooLarge(InvalidRequest):
    """An item is over `state.max_item_bytes`."""


class StateUnavailable(CantataError):
    """The database does not answer, or cannot be used; requests that need none are served."""

    status = "UNAVAILABLE"
    retry_after_s = 5.0


class StateFull(CantataError):
    """The disk of the database is full."""

    status = "UNAVAILABLE"
    retry_after_s = 60.0
