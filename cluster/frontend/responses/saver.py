"""Storing a response at its end."""

import logging
from collections.abc import Sequence

import orjson

from cluster.frontend.responses.events import Event
from cluster.frontend.responses.prior import Prior
from cluster.frontend.responses.views import Json, ResponseRecord
from cluster.state import responses as stored
from cluster.state.rows import StoredItem
from cluster.state.state import State
from workers.errors import CantataError

_log = logging.getLogger(__name__)


class Saver:
    """What stores one response when it is complete, before the client learns of it."""

    def __init__(self, state: State, record: ResponseRecord, prior: Prior, owner: str) -> None:
        self._state = state
        self._record = stored.ResponseRecord(
            id=record.id,
            owner=owner,
            created_at=record.created_at,
            request={},
            inputs=prior.inputs,
            previous_response_id=prior.previous_response_id,
            conversation_id=prior.conversation_id,
            conversation_position=prior.conversation_position,
        )

    async def check(self) -> None:
        """Check, before the response begins, that it can be stored.

        Raises:
            ItemTooLarge: an item of the input is too large.
            StateUnavailable: the database does not answer.
        """
        await self._state.responses.check(self._record.inputs)

    async def save(self, response: Json) -> None:
        """Store a response. One that cannot be stored any more says so in its field `store`: the
        client still gets what it has waited for."""
        status: stored.Status = response["status"]
        outputs = [StoredItem(item) for item in response["output"]]
        try:
            await self._state.responses.put(self._record, status, response, outputs)
        except CantataError as error:
            _log.warning("response %s is not stored: %s", self._record.id, type(error).__name__)
            response["store"] = False

    async def saved(self, response: Json, events: Sequence[Event]) -> Sequence[Event]:
        """Store a response; return its last events with the field `store` as it is now."""
        await self.save(response)
        if response["store"]:
            return events
        *before, (kind, data) = events
        return [*before, (kind, orjson.dumps({**orjson.loads(data), "response": response}))]
