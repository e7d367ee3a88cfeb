"""A chat as the client sent it, before it is rendered: plain data that both front ends fill and
`cluster.harmony.render` reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "developer", "user", "assistant", "tool"]
ReasoningEffort = Literal["low", "medium", "high"]

DEFAULT_MODEL_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
DEFAULT_KNOWLEDGE_CUTOFF = "2024-06"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant made earlier in the chat.

    Attributes:
        id: the client's handle; a tool message names it in `tool_call_id`.
        name: of the function, without the `functions.` namespace.
        arguments: JSON text as the model wrote it; rendered unchanged, may be empty.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of the chat.

    Attributes:
        role: `system` and `developer` mean the same: both become instructions of the harmony
            developer message.
        content: the text; multi-part text content arrives here joined. Text of special tokens in it
            stays text.
        reasoning: assistant only: what it thought before this message.
        tool_calls: assistant only: the calls it made after `content`.
        tool_call_id: tool only, and required there: which call this answers.
        name: user only: who speaks; ignored on other roles.
    """

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A function that the model may call.

    Attributes:
        parameters: JSON schema of the arguments' object; None: the function takes none.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Everything that the prompt is made of.

    Attributes:
        current_date: `YYYY-MM-DD`, shown to the model; None: no date line. Never read from a clock
            here: a new day changes every prefix.
    """

    messages: tuple[ChatMessage, ...]
    tools: tuple[ToolDefinition, ...] = ()
    reasoning_effort: ReasoningEffort = "medium"
    current_date: str | None = None
    knowledge_cutoff: str = DEFAULT_KNOWLEDGE_CUTOFF
    model_identity: str = DEFAULT_MODEL_IDENTITY
