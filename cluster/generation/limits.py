"""The limits of client requests: the one place where a gateway checks ranges, counts and lengths.

Types and structure are checked by the front ends, as are the order and names of messages. Engines
check again what could harm them (`workers.rpc.validate`); what passes here passes there. Errors
name fields as the HTTP API spells them.
"""

import datetime
import math
import re
from collections.abc import Mapping, Sequence

from cluster.generation.requests import FieldNames, Options, Truncation
from cluster.generation.settings import ModelInfo
from cluster.harmony.header import MAX_NAME_BYTES
from cluster.harmony.tools import ToolDefinition, schema_problem
from workers.errors import ContextLengthExceeded, InvalidRequest
from workers.request import SamplingParams
from workers.rpc.validate import (
    MAX_COUNT,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_SALT_CHARS,
    check_ids,
    check_integer,
    check_number,
)

MAX_CHOICES = 128
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_TOOLS = 1024
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARS = 256
MAX_PARALLEL_CALLS = 16
"""Maximum number of calls in a turn that a request can ask for."""
MAX_PROMPT_SCORES = 2**18
"""Maximum number of log-probabilities of prompt tokens in an answer, alternatives included; 32 MiB
in memory."""
MAX_CUT_CONTEXTS = 8
"""Maximum length of a prompt that is truncated, in contexts of the model."""
NUMBERS: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
    "logit_bias": (-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS),
}
INTEGERS: Mapping[str, tuple[int, int]] = {
    "top_k": (-1, MAX_COUNT),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "seed": (-(2**63), 2**64 - 1),
    "min_tokens": (0, MAX_COUNT),
    "n": (1, MAX_CHOICES),
    "priority": (-MAX_PRIORITY - 1, MAX_PRIORITY),
}
CHAT_INTEGERS: Mapping[str, tuple[int, int]] = {
    "max_reasoning_tokens": (0, MAX_COUNT),
    "max_parallel_tool_calls": (1, MAX_PARALLEL_CALLS),
}
"""Least and greatest values, both included; the OpenAPI document states them, too."""
FORMAT_NAME = r"[a-zA-Z0-9_-]{1,64}"
TOOL_NAME = rf"[a-zA-Z0-9_.-]{{1,{MAX_NAME_BYTES}}}"


def check_num_messages(count: int, limit: int, param: str = "messages") -> None:
    """Refuse a chat before its messages are looked at one by one. The error's code is that of a
    prompt that is too long, on which clients shorten the chat.

    Args:
        count: messages, with the parts and calls in them.
        param: the client API's name for the messages.
    Raises:
        ContextLengthExceeded: more than `limit`.
    """
    if count > limit:
        raise ContextLengthExceeded(
            f"{param} has {count} entries, with the parts and calls in them; this server takes {limit} "
            f"(gateway.max_messages). "
            "Please reduce the number of messages.",
            param,
        )


def check_tools(tools: Sequence[ToolDefinition]) -> None:
    """Refuse tools that cannot be shown to the model, or called by it.

    Raises:
        InvalidRequest: with `param`.
    """
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools has {len(tools)} entries, at most {MAX_TOOLS} are allowed.", "tools")
    names: set[str] = set()
    for index, tool in enumerate(tools):
        fields = tool.names(index)
        if not re.fullmatch(TOOL_NAME, tool.name):
            raise InvalidRequest(
                f"{fields.name} must have 1 to {MAX_NAME_BYTES} characters out of a-z, A-Z, 0-9, _, - and "
                f"dots.",
                fields.name,
            )
        if tool.name in names:
            raise InvalidRequest(
                f"{fields.name}: there is already a tool with the name {tool.name!r}.", fields.name
            )
        names.add(tool.name)
        check_parameters(tool, index)


def check_parameters(tool: ToolDefinition, index: int) -> None:
    """Refuse the tool at this place if the schema of its arguments cannot be shown.

    Raises:
        InvalidRequest: with `param`.
    """
    problem = None if tool.parameters is None else schema_problem(tool.parameters)
    if problem:
        param = tool.names(index).parameters
        raise InvalidRequest(f"{param} {problem}.", param)


def check_max_calls(max_calls: int | None, parallel: bool | None) -> None:
    """Refuse a maximum number of calls that is out of range or contradicts `parallel_tool_calls`.

    Raises:
        InvalidRequest: with `param`.
    """
    if max_calls is None:
        return
    check_integer("max_parallel_tool_calls", max_calls, *CHAT_INTEGERS["max_parallel_tool_calls"])
    if parallel is False and max_calls > 1:
        raise InvalidRequest(
            f"max_parallel_tool_calls {max_calls} contradicts parallel_tool_calls false; leave one of them "
            f"out.",
            "max_parallel_tool_calls",
        )


def check_reasoning_budget(tokens: int, param: str) -> None:
    """Refuse a maximum number of reasoning tokens that is out of range.

    Raises:
        InvalidRequest: with `param`.
    """
    check_integer(param, tokens, *CHAT_INTEGERS["max_reasoning_tokens"])


