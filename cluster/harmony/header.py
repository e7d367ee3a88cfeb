"""Reads the header of a generated message: channel, recipient and content type, whatever shape the
model gave it."""

import difflib
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, cast

Channel = Literal["analysis", "commentary", "final"]
CHANNELS: tuple[Channel, ...] = ("analysis", "commentary", "final")

Repair = Literal[
    "no_markup",  # text without any markup: a final answer
    "missing_start",  # a message without <|start|>
    "missing_role",  # <|start|> without a role: the assistant's
    "repeated_role",  # assistant, twice
    "missing_channel",  # a message to nobody in no channel: final
    "missing_message",  # a header that ran into its body without <|message|>
    "missing_end",  # a new header inside a body
    "empty_message",  # a header that ended without a body
    "foreign_role",  # the model spoke for somebody else: the turn is over
    "after_turn",  # tokens behind the end of the turn
    # a control token where it means nothing, a reserved token, an id without a token: dropped
    "stray_token",
    "unknown_header_text",  # a header with words that mean nothing: dropped
    "unknown_channel",  # read as the nearest known channel, else commentary
    "channel_without_token",  # a channel's name without <|channel|>
    "repeated_channel",  # the first one counts
    "repeated_recipient",  # the first one counts
    "recipient_without_to",
    "recipient_without_namespace",
    "recipient_not_a_tool",  # to=user, to=assistant, or nothing behind to=: not a call
    "recipient_cut",  # something was glued to the name, or it was too long
    "unknown_tool",  # a call of a tool that was not declared: kept
    "constrain_without_recipient",  # <|constrain|> on a message that is neither a call nor final
    "call_without_recipient",  # <|call|> behind a message to nobody
    "call_not_closed",  # a call that ended with another token than <|call|>
    "end_of_text",  # <|endoftext|> instead of <|return|>
]
"""How the output departed from the format, and what was made of it."""

MAX_NAME_CHARS = 128

_CHANNEL = re.compile(r"\s*((?:(?!to=)[^\s<{\[(\"])*)")
_RECIPIENT = re.compile(r"\s*to=(?:[ ](?=functions\.))?([^\s<|>]*)(?:[<|>]\S*)?")
_BARE_RECIPIENT = re.compile(r"\s*(functions\.[^\s<|>]+)")
_CONTENT_TYPE = re.compile(r"\s*(json|code|text)\b", re.IGNORECASE)
_ANY_WORD = re.compile(r"\s*([\w./+-]+)")
_PEOPLE = frozenset({"", "assistant", "user", "all", "system", "developer", *CHANNELS})


@dataclass(frozen=True, slots=True)
class Segment:
    """Header text behind one control token (or behind the role)."""

    kind: Literal["role", "channel", "constrain"]
    text: str


@dataclass(frozen=True, slots=True)
class MessageHeader:
    """What a generated message is.

    Attributes:
        channel: None where the header names none.
        recipient: as written behind `to=`; None: the message is for nobody in particular.
        content_type: such as `json`; nothing depends on it.
        tool: name of the called function, without namespace; None: the message is no call.
        leftover: header text that is none of these; the body's beginning where `<|message|>` was
            forgotten.
    """

    channel: Channel | None = None
    recipient: str | None = None
    content_type: str | None = None
    tool: str | None = None
    leftover: str = ""

    @property
    def kind(self) -> Literal["reasoning", "text", "tool_call"]:
        """The recipient, not the channel, makes a message a call."""
        if self.tool is not None:
            return "tool_call"
        return "reasoning" if self.channel == "analysis" else "text"


def read_header(
    segments: Sequence[Segment], tools: Collection[str] | None, repairs: Counter[Repair]
) -> MessageHeader:
    """Reads the header text behind the role.

    Args:
        tools: names of the declared functions; None: not known, every name is taken.
        repairs: departures from the format are counted here.
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
    recipient = recipients[0] if recipients else None
    channel = _known_channel(channels[0], repairs) if channels else None
    if recipient is None and channel != "final" and any(segment.kind == "constrain" for segment in segments):
        repairs["constrain_without_recipient"] += 1
    return MessageHeader(
        channel=channel,
        recipient=recipient,
        content_type=content_type,
        tool=None if recipient is None else _tool_name(recipient, tools, repairs),
        leftover="".join(leftovers),
    )


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


def _tool_name(recipient: str, tools: Collection[str] | None, repairs: Counter[Repair]) -> str | None:
    name = recipient.removeprefix("functions.")
    if name in _PEOPLE and (name == recipient or not name):
        repairs["recipient_not_a_tool"] += 1
        return None
    if name == recipient:
        repairs["recipient_without_namespace"] += 1
    if len(name) > MAX_NAME_CHARS:
        repairs["recipient_cut"] += 1
        name = name[:MAX_NAME_CHARS]
    if tools is None or name in tools:
        return name
    for channel in CHANNELS:
        if name.endswith(channel) and name.removesuffix(channel) in tools:
            repairs["recipient_cut"] += 1
            return name.removesuffix(channel)
    repairs["unknown_tool"] += 1
    return name
