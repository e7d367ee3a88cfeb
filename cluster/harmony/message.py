"""The harmony message, which the parser yields and the renderer takes, and the events of its
generation. The front end maps each API's own shapes to and from these."""

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["developer", "user", "assistant", "tool"]
Channel = Literal["analysis", "commentary", "final"]
CHANNELS: tuple[Channel, ...] = ("analysis", "commentary", "final")
End = Literal["end", "call", "return"]
Kind = Literal["reasoning", "text", "tool_call"]

FUNCTIONS = "functions."
"""Namespace of declared functions in recipients and in the names of tools that answer."""


BLANK_LINE = "\n\n"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat or of a turn.

    Attributes:
        content: the text; names of special tokens in it are text.
        name: tool: the tool that answers, such as `functions.f`; user: the speaker; None elsewhere.
        recipient: as written after `to=`, such as `functions.f`, `browser.search` or `python`;
            None: the message has no recipient.
        content_type: such as `json`, written with or without `<|constrain|>`; None: not given.
        end: the token that closed it; None: it was cut off, or is still being written.
        token_ids: the ids as which it was generated, from `<|start|>` to its end, while its turn
            lives; None: it came as text, or departed from the format and is rendered as it was
            read. Equality of messages ignores them.
        call_id: the id by which a client's results name this call; None: it is no call, or has
            none.
    """

    role: Role
    content: str = ""
    name: str | None = None
    recipient: str | None = None
    channel: Channel | None = None
    content_type: str | None = None
    end: End | None = None
    token_ids: tuple[int, ...] | None = field(default=None, compare=False, repr=False)
    call_id: str | None = field(default=None, compare=False, repr=False)

    @property
    def kind(self) -> Kind:
        """Kind of an assistant's message. The recipient, not the channel, makes it a call."""
        if self.recipient is not None:
            return "tool_call"
        return "reasoning" if self.channel == "analysis" else "text"


@dataclass(frozen=True, slots=True)
class MessageStart:
    """A message begins.

    Attributes:
        index: its place in the turn, from 0.
        message: the fields that its header gives; without content and end.
        text: the beginning of its content, if it came with the header.
    """

    index: int
    message: Message
    text: str = ""


@dataclass(frozen=True, slots=True)
class MessageDelta:
    """The next piece of the content of the message that began last."""

    text: str


@dataclass(frozen=True, slots=True)
class MessageEnd:
    """The message that began last is complete, or was cut off."""

    message: Message


MessageEvent = MessageStart | MessageDelta | MessageEnd


def shows(event: MessageEvent) -> bool:
    """Return whether clients see a part of an assistant's event: text, or the beginning of a
    call."""
    match event:
        case MessageStart(_, message, text):
            return bool(text) or message.kind == "tool_call"
        case MessageDelta(text):
            return bool(text)
        case MessageEnd():
            return False


class BlankLines:
    """Positions of blank lines in one text made of several messages: before the first piece of each
    message except the first."""

    def __init__(self) -> None:
        self._begun = False
        self._due = False

    def before(self, event: MessageStart | MessageDelta) -> str:
        """Return what precedes the event's text."""
        if isinstance(event, MessageStart):
            self._due = self._begun
        if not event.text or (self._begun and not self._due):
            return ""
        due, self._due, self._begun = self._due, False, True
        return BLANK_LINE if due else ""

    def next_is_due(self, event: MessageEvent | None) -> bool:
        """Return whether a blank line precedes the next piece, which comes with `event` if that is
        not None."""
        return self._begun if isinstance(event, MessageStart) else self._due