def check_format_name(name: str, param: str) -> None:
    """Refuse a name of a response format that could not be shown to the model.

    Raises:
        InvalidRequest: with `param`.
    """
    if not re.fullmatch(FORMAT_NAME, name):
        raise InvalidRequest(f"{param} must have 1 to 64 characters out of a-z, A-Z, 0-9, _ and -.", param)


def check_date(date: str | None) -> None:
    """Refuse a conversation's date that is not a date.

    Raises:
        InvalidRequest: with `param`.
    """
    if date is None:
        return
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        raise InvalidRequest(
            "current_date must be a date written YYYY-MM-DD.", "chat_template_kwargs.current_date"
        ) from None


def check_sampling(
    sampling: SamplingParams, model: ModelInfo, names: FieldNames, *, num_prompts: int = 1
) -> None:
    """Refuse sampling parameters outside their ranges. `max_tokens` is checked against the context
    by `num_output_tokens`.

    Raises:
        InvalidRequest: with `param`.
    """
    if sampling.max_tokens is not None and sampling.max_tokens < 1:
        raise InvalidRequest(
            f"{names.max_tokens} must be at least 1, got {sampling.max_tokens}.", names.max_tokens
        )
    if sampling.logprobs is not None:
        _check_span(names.logprobs, sampling.logprobs, *INTEGERS["logprobs"])
    if sampling.prompt_logprobs is not None:
        _check_span("prompt_logprobs", sampling.prompt_logprobs, *INTEGERS["prompt_logprobs"])
    _check_num_choices(sampling.n, num_prompts)
    if sampling.temperature > NUMBERS["temperature"][1]:
        _check_span("temperature", sampling.temperature, *NUMBERS["temperature"])
    _check_span("repetition_penalty", sampling.repetition_penalty, *NUMBERS["repetition_penalty"])
    if sampling.seed is not None and not INTEGERS["seed"][0] <= sampling.seed <= INTEGERS["seed"][1]:
        raise InvalidRequest(f"seed must fit in 64 bits, got {sampling.seed}.", "seed")
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens {sampling.min_tokens} is more than {names.max_tokens} {sampling.max_tokens}.",
            "min_tokens",
        )
    check_number("temperature", sampling.temperature, 0.0, math.inf)
    check_number("top_p", sampling.top_p, *NUMBERS["top_p"])
    check_integer("top_k", sampling.top_k, *INTEGERS["top_k"])
    check_number("min_p", sampling.min_p, *NUMBERS["min_p"])
    check_number("presence_penalty", sampling.presence_penalty, *NUMBERS["presence_penalty"])
    check_number("frequency_penalty", sampling.frequency_penalty, *NUMBERS["frequency_penalty"])
    check_ids([token_id for token_id, _ in sampling.logit_bias], "logit_bias", model.vocab_size)
    for _, bias in sampling.logit_bias:
        check_number("logit_bias", bias, *NUMBERS["logit_bias"])
    if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"stop_token_ids has {len(sampling.stop_token_ids)} ids, at most {MAX_STOP_TOKEN_IDS} are "
            f"allowed",
            "stop_token_ids",
        )
    check_ids(sampling.stop_token_ids, "stop_token_ids", model.vocab_size)
    check_integer("min_tokens", sampling.min_tokens, *INTEGERS["min_tokens"])
    check_ids(sampling.allowed_token_ids, "allowed_token_ids", model.vocab_size)


def check_options(options: Options) -> None:
    """Refuse options outside their ranges.

    Raises:
        InvalidRequest: with `param`.
    """
    cut = options.truncation
    if cut is not None and cut.num_tokens != -1:
        check_integer("truncate_prompt_tokens", cut.num_tokens, 1, MAX_COUNT)
    if options.cache_salt is not None and not 1 <= len(options.cache_salt) <= MAX_SALT_CHARS:
        raise InvalidRequest(
            f"cache_salt must have 1 to {MAX_SALT_CHARS} characters, got {len(options.cache_salt)}.",
            "cache_salt",
        )
    check_integer("priority", options.priority, *INTEGERS["priority"])
    if len(options.bad_words) > MAX_BAD_WORDS:
        raise InvalidRequest(
            f"bad_words has {len(options.bad_words)} entries, at most {MAX_BAD_WORDS} are allowed.",
            "bad_words",
        )
    for index, word in enumerate(options.bad_words):
        if not word.strip() or len(word) > MAX_BAD_WORD_CHARS:
            raise InvalidRequest(
                f"bad_words[{index}] must have 1 to {MAX_BAD_WORD_CHARS} characters, not only blanks.",
                f"bad_words[{index}]",
            )


def longest_prompt(cut: Truncation | None, model: ModelInfo) -> int:
    """Return the number of tokens beyond which a prompt is refused before all of it is encoded."""
    return model.max_model_len * (1 if cut is None else MAX_CUT_CONTEXTS)


