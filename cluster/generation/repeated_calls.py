"""Search for calls of a turn that repeat earlier ones."""

from cluster.harmony.message import Message, MessageDelta, MessageEnd, MessageEvent, MessageStart


class RepeatedCalls:
    """A gate that holds back the events of a call as long as it may become an earlier call of the
    turn again: the same tool with the same text.

    Attributes:
        found: a call is complete and repeats an earlier one; none of its events was let through.
    """

    def __init__(self) -> None:
        self.found = False
        self._earlier: set[tuple[str | None, str]] = set()
        # The texts of earlier calls of the tool that is being called which begin like this one.
        self._alike: list[str] = []
        self._recipient: str | None = None
        self._content = ""
        self._held: list[MessageEvent] = []

    def push(self, event: MessageEvent) -> list[MessageEvent]:
        """Take an event of a call; return the events that may be shown now."""
        match event:
            case MessageStart(_, message, text):
                self._recipient, self._content = message.recipient, ""
                self._alike = [content for tool, content in self._earlier if tool == self._recipient]
                self._narrow(text)
            case MessageDelta(text):
                self._narrow(text)
            case MessageEnd(message):
                return self._end(event, message)
        self._held.append(event)
        return [] if self._alike else self._release()

    def _narrow(self, text: str) -> None:
        if self._alike:
            self._content += text
            self._alike = [earlier for earlier in self._alike if earlier.startswith(self._content)]

    def _end(self, event: MessageEnd, message: Message) -> list[MessageEvent]:
        call = (message.recipient, message.content)
        if call in self._earlier and message.end is not None:
            self._held.clear()
            self.found = True
            return []
        self._earlier.add(call)
        self._held.append(event)
        return self._release()

    def _release(self) -> list[MessageEvent]:
        released, self._held = self._held, []
        return released
