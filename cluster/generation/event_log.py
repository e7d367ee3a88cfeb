"""The events of a choice as they are collected from its tokens."""

from collections.abc import Sequence
from dataclasses import replace

from cluster.events import ChoiceDelta, ChoiceFinish, FinishReason, TokenLogprob
from cluster.harmony.message import MessageDelta, MessageEnd, MessageEvent, MessageStart

ChoiceEvent = ChoiceDelta | ChoiceFinish


class EventLog:
    """The events of one push, each with the tokens since the previous one; pieces of one message
    are joined.

    Args:
        per_token: join only the pieces that one token gives.
    """

    def __init__(self, index: int, *, per_token: bool = False) -> None:
        self._index = index
        self._per_token = per_token
        self._token_ids: list[int] = []
        self._events: list[ChoiceEvent] = []
        # The first of the pieces, the texts of all of them.
        self._joined: MessageStart | MessageDelta | None = None
        self._texts: list[str] = []
        self._joined_logprobs: list[TokenLogprob] = []
        self._joined_ids: list[int] = []

    def token(self, token_id: int) -> None:
        """Begin a token: the events that follow are its own."""
        self.boundary()
        self._token_ids.append(token_id)

    def boundary(self) -> None:
        """Begin what the next token, or the end, gives."""
        if self._per_token:
            self._close()

    def add(self, event: MessageEvent, logprobs: Sequence[TokenLogprob] = ()) -> None:
        """Add an event, with the log-probabilities of its tokens."""
        if isinstance(event, MessageEnd):
            self._close()
            self._events.append(ChoiceDelta(self._index, event, token_ids=tuple(self._token_ids)))
            self._token_ids.clear()
            return
        if self._joined is None or isinstance(event, MessageStart):
            self._close()
            self._joined = event
        self._texts.append(event.text)
        self._joined_logprobs += logprobs
        self._joined_ids += self._token_ids
        self._token_ids.clear()

    def finish(
        self, reason: FinishReason, stop_reason: str | int | None, logprobs: Sequence[TokenLogprob]
    ) -> None:
        """Add the end of the choice."""
        self._close()
        self._events.append(
            ChoiceFinish(self._index, reason, stop_reason, tuple(logprobs), tuple(self._token_ids))
        )
        self._token_ids.clear()

    def take(self) -> list[ChoiceEvent]:
        """Return the events, and forget them."""
        self._close()
        events, self._events = self._events, []
        return events

    def _close(self) -> None:
        if self._joined is not None:
            event = self._joined
            if len(self._texts) > 1:
                event = replace(event, text="".join(self._texts))
            self._events.append(
                ChoiceDelta(self._index, event, tuple(self._joined_logprobs), tuple(self._joined_ids))
            )
            self._joined = None
            self._texts.clear()
            self._joined_logprobs.clear()
            self._joined_ids.clear()
