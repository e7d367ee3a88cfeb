"""One example of a conversation and its answer, as prompt and completion in tokens."""

from dataclasses import dataclass

from cluster.chat_options import ReasoningEffort
from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.message import FUNCTIONS, Message
from cluster.harmony.render import Conversation, render

Skill = str
EFFORTS: tuple[ReasoningEffort, ...] = ("low", "medium", "high")


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation and the turn that follows it.

    Attributes:
        answer: the messages of the turn: an analysis or none, then the final answer or a call.
    """

    skill: Skill
    conversation: Conversation
    answer: tuple[Message, ...]

    def prompt_ids(self, encoding: HarmonyEncoding) -> list[int]:
        """Return the prompt as the gateway renders it."""
        return render(self.conversation, encoding)

    def completion_ids(self, encoding: HarmonyEncoding) -> list[int]:
        """Return the turn, from the token after the prompt's `<|start|>assistant` to its end."""
        return encoding.encode_with_special(turn_text(self.answer))


def turn_text(answer: tuple[Message, ...]) -> str:
    """Return a turn with the names of special tokens, without the first `<|start|>assistant`."""
    parts = []
    for message in answer:
        to = "" if message.recipient is None else f" to={message.recipient}"
        kind = "" if message.content_type is None else f" <|constrain|>{message.content_type}"
        end = {"end": "<|end|>", "call": "<|call|>", "return": "<|return|>"}[message.end or "end"]
        parts.append(f"<|channel|>{message.channel}{to}{kind}<|message|>{message.content}{end}")
    return "<|start|>assistant".join(parts)


def answer(analysis: str, text: str) -> tuple[Message, ...]:
    """Return a turn that ends with an answer; an empty analysis is left out."""
    return (*_thought(analysis), Message("assistant", text, channel="final", end="return"))


def call(analysis: str, tool: str, arguments: str) -> tuple[Message, ...]:
    """Return a turn that ends with a call of a function."""
    message = Message(
        "assistant",
        arguments,
        recipient=f"{FUNCTIONS}{tool}",
        channel="commentary",
        content_type="json",
        end="call",
    )
    return (*_thought(analysis), message)


def _thought(analysis: str) -> tuple[Message, ...]:
    return (Message("assistant", analysis, channel="analysis", end="end"),) if analysis else ()
