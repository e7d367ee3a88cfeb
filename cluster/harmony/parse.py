"""Parser of generated harmony tokens into messages, token by token. It accepts any ids in any
order."""

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Literal, cast

from cluster.harmony.encoding import HarmonyEncoding, IncrementalDecoder
from cluster.harmony.header import MAX_HEADER_TOKENS, HeaderReader, Place, Repair
from cluster.harmony.message import End, Kind, Message, MessageDelta, MessageEnd, MessageEvent, MessageStart

Part = Kind | Literal["markup"]

_AS_WRITTEN: tuple[Repair, ...] = (
    "after_turn",
    "unknown_tool",
    "call_not_closed",
    "call_without_recipient",
)
"""Departures that do not change how a message is read: its ids give the same message again."""


class _Trail:
    """The ids of the message that is being read.

    Attributes:
        ids: all ids from `<|start|>` on, or from the first token of a message without it.
    """

    def __init__(self, start: int, repairs: Counter[Repair]) -> None:
        self.ids: list[int] = []
        self._start = start
        self._repairs = repairs
        self._num_departures = 0

    def begin(self, ids: list[int]) -> None:
        """Begin a message with these ids."""
        self.ids = ids
        self._num_departures = self._count()

    def as_written(self) -> tuple[int, ...] | None:
        """Return the ids if they give the same message at any position; None if the message
        departed from the format."""
        whole = self.ids[:1] == [self._start] and self._count() == self._num_departures
        return tuple(self.ids) if whole else None

    def _count(self) -> int:
        return self._repairs.total() - sum(self._repairs[kind] for kind in _AS_WRITTEN)


