"""Reading of a generated message's header: channel, recipient and content type, whatever shape the
model gave it."""

import difflib
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from cluster.harmony.message import CHANNELS, FUNCTIONS, Channel, Message

Repair = Literal[
    "no_markup",  # text without any markup: a final answer
    "missing_start",  # a message without <|start|>
    "missing_role",  # <|start|> without a role: the assistant's
    "repeated_role",  # assistant, twice
    "missing_channel",  # a message without recipient and channel: final
    "missing_message",  # a header that ran into its body without <|message|>
    "missing_end",  # a new header inside a body
    "empty_message",  # a header that ended without a body
    "foreign_role",  # the model opened a message of another role: the turn is over
    "after_turn",  # tokens after the end of the turn
    # a control token where it means nothing, a reserved token, an id without a token: dropped
    "stray_token",
    "unknown_header_text",  # a header with words that mean nothing: dropped
    "unknown_channel",  # read as the nearest known channel, else commentary
    "channel_without_token",  # a channel's name without <|channel|>
    "repeated_channel",  # the first one counts
    "repeated_recipient",  # the first one counts
    "recipient_without_to",
    "recipient_without_namespace",
    "recipient_not_a_tool",  # to=user, to=assistant, or nothing after to=: not a call
    "recipient_cut",  # something was glued to the name, or it was too long
    "unknown_tool",  # a call of a tool that was not declared: kept
    "constrain_without_recipient",  # <|constrain|> on a message that is neither a call nor final
    "call_without_recipient",  # <|call|> after a message without recipient
    "call_not_closed",  # a call that ended with another token than <|call|>
    "end_of_text",  # <|endoftext|> instead of <|return|>
]
"""Kinds of departures from the format, and how each is repaired."""

MAX_NAME_BYTES = 128
"""Maximum bytes of a function's name, without its namespace; MCP's limit for the names of tools."""
MAX_TYPE_BYTES = 32
MAX_HEADER_TOKENS = 200
"""Maximum number of tokens in a header. Longer text is not a header: the part that a header does
not explain is shown as the body. The longest header with which a message can be written again has
fewer bytes."""

Place = Literal["role", "channel", "constrain"]
"""The control token that precedes header text; `role` is `<|start|>`."""

_ROLE = "assistant"
_CHANNEL = re.compile(r"\s*((?:(?!to=)[^\s<{\[(\"])*)")
_RECIPIENT = re.compile(r"\s*to=(?:[ ](?=functions\.))?([^\s<|>]*)(?:[<|>]\S*)?")
_BARE_RECIPIENT = re.compile(r"\s*(functions\.[^\s<|>]+)")
_CONTENT_TYPE = re.compile(r"\s*(json|code|text)\b", re.IGNORECASE)
_ANY_WORD = re.compile(r"\s*([\w./+-]+)")
_PEOPLE = frozenset({"", "assistant", "user", "all", "system", "developer", *CHANNELS})


@dataclass(frozen=True, slots=True)
class Segment:
    """Header text after one control token (or after the role)."""

    kind: Place
    text: str


class HeaderReader:
    """The reader of one message's header.

    Attributes:
        place: the control token that precedes the text to come.
        started: whether `<|start|>` precedes the header.
        foreign: the header names another role than the assistant's; the rest of it does not count.
        num_tokens: tokens of text so far.
    """

    def __init__(
        self,
        tools: Collection[str] | None,
        repairs: Counter[Repair],
        place: Place = "role",
        *,
        started: bool = True,
        text: str = "",
    ) -> None:
        """
        Args:
            tools: names of the declared functions; None: not known, every name is taken.
            repairs: counter of departures from the format, which is updated.
            text: header text that is already known.
        """
        self.place = place
        self.started = started
        self.foreign = False
        self.num_tokens = 0
        self._tools = tools
        self._repairs = repairs
        self._text = text
        self._segments: list[Segment] = []

    @property
    def opens_result(self) -> bool:
        """Whether the header so far is the beginning of a function's result."""
        return self.place == "role" and self.started and self._text == FUNCTIONS[:-1]

    def add(self, text: str) -> None:
        """Take the text of the next token."""
        self._text += text
        self.num_tokens += 1

    def close_segment(self, text: str = "", place: Place | None = None) -> None:
        """End the text after the last control token; sets `foreign` if it names another role.

        Args:
            text: its last characters.
            place: the control token that follows; None: the header ends here.
        """
        text, self._text = self._text + text, ""
        if self.place == "role":
            behind_role = self._behind_role(text)
            if behind_role is None:
                self.foreign = True
                return
            text = behind_role
        self._segments.append(Segment(self.place, text))
        if place is not None:
            self.place = place

    def read(self) -> tuple[Message, str]:
        """Return the message without its content, and the header text that is none of channel,
        recipient and type. The last segment must have been closed."""
        return read_header(self._segments, self._tools, self._repairs)

    def text_without_markup(self) -> str | None:
        """Return the text if it can no longer become the beginning of a header, without the role
        that began the turn; None while it can."""
        if self.place != "role" or _may_be_role(self._text, self.started):
            return None
        return self._text.lstrip().removeprefix(_ROLE) if self.started else self._text

    def count_unmarked(self, num_messages: int) -> None:
        """Count that the text is not a header after all; a role that was never begun already counts
        as missing_start.

        Args:
            num_messages: messages of the turn before this one.
        """
        if self.place != "role":
            self._repairs["missing_message"] += 1
        elif self.started:
            self._repairs["no_markup" if num_messages == 0 else "missing_message"] += 1

    def _behind_role(self, text: str) -> str | None:
        stripped = text.lstrip()
        if stripped.startswith(_ROLE):
            rest = stripped.removeprefix(_ROLE)
            if rest.lstrip().startswith(_ROLE):
                self._repairs["repeated_role"] += 1
                rest = rest.lstrip().removeprefix(_ROLE)
            return rest
        if self.started:
            if stripped and not stripped.startswith((*CHANNELS, "to=")):
                self._repairs["foreign_role"] += 1
                return None
            self._repairs["missing_role"] += 1
        return stripped


