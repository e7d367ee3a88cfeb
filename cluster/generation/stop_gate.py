"""Search for stop strings in the text of a turn's messages."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from cluster.harmony.message import BlankLines, Message, MessageDelta, MessageEnd, MessageEvent, MessageStart
from cluster.harmony.stop import StopStrings


class StopGate:
    """A gate that holds back the events of text messages as long as their text may become a stop
    string. All of the text is searched, blank lines between messages included.

    Attributes:
        matched: the stop string that was found.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.matched: str | None = None
        self._strings = StopStrings(stop)
        self._blank_lines = BlankLines()
        # Each with the characters of the blank line in front of its text.
        self._held: deque[tuple[MessageEvent, int]] = deque()
        # The message that is open for those who see what was let through.
        self._open: Message | None = None
        self._shown: list[str] = []

    def push(self, event: MessageEvent) -> list[MessageEvent]:
        """Return the events that may be shown now; at a stop string, all text before it."""
        if isinstance(event, MessageEnd):
            return self.follow(event)
        blank_line = self._blank_lines.before(event)
        result = self._strings.push(blank_line + event.text)
        self.matched = result.matched
        if not self._held and len(result.text) == len(blank_line) + len(event.text):
            if isinstance(event, MessageDelta):
                self._shown.append(event.text)
            else:
                self._note(event)
            return [event]
        self._held.append((event, len(blank_line)))
        released = self._release(len(result.text))
        return released if self.matched is None else released + self._cut_off()

    def follow(self, event: MessageEvent) -> list[MessageEvent]:
        """Return the events that may be shown now, given that an event without text follows the
        held ones."""
        self._held.append((event, 0))
        return self._release(0)

    def flush(self) -> list[MessageEvent]:
        """Return the held events, before an event other than text is shown."""
        return self._release(len(self._strings.flush()))

    def _release(self, num_chars: int) -> list[MessageEvent]:
        released: list[MessageEvent] = []
        while self._held:
            event, num_blank = self._held.popleft()
            if not isinstance(event, MessageEnd) and num_blank + len(event.text) > num_chars:
                num_shown = num_chars - num_blank
                if num_shown <= 0:
                    self._held.appendleft((event, -num_shown))
                    break
                self._held.appendleft((MessageDelta(event.text[num_shown:]), 0))
                event = replace(event, text=event.text[:num_shown])
            if not isinstance(event, MessageEnd):
                num_chars -= num_blank + len(event.text)
            self._note(event)
            released.append(event)
        return released

    def _note(self, event: MessageEvent) -> None:
        match event:
            case MessageStart(_, message, text):
                self._open, self._shown = message, [text]
            case MessageDelta(text):
                self._shown.append(text)
            case MessageEnd():
                self._open = None

    def _cut_off(self) -> list[MessageEvent]:
        """Drop the held events, and end the message that a stop string cut off."""
        self._held.clear()
        if self._open is None:
            return []
        return [MessageEnd(replace(self._open, content="".join(self._shown)))]
