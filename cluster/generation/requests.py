"""Client requests, independent of transport. Their ranges are checked by
`cluster.generation.limits`."""

from dataclasses import dataclass, field
from typing import Literal

from cluster.chat_options import HarmonyConstraint, ReasoningEffort
from cluster.harmony.message import Message
from cluster.harmony.render import ResponseFormat
from cluster.harmony.tools import ToolDefinition
from workers.grammars.grammar import Grammar
from workers.request import SamplingParams


@dataclass(frozen=True, slots=True)
class FieldNames:
    """The client API's names for the fields that have several."""

    max_tokens: str = "max_tokens"
    logprobs: str = "logprobs"
    max_reasoning_tokens: str = "max_reasoning_tokens"
    continues: str = "continue_final_message"
    prompt_logprobs: str = "prompt_logprobs"
    messages: str = "messages"
    stop: str = "stop"


@dataclass(frozen=True, slots=True)
class Truncation:
    """A cut of prompts that are too long.

    Attributes:
        num_tokens: number of tokens that are kept; -1: what the context leaves beside `max_tokens`.
        keeps_end: keep the last tokens; else the first.
    """

    num_tokens: int
    keeps_end: bool = True


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a request besides its prompt and the sampling.

    Attributes:
        truncation: None: a prompt that is too long is refused.
        cache_salt: KV blocks are shared only among requests with the same salt.
        priority: requests with lower values are served earlier.
        bad_words: texts that the model must not write, each by itself or after a blank.
    """

    truncation: Truncation | None = None
    cache_salt: str | None = None
    bad_words: tuple[str, ...] = ()
    priority: int = 0


StructureKind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True)
class Structure:
    """The form that the text of an answer must have.

    Attributes:
        kind: what the client sent, for metrics.
        param: the field that asks for it, as the client's API names it.
        shown: what the model is told of it; None: nothing.
    """

    kind: StructureKind
    grammar: Grammar
    param: str
    shown: ResponseFormat | None = None


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which of the declared tools may be called, and how often.

    Attributes:
        required: the turn ends in a call.
        names: the only tools that may be called; None: all.
        param: the field that restricts them, as the client's API names it.
        max_calls: maximum number of calls in a turn.
    """

    required: bool = False
    names: frozenset[str] | None = None
    param: str = "tool_choice"
    max_calls: int = 1


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat.

    Attributes:
        num_bytes: size of the client's message, a measure of the work of rendering it.
        sampling: `max_tokens` None: up to the end of the context; `seed` may be any integer of 64
            bits, signed or not; `top_p` may be 0, which is greedy.
        stop: strings that end the text for the user; reasoning and tool calls are not searched.
        tools: those that the model sees; empty if the client forbids calls.
        parallel_tool_calls: without a constraint: if False a choice ends after its first call.
        structure: the form of the text of the final message; None: any.
        skips_reasoning: the final message begins at once if there are no tools.
        max_reasoning_tokens: number of tokens after which reasoning is ended; None: no limit but
            the share of the answer.
        reasoning_effort, model_identity, current_date, harmony_constraint: None: the deployment's
            value.
        model: None: the served model.
        continues_last: the answer continues the last message, an assistant's text or reasoning.
        leaves_out_turns: if the prompt is too long, its oldest turns are left out.
        cuts_max_tokens: a `max_tokens` that the context cannot hold is cut down instead of refused.
        merges_instructions: developer messages that follow others become part of the first one;
            else they stay in their places, so that prefixes stay cached.
        per_token: the events of the answer are a function of its tokens alone, not of how many of
            them come at once.
    """

    messages: tuple[Message, ...]
    num_bytes: int = field(kw_only=True)
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=None))
    tools: tuple[ToolDefinition, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    stop: tuple[str, ...] = ()
    parallel_tool_calls: bool = True
    structure: Structure | None = None
    skips_reasoning: bool = False
    max_reasoning_tokens: int | None = None
    reasoning_effort: ReasoningEffort | None = None
    model_identity: str | None = None
    current_date: str | None = None
    harmony_constraint: HarmonyConstraint | None = None
    model: str | None = None
    continues_last: bool = False
    leaves_out_turns: bool = False
    cuts_max_tokens: bool = False
    merges_instructions: bool = True
    per_token: bool = False
    names: FieldNames = field(default_factory=FieldNames)
    options: Options = field(default_factory=Options)


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """Prompts to continue as they are, without a chat's format.

    Attributes:
        prompts: each a text, in which the names of special tokens mean these tokens, or token ids.
            Choice `i * n + j` is the j-th of prompt i.
        sampling: as in ChatRequest; `max_tokens` None: 16 or what the context leaves, as in
            OpenAI's API.
        stop: strings that end the text.
        structure: the form of the text; None: any.
        echo: whether the text begins with the prompt.
        prompt_only: leave out the tokens that are generated after it.
        skip_special_tokens: leave the names of special tokens out of the text.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=None))
    stop: tuple[str, ...] = ()
    structure: Structure | None = None
    echo: bool = False
    prompt_only: bool = False
    skip_special_tokens: bool = True
    model: str | None = None
    names: FieldNames = field(default_factory=FieldNames)
    options: Options = field(default_factory=Options)

    def place(self, index: int) -> str:
        """Return the client API's name for one of the prompts."""
        return f"prompt[{index}]" if len(self.prompts) > 1 else "prompt"