def read_header(
    segments: Sequence[Segment], tools: Collection[str] | None, repairs: Counter[Repair]
) -> tuple[Message, str]:
    """Read the header text that follows the role.

    Args:
        tools: names of the declared functions; None: not known, every name is taken.
        repairs: counter of departures from the format, which is updated.
    Returns:
        The message, still without content and end, and the text that is none of these: the
        content's beginning where `<|message|>` was forgotten.
    """
    channels: list[str] = []
    recipients: list[str] = []
    content_type: str | None = None
    leftovers: list[str] = []
    for segment in segments:
        position = 0
        channel_in_role = segment.kind == "role" and segment.text.strip().startswith(CHANNELS)
        if channel_in_role:
            repairs["channel_without_token"] += 1
        if channel_in_role or segment.kind == "channel":
            match = _CHANNEL.match(segment.text)
            assert match is not None  # every part of the pattern may be empty
            position = match.end()
            channels += [match.group(1)] if match.group(1) else []
        while position < len(segment.text):
            if match := _RECIPIENT.match(segment.text, position):
                recipients.append(match.group(1))
                if match.end() != match.end(1):
                    repairs["recipient_cut"] += 1
            elif match := _BARE_RECIPIENT.match(segment.text, position):
                recipients.append(match.group(1))
                repairs["recipient_without_to"] += 1
            elif match := (
                _ANY_WORD if segment.kind == "constrain" and content_type is None else _CONTENT_TYPE
            ).match(segment.text, position):
                content_type = content_type or match.group(1)
            else:
                leftovers.append(segment.text[position:].lstrip())
                break
            position = match.end()
    if len(channels) > 1:
        repairs["repeated_channel"] += 1
    if len(recipients) > 1:
        repairs["repeated_recipient"] += 1
    channel = _known_channel(channels[0], repairs) if channels else None
    if not recipients and channel != "final" and any(segment.kind == "constrain" for segment in segments):
        repairs["constrain_without_recipient"] += 1
    message = Message(
        "assistant",
        recipient=_repaired_recipient(recipients[0], tools, repairs) if recipients else None,
        channel=channel,
        content_type=None if content_type is None else _cut(content_type, MAX_TYPE_BYTES),
    )
    return message, "".join(leftovers)


def _known_channel(word: str, repairs: Counter[Repair]) -> Channel:
    if word in CHANNELS:
        return word
    repairs["unknown_channel"] += 1
    lowered = word.lower()
    for channel in CHANNELS:
        if lowered.startswith(channel):
            return channel
    nearest = difflib.get_close_matches(lowered[:32], CHANNELS, n=1)
    return cast(Channel, nearest[0]) if nearest else "commentary"


def _repaired_recipient(written: str, tools: Collection[str] | None, repairs: Counter[Repair]) -> str | None:
    """Return the recipient as written, or the declared function that it means; None if
    it names a role or a channel."""
    name = written.removeprefix(FUNCTIONS)
    if tools is not None and name not in tools and written in tools:
        name = written  # a declared name that itself begins with `functions.`
    bare = name == written
    if name in _PEOPLE and (bare or not name):
        repairs["recipient_not_a_tool"] += 1
        return None
    if bare:
        repairs["recipient_without_namespace"] += 1
    if (cut := _cut(name, MAX_NAME_BYTES)) != name:
        repairs["recipient_cut"] += 1
        name = cut
    if tools is not None and name not in tools:
        glued = (channel for channel in CHANNELS if name.endswith(channel))
        meant = next((short for c in glued if (short := name.removesuffix(c)) in tools), None)
        if meant is None:
            repairs["unknown_tool"] += 1
            return name if bare else FUNCTIONS + name
        repairs["recipient_cut"] += 1
        name = meant
    return name if bare and tools is None else FUNCTIONS + name


def _cut(text: str, max_bytes: int) -> str:
    """Return the longest beginning of `text` that has at most `max_bytes` bytes."""
    if len(text) * 4 <= max_bytes:
        return text
    return text.encode()[:max_bytes].decode("utf-8", "ignore")


def _may_be_role(text: str, started: bool) -> bool:
    """Return whether more text, or a control token, could still make `text` the part of a header
    before `<|channel|>` or `<|message|>`.

    Args:
        started: whether `<|start|>` precedes it.
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