def truncated(
    ids: Sequence[int], cut: Truncation | None, max_tokens: int | None, model: ModelInfo
) -> Sequence[int]:
    """Return the part of a prompt that is kept."""
    if cut is None:
        return ids
    num_kept = cut.num_tokens
    if num_kept == -1:
        num_kept = max(1, model.max_model_len - max(1, max_tokens or 1))
    if len(ids) <= num_kept:
        return ids
    return ids[-num_kept:] if cut.keeps_end else ids[:num_kept]


def check_stop(stop: Sequence[str], param: str = "stop") -> None:
    """Refuse stop strings that are too many, too long or empty.

    Raises:
        InvalidRequest: with `param`.
    """
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(
            f"{param} has {len(stop)} strings, at most {MAX_STOP_STRINGS} are allowed.", param
        )
    for index, text in enumerate(stop):
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"{param}[{index}] must be 1 to {MAX_STOP_CHARS} characters, got {len(text)}.",
                f"{param}[{index}]",
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


def check_prompt_chars(
    num_chars: int, max_token_bytes: int, model: ModelInfo, param: str, longest: int | None = None
) -> None:
    """Refuse a text that cannot fit into the context whatever its tokens are, before it is encoded.

    Args:
        max_token_bytes: bytes of the longest token.
        longest: maximum number of tokens; None: the context.
    Raises:
        ContextLengthExceeded: with `param`.
    """
    least = num_chars // max_token_bytes
    if least >= (longest or model.max_model_len):
        raise ContextLengthExceeded(
            f"This model's maximum context length is {model.max_model_len} tokens. However, your "
            f"{param} resulted in at least "
            f"{least} tokens. Please reduce the length of the {param}.",
            param,
        )


def check_prompt_tokens(num_tokens: int, model: ModelInfo, param: str) -> None:
    """Refuse a prompt that leaves no room for an answer in the context.

    Raises:
        ContextLengthExceeded: with `param`.
    """
    if num_tokens >= model.max_model_len:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {model.max_model_len} tokens. However, your "
            f"{param} resulted in "
            f"{num_tokens} tokens. Please reduce the length of the {param}.",
            param,
        )


def num_prompt_scores(
    sampling: SamplingParams, prompts: Sequence[Sequence[int]], names: FieldNames, *, num_copies: int = 1
) -> int:
    """Return the number of log-probabilities of prompt tokens in the answer to a request,
    alternatives included.

    Args:
        num_copies: how often the answer has those of each prompt.
    Raises:
        InvalidRequest: too many.
    """
    if sampling.prompt_logprobs is None:
        return 0
    number = sum(map(len, prompts)) * (1 + sampling.prompt_logprobs) * num_copies
    if number > MAX_PROMPT_SCORES:
        raise InvalidRequest(
            f"{names.prompt_logprobs} asks for {number} log-probabilities of prompt tokens and their "
            f"alternatives, at most {MAX_PROMPT_SCORES} are returned: send a shorter prompt, fewer prompts, "
            f"or ask for fewer alternatives{' or choices' if num_copies > 1 else ''}.",
            names.prompt_logprobs,
        )
    return number


def num_output_tokens(
    sampling: SamplingParams,
    num_prompt_tokens: int,
    model: ModelInfo,
    *,
    names: FieldNames,
    prompt_param: str,
    default: int | None,
    cuts: bool = False,
) -> int:
    """Return the number of tokens that may be generated: the number requested, which must fit into
    the context after the prompt.

    Args:
        default: used if the client gives none; None: what the context leaves.
        cuts: what does not fit is cut off instead.
    Raises:
        ContextLengthExceeded: prompt and `max_tokens` together exceed the context.
        InvalidRequest: `min_tokens` is more than that.
    """
    left = model.max_model_len - num_prompt_tokens
    if sampling.max_tokens is None:
        max_tokens = left if default is None else min(default, left)
        if sampling.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens {sampling.min_tokens} is more than the {max_tokens} tokens to be generated.",
                "min_tokens",
            )
        return max_tokens
    if cuts:
        return min(sampling.max_tokens, left)
    if sampling.max_tokens > left:
        num_tokens = num_prompt_tokens + sampling.max_tokens
        raise ContextLengthExceeded(
            f"This model's maximum context length is {model.max_model_len} tokens. However, you "
            f"requested {num_tokens} tokens ({num_prompt_tokens} in the {prompt_param}, "
            f"{sampling.max_tokens} in the completion). "
            f"Please reduce the length of the {prompt_param} or {names.max_tokens}.",
            names.max_tokens,
        )
    return sampling.max_tokens


def _check_num_choices(n: int, num_prompts: int) -> None:
    if num_prompts > MAX_CHOICES:
        raise InvalidRequest(
            f"prompt has {num_prompts} entries, at most {MAX_CHOICES} are allowed; send several requests.",
            "prompt",
        )
    if not 1 <= n * num_prompts <= MAX_CHOICES:
        each = "n" if num_prompts == 1 else f"n times the {num_prompts} prompts"
        raise InvalidRequest(f"{each} must be 1 to {MAX_CHOICES}, got {n * num_prompts}.", "n")


def _check_span(param: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        got = value if isinstance(value, int) else f"{value:g}"
        raise InvalidRequest(f"{param} must be {low:g} to {high:g}, got {got}.", param)
