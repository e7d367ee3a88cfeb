"""What a client asked for, independent of transport, and the checks that both transports share.

Fields are named in errors as the HTTP API spells them; where that API has two spellings the front
end says which one was used.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cluster.generation.json_schema import SchemaCheck
from cluster.generation.settings import ModelInfo
from cluster.harmony.conversation import ChatMessage, ReasoningEffort, ToolDefinition
from workers.errors import ContextLengthExceeded, InvalidRequest
from workers.request import SamplingParams
from workers.rpc.validate import MAX_LOGPROBS, check_sampling

MAX_CHOICES = 128
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_TOOLS = 1024
MAX_TEMPERATURE = 2.0
REPETITION_PENALTY_RANGE = (0.01, 100.0)
GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy (vLLM's `_SAMPLING_EPS`): dividing logits by them
overflows."""

_SEED_BITS = 64


@dataclass(frozen=True, slots=True)
class FieldNames:
    """How this client spells the fields that have several names."""

    max_tokens: str = "max_tokens"
    logprobs: str = "logprobs"


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat.

    Attributes:
        sampling: `max_tokens` None: up to the end of the context; `seed` may be any integer of 64
            bits, signed or not.
        stop: strings that end the text for the user; reasoning and tool calls are not searched.
        tools: none if the client forbids calls.
        parallel_tool_calls: if False a choice ends with its first call.
        reasoning_effort, model_identity, current_date: None: the deployment's.
        model: None: the one that is served.
    """

    messages: tuple[ChatMessage, ...]
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=None))
    tools: tuple[ToolDefinition, ...] = ()
    stop: tuple[str, ...] = ()
    parallel_tool_calls: bool = True
    reasoning_effort: ReasoningEffort | None = None
    model_identity: str | None = None
    current_date: str | None = None
    model: str | None = None
    names: FieldNames = field(default_factory=FieldNames)


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """Prompts to continue as they are, without a chat's format.

    Attributes:
        prompts: each a text, in which the names of special tokens mean these tokens, or token ids.
            Choice `i * n + j` is the j-th of prompt i.
        sampling: as in ChatRequest; `max_tokens` None: 16 or what the context leaves, as OpenAI.
        stop: strings that end the text.
        echo: the text begins with the prompt.
        skip_special_tokens: leave the names of special tokens out of the text.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=None))
    stop: tuple[str, ...] = ()
    echo: bool = False
    skip_special_tokens: bool = True
    model: str | None = None
    names: FieldNames = field(default_factory=FieldNames)


def check_num_messages(count: int, limit: int) -> None:
    """Refuse a chat before its messages are looked at one by one. The code is that of a prompt that
    is too long, which clients shorten.

    Args:
        count: messages, with the parts and calls in them.
    Raises:
        ContextLengthExceeded: more than `limit`.
    """
    if count > limit:
        raise ContextLengthExceeded(
            f"messages has {count} entries, with the parts and calls in them; this server takes {limit} "
            f"(gateway.max_messages). "
            "Please reduce the number of messages.",
            "messages",
        )


def check_chat(request: ChatRequest) -> None:
    """Refuse tools and settings that no prompt can be made of; messages and names are the
    renderer's check.

    Raises:
        InvalidRequest: with `param`.
    """
    if len(request.tools) > MAX_TOOLS:
        raise InvalidRequest(
            f"tools has {len(request.tools)} entries, at most {MAX_TOOLS} are allowed.", "tools"
        )
    schemas = SchemaCheck()
    for index, tool in enumerate(request.tools):
        problem = None if tool.parameters is None else schemas.problem(tool.parameters)
        if problem:
            raise InvalidRequest(
                f"tools[{index}].function.parameters {problem}.", f"tools[{index}].function.parameters"
            )
    if request.current_date is not None:
        try:
            datetime.date.fromisoformat(request.current_date)
        except ValueError:
            raise InvalidRequest(
                "current_date must be a date written YYYY-MM-DD.", "chat_template_kwargs.current_date"
            ) from None


def check_generation(
    sampling: SamplingParams,
    stop: Sequence[str],
    model: ModelInfo,
    names: FieldNames,
    *,
    num_prompts: int = 1,
) -> None:
    """Refuse sampling parameters and stop strings outside their ranges.

    Raises:
        InvalidRequest: with `param`.
    """
    if sampling.max_tokens is not None and sampling.max_tokens < 1:
        raise InvalidRequest(
            f"{names.max_tokens} must be at least 1, got {sampling.max_tokens}.", names.max_tokens
        )
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= MAX_LOGPROBS:
        raise InvalidRequest(
            f"{names.logprobs} must be 0 to {MAX_LOGPROBS}, got {sampling.logprobs}.", names.logprobs
        )
    if num_prompts > MAX_CHOICES:
        raise InvalidRequest(
            f"prompt has {num_prompts} entries, at most {MAX_CHOICES} are allowed; send several requests.",
            "prompt",
        )
    if not 1 <= sampling.n * num_prompts <= MAX_CHOICES:
        each = "n" if num_prompts == 1 else f"n times the {num_prompts} prompts"
        raise InvalidRequest(f"{each} must be 1 to {MAX_CHOICES}, got {sampling.n * num_prompts}.", "n")
    if sampling.temperature > MAX_TEMPERATURE:
        raise InvalidRequest(
            f"temperature must be 0 to {MAX_TEMPERATURE:g}, got {sampling.temperature:g}.", "temperature"
        )
    low, high = REPETITION_PENALTY_RANGE
    if not low <= sampling.repetition_penalty <= high:
        raise InvalidRequest(
            f"repetition_penalty must be {low:g} to {high:g}, got {sampling.repetition_penalty:g}.",
            "repetition_penalty",
        )
    if sampling.seed is not None and not -(2 ** (_SEED_BITS - 1)) <= sampling.seed < 2**_SEED_BITS:
        raise InvalidRequest(f"seed must fit in {_SEED_BITS} bits, got {sampling.seed}.", "seed")
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens {sampling.min_tokens} is more than {names.max_tokens} {sampling.max_tokens}.",
            "min_tokens",
        )
    check_sampling(replace(sampling, max_tokens=None, logprobs=None, seed=None), model.vocab_size)
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop has {len(stop)} strings, at most {MAX_STOP_STRINGS} are allowed.", "stop")
    for index, text in enumerate(stop):
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"stop[{index}] must be 1 to {MAX_STOP_CHARS} characters, got {len(text)}.", f"stop[{index}]"
            )


def check_token_ids(ids: Sequence[int], model: ModelInfo, param: str) -> None:
    """Refuse ids that the model does not have.

    Raises:
        InvalidRequest: with `param`.
    """
    if ids and not (min(ids) >= 0 and max(ids) < model.vocab_size):
        wrong = next(token_id for token_id in ids if not 0 <= token_id < model.vocab_size)
        raise InvalidRequest(
            f"{param} has token id {wrong}; this model's ids are 0 to {model.vocab_size - 1}.", param
        )