class HarmonyParser:
    """The parser of one turn; the first token is the one after the prompt's `<|start|>assistant`.

    The state is a function of the tokens, so a turn can be resumed by pushing its tokens again.
    Well-formed turns give what openai_harmony's StreamableParser gives;
    `cluster.harmony.header.Repair` lists where the two differ on malformed ones. Header text is
    never shown, also when the turn is cut off inside it. Every message that starts ends, the last
    one in `finish`.

    Attributes:
        part: the part of a message to which the last pushed token belonged. `markup` are control
            tokens, header text, dropped tokens, and also the first tokens of a turn without markup
            as long as they could be a header.
        num_reasoning_tokens: tokens in the bodies of analysis messages.
        num_messages: messages opened so far; an event belongs to the last one.
        message: the message whose body is being read, without its content; None outside a body.
        turn_over: the turn has ended: `<|return|>`, `<|call|>` unless there may be several,
            `<|endoftext|>`, or the model opened a message of another role.
        repairs: number of departures from the format, by kind.
    """

    def __init__(
        self,
        encoding: HarmonyEncoding,
        tools: Collection[str] | None = None,
        *,
        several_calls: bool = False,
    ) -> None:
        """
        Args:
            tools: names of the declared functions, to tell unknown ones; None: not known.
            several_calls: a call does not end the turn. Then `<|return|>` does, also after the
                beginning of a result, `<|start|>functions`.
        """
        self.part: Part = "markup"
        self.num_reasoning_tokens = 0
        self.num_messages = 0
        self.message: Message | None = None
        self.turn_over = False
        self.repairs: Counter[Repair] = Counter()
        self._encoding = encoding
        self._tools = None if tools is None else frozenset(tools)
        self._decoder = IncrementalDecoder(encoding)
        # A header or a body is being read; between messages neither.
        self._header: HeaderReader | None = HeaderReader(self._tools, self.repairs, text="assistant")
        self._kind: Kind = "text"
        self._content: list[str] = []
        self._closed = False
        self._several_calls = several_calls
        self._after_call = False
        self._trail = _Trail(encoding.start, self.repairs)
        self._trail.begin([encoding.start, *encoding.encode_literal("assistant")])

    def push(self, token_id: int) -> list[MessageEvent]:
        """Take the next token; return the events that it completes. Never raises, whatever the
        id."""
        self.part = "markup"
        if self._closed:
            return []
        self._trail.ids.append(token_id)
        control = self._encoding.control_tokens.get(token_id)
        if control is None:
            if not self._encoding.token_bytes(token_id):
                self.repairs["stray_token"] += 1
                return []
            return self._on_header_text(token_id) if self.message is None else self._on_body_text(token_id)
        match control:
            case "start":
                return self._on_start()
            case "channel" | "constrain":
                return self._on_header_token(cast(Place, control))
            case "message":
                return self._on_message()
            case _:
                return self._on_end(control)

    def finish(self) -> list[MessageEvent]:
        """Return the last events, after the last token: an unfinished character, the end of a
        message that was cut off. An unfinished header is dropped."""
        closed, self._closed = self._closed, True
        return [] if closed or self.message is None else self._close_body(self.message, None)

    # Tokens, by kind

    def _on_start(self) -> list[MessageEvent]:
        events = self._leave()
        if not self._closed:
            self._open_header("role", started=True)
        return events

    def _on_header_token(self, place: Place) -> list[MessageEvent]:
        if self._header is not None:
            self._close_segment(self._header, self._decoder.flush(), place)
            return []
        if self.message is not None and place == "constrain":
            self.repairs["stray_token"] += 1
            return []
        started = self.message is not None  # in a message the departure is the missing end
        events = self._leave()
        self._open_header(place, started=started)
        return events

    def _on_message(self) -> list[MessageEvent]:
        if self.message is not None:
            self.repairs["stray_token"] += 1
            return []
        header = self._header or self._open_header("role", started=False)
        if not self._close_segment(header, self._decoder.flush()):
            return []
        message, leftover = header.read()
        if message.channel is None and message.recipient is None:
            self.repairs["missing_channel"] += 1
        if leftover:
            self.repairs["unknown_header_text"] += 1
        return [self._open_body(message)]

    def _on_end(self, control: str) -> list[MessageEvent]:
        if control == "endoftext":
            self.repairs["end_of_text"] += 1
        end = cast(End, "return" if control == "endoftext" else control)
        events: list[MessageEvent] = []
        goes_on = False
        if (message := self.message) is not None:
            goes_on = self._several_calls and message.recipient is not None and end == "call"
            if message.recipient is None and end == "call":
                self.repairs["call_without_recipient"] += 1
            if message.recipient is not None and end != "call":
                self.repairs["call_not_closed"] += 1
            events = self._close_body(message, end)
        elif self._after_call and end == "return" and (self._header is None or self._header.opens_result):
            self._header = None
        elif self._header is not None:
            events = self._close_header(self._header, end)
        else:
            self.repairs["stray_token"] += 1
        if end != "end" and not goes_on:
            self.turn_over = True
        self._after_call = goes_on
        return events

    def _on_body_text(self, token_id: int) -> list[MessageEvent]:
        self.part = self._kind
        if self._kind == "reasoning":
            self.num_reasoning_tokens += 1
        text = self._decoder.push(token_id)
        if not text:
            return []
        self._content.append(text)
        return [MessageDelta(text)]

    def _on_header_text(self, token_id: int) -> list[MessageEvent]:
        header = self._header or self._open_header("role", started=False)
        header.add(self._decoder.push(token_id))
        text = header.text_without_markup()
        if text is not None:
            message = Message("assistant", channel="final")
        elif header.num_tokens > MAX_HEADER_TOKENS:
            if not self._close_segment(header):
                return []
            message, text = header.read()
        else:
            return []
        header.count_unmarked(self.num_messages)
        start = self._open_body(message, text)
        self.part = self._kind
        if self._kind == "reasoning":
            self.num_reasoning_tokens += 1
        return [start]

    # Changes of state

    def _open_header(self, place: Place, *, started: bool) -> HeaderReader:
        self._trail.begin([self._encoding.start] if started and place == "role" else [])
        if not started:
            self.repairs["missing_start"] += 1
        self._header = HeaderReader(self._tools, self.repairs, place, started=started)
        return self._header

    def _close_segment(self, header: HeaderReader, rest: str = "", place: Place | None = None) -> bool:
        """Keep the header text after the last control token. Return False if it names another role:
        the turn is over.

        Args:
            rest: text of an unfinished character, which a control token after it leaves unfinished;
                before text it stays in the decoder, for the body.
            place: the control token; None: the header ends here.
        """
        header.close_segment(rest, place)
        if header.foreign:
            self.turn_over = self._closed = True
        return not header.foreign

    def _open_body(self, message: Message, text: str = "") -> MessageStart:
        if self.turn_over:
            self.repairs["after_turn"] += 1
        if message.channel is None and message.recipient is None:
            message = replace(message, channel="final")
        self._header, self.message, self._kind = None, message, message.kind
        self._content = [text]
        self.num_messages += 1
        return MessageStart(self.num_messages - 1, message, text)

    def _close_body(self, message: Message, end: End | None) -> list[MessageEvent]:
        rest = self._decoder.flush()
        content = "".join(self._content) + rest
        whole = replace(message, content=content, end=end, token_ids=self._trail.as_written())
        self.message = None
        return [MessageDelta(rest), MessageEnd(whole)] if rest else [MessageEnd(whole)]

    def _close_header(self, header: HeaderReader, end: End) -> list[MessageEvent]:
        """Close a header that ended without `<|message|>`: the text that a header does not explain
        is the body; a recipient and `<|call|>` are a call."""
        if not self._close_segment(header, self._decoder.flush()):
            return []
        message, leftover = header.read()
        self._header = None
        if not leftover and not (message.recipient is not None and end == "call"):
            self.repairs["empty_message"] += 1
            return []
        header.count_unmarked(self.num_messages)
        start = self._open_body(message, leftover)
        return [start, *self._close_body(start.message, end)]

    def _leave(self) -> list[MessageEvent]:
        """End the open header or body, for a token that begins a message out of turn. Text that is
        not a header is kept."""
        if self.message is not None:
            self.repairs["missing_end"] += 1
            return self._close_body(self.message, "end")
        return [] if self._header is None else self._close_header(self._header, "end")
