"""The events of a response: a pure function of its record and of the events of its generation,
which are made per token. An id and a sequence number name the same bytes whenever they are made
again from the same tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import orjson

from cluster.events import GenerationEvent, Usage
from cluster.frontend.fold import (
    Finish,
    Fold,
    PartDelta,
    PartDone,
    Phase,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
)
from cluster.frontend.responses.views import (
    ItemStatus,
    Json,
    ResponseRecord,
    call_item,
    failure,
    logprob_bodies,
    message_item,
    reasoning_item,
    reasoning_part,
    text_part,
)
from workers.errors import CantataError

Event = tuple[bytes, bytes]
"""An event's type and its JSON."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """How the text of an item is streamed.

    Attributes:
        prefix: of the item's id.
        text: type of the events of its text, without `.delta` and `.done`.
        field: name of the whole text in the `.done` event.
        part: type of the events of its part, without `.added` and `.done`; None: it has none.
        index: name of the part's index.
    """

    prefix: str
    text: str
    field: str = "text"
    part: str | None = None
    index: str | None = None


_MESSAGE = _Kind("msg", "response.output_text", part="response.content_part", index="content_index")
_REASONING = _Kind("rs", "response.reasoning_text", part="response.content_part", index="content_index")
_SUMMARY = _Kind(
    "rs", "response.reasoning_summary_text", part="response.reasoning_summary_part", index="summary_index"
)
_FUNCTION = _Kind("fc", "response.function_call_arguments", field="arguments")
_CUSTOM = _Kind("ctc", "response.custom_tool_call_input", field="input")


class _Item:
    """An item that is being written.

    Attributes:
        message: index of its harmony message.
        head: beginning of its delta events, up to the text.
        is_cut: its message is over without an end of its own.
    """

    def __init__(self, kind: _Kind, id: str, index: int, message: int) -> None:
        self.kind = kind
        self.id = id
        self.index = index
        self.message = message
        self.texts: list[str] = []
        self.logprobs: list[Json] = []
        self.phase: Phase = "final_answer"
        self.call: ToolCallDelta | None = None
        self.namespace: str | None = None
        self.name = ""
        self.is_cut = False
        place = {"item_id": id, "output_index": index}
        if kind.index is not None:
            place[kind.index] = 0
        self.place: Json = place
        self.type = f"{kind.text}.delta".encode()
        self.head = orjson.dumps({"type": f"{kind.text}.delta", **place})[:-1]

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def part(self, text: str) -> Json:
        if self.kind is _MESSAGE:
            return text_part(text, self.logprobs)
        return reasoning_part(text, as_summary=self.kind is _SUMMARY)

    def body(self, status: ItemStatus, seal: Callable[[str], str] | None) -> Json:
        """Return the item as it is now; parts only when they are complete."""
        is_open = status == "in_progress"
        text = "" if is_open else self.text
        if self.kind is _MESSAGE:
            return message_item(self.id, [] if is_open else [self.part(text)], status, self.phase)
        if self.call is not None:
            return call_item(
                self.id,
                self.call.id or "",
                self.name,
                text,
                status,
                custom=self.call.custom,
                namespace=self.namespace,
            )
        sealed = None if seal is None or is_open else seal(text)
        return reasoning_item(self.id, text, status, as_summary=self.kind is _SUMMARY, sealed=sealed)


_TERMINAL = {"cancelled": "incomplete"}
"""Kind of the terminal event by the status of the response, where they differ."""


class ResponseEvents:
    """The maker of one response's events, in order: `begin` once, `add` for each event of the
    generation, then the terminal event, which the Usage or `fail` gives.

    Args:
        seal: seals the text of reasoning; needed where the record asks for it.
        now: the current time in Unix seconds, for `completed_at`.

    Attributes:
        response: the Response object after the terminal event; None before it.
    """

    def __init__(
        self, record: ResponseRecord, now: Callable[[], int], seal: Callable[[str], str] | None = None
    ) -> None:
        self.response: Json | None = None
        self._record = record
        self._now = now
        self._seal = seal if record.seals_reasoning else None
        self._fold = Fold(record.custom_tools, record.id)
        self._output: list[Json] = []
        self._item: _Item | None = None
        self._finish = Finish("stop")
        self._sequence_number = 0

    def begin(self) -> list[Event]:
        """Return the events before the first token; none if they have been made."""
        if self._sequence_number:
            return []
        begun = self._record.response("in_progress")
        return [
            self._event("response.created", {"response": begun}),
            self._event("response.in_progress", {"response": begun}),
        ]

    def add(self, event: GenerationEvent) -> Sequence[Event]:
        """Return the events that an event of the generation gives."""
        if isinstance(event, Usage):
            return self._end(event)
        part = self._fold.add_part(event)
        return () if part is None else self._part(part)

    def fail(self, error: CantataError) -> list[Event]:
        """Return the events of a generation that failed, or never began."""
        if self.response is not None:
            return []
        events = self.begin()
        output = self._output
        if self._item is not None:
            output = [*output, self._item.body("incomplete", self._seal)]
        self.response = self._record.response("failed", output, error=failure(error))
        if not self.response.get("background"):
            self.response["store"] = False  # stored are answers, and what is of the background
        return [*events, self._event("response.failed", {"response": self.response})]

    def cancel(self) -> Json:
        """Return the Response object of a response that is cancelled now."""
        output = self._output
        if self._item is not None:
            output = [*output, self._item.body("incomplete", self._seal)]
        self.response = self._record.response("cancelled", output)
        return self.response

    def end_with(self, response: Json) -> list[Event]:
        """Return the terminal event of a response that ended elsewhere as `response`."""
        self.response = response
        status = response["status"]
        return [self._event(f"response.{_TERMINAL.get(status, status)}", {"response": response})]

    def _part(self, part: PartDelta) -> Sequence[Event]:
        delta, item = part.delta, self._item
        if item is not None and item.message == part.message and not item.is_cut:
            if isinstance(delta, TextDelta | ReasoningDelta):
                return self._text(item, delta.text, part) if delta.text else ()
            if isinstance(delta, ToolCallDelta):
                return self._text(item, delta.arguments, part) if delta.arguments else ()
            if isinstance(delta, PartDone) and delta.end is None:
                item.is_cut = True  # by what is known at the end
                return ()
        if isinstance(delta, PartDone):
            return self._close("completed")
        if isinstance(delta, Finish):
            self._finish = delta
            return self._close("incomplete" if delta.reason == "length" else "completed")
        return [*self._close("completed"), *self._open(part.message, delta, part)]

    def _open(
        self, message: int, delta: TextDelta | ReasoningDelta | ToolCallDelta, part: PartDelta
    ) -> list[Event]:
        kind = self._kind_of(delta)
        index = len(self._output)
        item = self._item = _Item(kind, self._record.item_id(kind.prefix, index), index, message)
        text = delta.arguments if isinstance(delta, ToolCallDelta) else delta.text
        if isinstance(delta, TextDelta):
            item.phase = delta.phase
        elif isinstance(delta, ToolCallDelta):
            item.call, item.name = delta, delta.name or ""
            found = (self._record.namespaces or {}).get(item.name)
            if found is not None:
                item.namespace, item.name = found
        body = item.body("in_progress", None)
        events = [self._event("response.output_item.added", {"output_index": index, "item": body})]
        if kind.part is not None:
            events.append(self._event(f"{kind.part}.added", {**item.place, "part": item.part("")}))
        return [*events, *self._text(item, text, part)] if text else events

    def _kind_of(self, delta: TextDelta | ReasoningDelta | ToolCallDelta) -> _Kind:
        if isinstance(delta, ToolCallDelta):
            return _CUSTOM if delta.custom else _FUNCTION
        if isinstance(delta, TextDelta):
            return _MESSAGE
        return _SUMMARY if self._record.summarizes else _REASONING

    def _text(self, item: _Item, text: str, part: PartDelta) -> list[Event]:
        """Return the delta event of a piece of text, put together without a dict: it is the event
        of each token."""
        item.texts.append(text)
        middle = b""
        if item.kind is _MESSAGE:
            middle = b',"logprobs":[]'
            if part.logprobs and self._record.shows_logprobs:
                logprobs = logprob_bodies(part.logprobs)
                item.logprobs += logprobs
                middle = b',"logprobs":' + orjson.dumps(logprobs)
        number = self._sequence_number
        self._sequence_number = number + 1
        body = b'%b%b,"delta":%b,"sequence_number":%d}' % (item.head, middle, orjson.dumps(text), number)
        return [(item.type, body)]

    def _close(self, status: ItemStatus) -> list[Event]:
        item, self._item = self._item, None
        if item is None:
            return []
        kind, text = item.kind, item.text
        done: Json = {**item.place, kind.field: text}
        if kind is _MESSAGE:
            done["logprobs"] = item.logprobs
        elif kind is _FUNCTION:
            done["name"] = item.name
        events = [self._event(f"{kind.text}.done", done)]
        if kind.part is not None:
            events.append(self._event(f"{kind.part}.done", {**item.place, "part": item.part(text)}))
        body = item.body(status, self._seal)
        self._output.append(body)
        events.append(self._event("response.output_item.done", {"output_index": item.index, "item": body}))
        return events

    def _end(self, usage: Usage) -> list[Event]:
        was_cut = self._finish.reason == "length"
        status = "incomplete" if was_cut else "completed"
        self.response = self._record.response(
            status,
            self._output,
            usage=usage,
            completed_at=None if was_cut else self._now(),
            incomplete="max_output_tokens" if was_cut else None,
        )
        return [self._event(f"response.{status}", {"response": self.response})]

    def _event(self, kind: str, fields: Json) -> Event:
        number = self._sequence_number
        self._sequence_number = number + 1
        return kind.encode(), orjson.dumps({"type": kind, **fields, "sequence_number": number})


def sse_frame(events: Sequence[Event]) -> bytes:
    """Return events as server-sent events."""
    if len(events) == 1:
        return b"event: %b\ndata: %b\n\n" % events[0]
    return b"".join([b"event: %b\ndata: %b\n\n" % event for event in events])
