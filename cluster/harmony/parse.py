"""Generated harmony tokens as reasoning, text and tool calls, token by token. Total: any ids in any
order give a turn."""

from collections import Counter
from collections.abc import Collection
from enum import Enum, auto
from typing import Literal

from cluster.events import Delta, ReasoningDelta, TextDelta, ToolCallDelta
from cluster.harmony.encoding import HarmonyEncoding, IncrementalDecoder
from cluster.harmony.header import CHANNELS, MessageHeader, Repair, Segment, read_header

Part = Literal["reasoning", "text", "tool_call", "markup"]

MAX_HEADER_TOKENS = 128
"""A longer header is no header: what it does not explain is shown as the body. The longest name
takes MAX_NAME_CHARS tokens at most."""

_ROLE = "assistant"


class _State(Enum):
    ROLE = auto()  # behind <|start|>, or behind <|start|>assistant: role and recipient
    CHANNEL = auto()  # behind <|channel|>: channel name, recipient, content type
    CONSTRAIN = auto()  # behind <|constrain|>: content type
    BODY = auto()  # behind <|message|>
    BETWEEN = auto()  # behind the end of a message
    OVER = auto()  # somebody else's message: everything further is dropped


class HarmonyParser:
    """Parses one turn; the first token is the one behind the prompt's `<|start|>assistant`.

    The state is a function of the tokens, so a turn can be resumed by pushing its tokens again.
    Well-formed turns give what openai_harmony's StreamableParser gives; where the two differ on a
    malformed one is listed at `cluster.harmony.header.Repair`. Header text is never shown, also
    when the turn is cut off inside it.

    Attributes:
        part: what the last pushed token belonged to. `markup` are control tokens, header text,
            dropped tokens, and also the first tokens of a turn without markup as long as they could
            be a header.
        has_tool_calls: whether the turn holds a call.
        num_reasoning_tokens: tokens in the bodies of analysis messages.
        num_messages: messages opened so far; a delta belongs to the last one.
        header: of the message whose body is being read; None outside.
        turn_over: the turn has ended: `<|return|>`, `<|call|>`, `<|endoftext|>`, or the model
            opened somebody else's message.
        repairs: how often the output departed from the format, by kind.
    """

    def __init__(self, encoding: HarmonyEncoding, tools: Collection[str] | None = None) -> None:
        """
        Args:
            tools: names of the declared functions, to tell unknown ones; None: not known.
        """
        self.part: Part = "markup"
        self.has_tool_calls = False
        self.num_reasoning_tokens = 0
        self.num_messages = 0
        self.header: MessageHeader | None = None
        self.turn_over = False
        self.repairs: Counter[Repair] = Counter()
        self._encoding = encoding
        self._tools = None if tools is None else frozenset(tools)
        self._decoder = IncrementalDecoder(encoding)
        self._state = _State.ROLE
        self._segments: list[Segment] = []
        self._text = _ROLE
        self._started = True
        self._num_header_tokens = 0
        self._num_calls = 0
        self._finished = False

    def push(self, token_id: int) -> list[Delta]:
        """Takes the next token; the deltas that it completes. Never raises, whatever the id."""
        self.part = "markup"
        if self._finished or self._state is _State.OVER:
            return []
        encoding = self._encoding
        if token_id == encoding.start:
            return self._on_start()
        if token_id in (encoding.channel, encoding.constrain):
            return self._on_header_token(_State.CHANNEL if token_id == encoding.channel else _State.CONSTRAIN)
        if token_id == encoding.message:
            return self._on_message()
        if token_id == encoding.end or token_id in encoding.stop_token_ids:
            return self._on_end(token_id)
        if not encoding.token_bytes(token_id):
            self.repairs["stray_token"] += 1
            return []
        return self._on_body_text(token_id) if self._state is _State.BODY else self._on_header_text(token_id)

    def finish(self) -> list[Delta]:
        """The last deltas, when no token will come any more: of an unfinished character. An
        unfinished header is dropped."""
        if self._finished:
            return []
        self._finished = True
        return self._show(self._decoder.flush()) if self._state is _State.BODY else []

    # Tokens, by kind

    def _on_start(self) -> list[Delta]:
        deltas = self._leave()
        if self._state is not _State.OVER:
            self._open_header(_State.ROLE, started=True)
        return deltas

    def _on_header_token(self, state: _State) -> list[Delta]:
        if self._state is _State.BODY and state is _State.CONSTRAIN:
            self.repairs["stray_token"] += 1
            return []
        deltas: list[Delta] = []
        if self._state in (_State.BODY, _State.BETWEEN):
            started = self._state is _State.BODY  # there the missing end is what is wrong
            deltas = self._leave()
            self._open_header(state, started=started)
        elif self._end_header_segment():
            self._state = state
        return deltas

    def _on_message(self) -> list[Delta]:
        if self._state is _State.BODY:
            self.repairs["stray_token"] += 1
            return []
        if self._state is _State.BETWEEN:
            self._open_header(_State.ROLE, started=False)
        if not self._end_header_segment():
            return []
        header = read_header(self._segments, self._tools, self.repairs)
        if header.channel is None and header.tool is None:
            self.repairs["missing_channel"] += 1
        if header.leftover:
            self.repairs["unknown_header_text"] += 1
        return self._open_body(header)

    def _on_end(self, token_id: int) -> list[Delta]:
        encoding = self._encoding
        if self._state is _State.BETWEEN:
            self.repairs["stray_token"] += 1
            deltas: list[Delta] = []
        else:
            in_header = self._state is not _State.BODY
            deltas = (
                self._leave(called=token_id == encoding.call) if in_header else self._close_body(token_id)
            )
        if token_id == encoding.endoftext:
            self.repairs["end_of_text"] += 1
        if token_id != encoding.end:
            self.turn_over = True
        return deltas

    def _on_body_text(self, token_id: int) -> list[Delta]:
        assert self.header is not None
        self.part = self.header.kind
        if self.part == "reasoning":
            self.num_reasoning_tokens += 1
        return self._show(self._decoder.push(token_id))

    def _on_header_text(self, token_id: int) -> list[Delta]:
        if self._state is _State.BETWEEN:
            self._open_header(_State.ROLE, started=False)
        self._text += self._decoder.push(token_id)
        self._num_header_tokens += 1
        if self._state is _State.ROLE and not _may_be_role(self._text, self._started):
            self._count_unmarked()
            text = self._text.lstrip().removeprefix(_ROLE) if self._started else self._text
            return self._header_becomes_body(MessageHeader(leftover=text))
        if self._num_header_tokens > MAX_HEADER_TOKENS:
            return self._overlong_header()
        return []

    def _overlong_header(self) -> list[Delta]:
        if not self._end_segment():
            return []
        self._count_unmarked()
        return self._header_becomes_body(read_header(self._segments, self._tools, self.repairs))

    # Changes of state

    def _open_header(self, state: _State, *, started: bool) -> None:
        if not started:
            self.repairs["missing_start"] += 1
        self._state = state
        self._segments = []
        self._text = ""
        self._started = started
        self._num_header_tokens = 0
        self.header = None

    def _end_segment(self) -> bool:
        """Keeps the header text behind the last control token. False: it names another role, and
        the turn is over.

        An unfinished character stays in the decoder: for the body, where the header turns out to be
        one.
        """
        text, self._text = self._text, ""
        match self._state:
            case _State.ROLE:
                behind_role = self._behind_role(text)
                if behind_role is None:
                    return False
                self._segments.append(Segment("role", behind_role))
            case _State.CHANNEL:
                self._segments.append(Segment("channel", text))
            case _State.CONSTRAIN:
                self._segments.append(Segment("constrain", text))
        return True

    def _end_header_segment(self) -> bool:
        """As `_end_segment`, at a control token: an unfinished character in front of it will not be
        finished."""
        self._text += self._decoder.flush()
        return self._end_segment()

    def _behind_role(self, text: str) -> str | None:
        stripped = text.lstrip()
        if stripped.startswith(_ROLE):
            rest = stripped.removeprefix(_ROLE)
            if rest.lstrip().startswith(_ROLE):
                self.repairs["repeated_role"] += 1
                rest = rest.lstrip().removeprefix(_ROLE)
            return rest
        if self._started:
            if stripped and not stripped.startswith((*CHANNELS, "to=")):
                self._end_turn_for_other_role()
                return None
            self.repairs["missing_role"] += 1
        return stripped

    def _end_turn_for_other_role(self) -> None:
        self.repairs["foreign_role"] += 1
        self.turn_over = True
        self.header = None
        self._state = _State.OVER

    def _open_body(self, header: MessageHeader) -> list[Delta]:
        if self.turn_over:
            self.repairs["after_turn"] += 1
        self._state = _State.BODY
        self.header = header
        self.num_messages += 1
        if header.tool is None:
            return []
        self.has_tool_calls = True
        self._num_calls += 1
        return [ToolCallDelta(self._num_calls - 1, name=header.tool)]

    def _show(self, text: str) -> list[Delta]:
        assert self.header is not None
        if not text:
            return []
        match self.header.kind:
            case "reasoning":
                return [ReasoningDelta(text)]
            case "text":
                return [TextDelta(text)]
            case "tool_call":
                return [ToolCallDelta(self._num_calls - 1, arguments=text)]

    def _close_body(self, token_id: int) -> list[Delta]:
        assert self.header is not None
        deltas = self._show(self._decoder.flush())
        if self.header.tool is None and token_id == self._encoding.call:
            self.repairs["call_without_recipient"] += 1
        if self.header.tool is not None and token_id != self._encoding.call:
            self.repairs["call_not_closed"] += 1
        self.header = None
        self._state = _State.BETWEEN
        return deltas

    def _leave(self, *, called: bool = False) -> list[Delta]:
        """Ends whatever is being read, for a token that begins or ends a message out of turn. Text
        that is no header is not lost."""
        if self._state is _State.BODY:
            self.repairs["missing_end"] += 1
            deltas = self._show(self._decoder.flush())
        elif self._state is _State.BETWEEN:
            return []
        else:
            deltas = self._close_header(called)
        if self._state is not _State.OVER:
            self.header = None
            self._state = _State.BETWEEN
        return deltas

    def _close_header(self, called: bool) -> list[Delta]:
        """A header that ended without `<|message|>`: what it does not explain is the body; a
        recipient and `<|call|>` are a call."""
        if not self._end_header_segment():
            return []
        header = read_header(self._segments, self._tools, self.repairs)
        if not header.leftover and not (header.tool is not None and called):
            self.repairs["empty_message"] += 1
            return []
        self._count_unmarked()
        return self._open_body(header) + self._show(header.leftover)

    def _header_becomes_body(self, header: MessageHeader) -> list[Delta]:
        """Opens a message whose `<|message|>` is missing; what the header does not explain begins
        its body."""
        deltas = self._open_body(header)
        self.part = header.kind
        if self.part == "reasoning":
            self.num_reasoning_tokens += 1
        return deltas + self._show(header.leftover)

    def _count_unmarked(self) -> None:
        """Counts that what is being read turned out to be no header; a role that never was begun
        counts as missing_start already."""
        if self._state is not _State.ROLE:
            self.repairs["missing_message"] += 1
        elif self._started:
            self.repairs["no_markup" if self.num_messages == 0 else "missing_message"] += 1


def _may_be_role(text: str, started: bool) -> bool:
    """Whether more text, or a control token, could still make `text` the part of a header in front
    of `<|channel|>` or `<|message|>`.

    Args:
        started: whether `<|start|>` stands in front.
    """
    rest = text.lstrip()
    if rest.startswith(_ROLE):
        rest = rest.removeprefix(_ROLE)
    elif started or _ROLE.startswith(rest):
        return True
    rest = rest.lstrip()
    if _ROLE.startswith(rest):
        return True
    rest = rest.removeprefix(_ROLE).lstrip()
    for channel in CHANNELS:
        if channel.startswith(rest):
            return True
        if rest.startswith(channel):
            rest = rest.removeprefix(channel).lstrip()
            break
    return rest.startswith("to=") or "to=".startswith(rest)
