"""Validation of requests to an engine, by the ranges in `SamplingParams`' docstring. Each refusal
names the field in OpenAI's spelling."""

import math
from collections.abc import Sequence

from workers.constraint.automaton import MAX_AUTOMATON_STATES, TokenAutomaton
from workers.errors import InvalidRequest, ModelNotFound
from workers.request import EngineRequest, SamplingParams

MAX_LOGPROBS = 20
"""Maximum number of alternatives per token; OpenAI's and vLLM's limit."""
MAX_LOGIT_BIAS = 100.0
"""Maximum absolute value of a bias; OpenAI's limit."""
MAX_STOP_TOKEN_IDS = 136
"""Maximum number of stop token ids: a client's 128 and the model's own."""
MAX_BAD_WORDS = 128
MAX_BAD_WORD_TOKENS = 2048
MAX_SALT_CHARS = 256
MAX_GRAMMARS = 512
"""Maximum number of an automaton's grammars: one for each tool's arguments, and the answer's."""
MAX_GRAMMAR_CHARS = 4 * 2**20
"""Maximum number of characters of an automaton's grammars together."""
MAX_SEED = 2**64 - 1
MAX_COUNT = 2**31 - 1
MAX_PRIORITY = 2**63 - 1


def check_request(request: EngineRequest, vocab_size: int) -> None:
    """Refuse a request that no engine with this vocabulary can run. The scheduler checks lengths
    against the context.

    Raises:
        InvalidRequest: `param` names the field.
    """
    if not request.request_id:
        raise InvalidRequest("request_id must not be empty", "request_id")
    if not request.prompt_token_ids:
        raise InvalidRequest("the prompt must have at least one token", "prompt")
    check_ids(request.prompt_token_ids, "prompt", vocab_size)
    check_ids(request.output_token_ids, "output_token_ids", vocab_size)
    check_sampling(request.sampling, vocab_size)
    if request.sampling.n != 1:
        raise InvalidRequest(
            f"n must be 1 for one engine request, got {request.sampling.n}; send a request for each choice",
            "n",
        )
    if request.sampling.structured_outputs is not None:
        raise InvalidRequest(
            "structured_outputs is for LLM; an engine's request has a constraint", "structured_outputs"
        )
    if request.deadline_s is not None and not request.deadline_s > 0:
        raise InvalidRequest(f"deadline_s must be above 0, got {request.deadline_s}", "deadline_s")
    if request.adapter is not None:
        raise ModelNotFound(f"the engine has no adapter {request.adapter!r}")
    if request.cache_salt is not None and not 0 < len(request.cache_salt) <= MAX_SALT_CHARS:
        raise InvalidRequest(
            f"cache_salt must have 1 to {MAX_SALT_CHARS} characters, got {len(request.cache_salt)}",
            "cache_salt",
        )
    check_integer("priority", request.priority, -MAX_PRIORITY - 1, MAX_PRIORITY)
    check_ids(request.ignored_stop_token_ids, "ignored_stop_token_ids", vocab_size)
    if len(request.ignored_stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"ignored_stop_token_ids has {len(request.ignored_stop_token_ids)} ids, at most "
            f"{MAX_STOP_TOKEN_IDS} are allowed",
            "ignored_stop_token_ids",
        )
    limits = request.constraint_limits
    for name in ("max_counted_tokens", "max_length"):
        if (value := getattr(limits, name)) is not None:
            check_integer(f"constraint_limits.{name}", value, 0, MAX_COUNT)


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Refuse sampling parameters outside their ranges.

    Raises:
        InvalidRequest: `param` names the field.
    """
    if sampling.max_tokens is not None:
        check_integer("max_tokens", sampling.max_tokens, 1, MAX_COUNT)
    check_number("temperature", sampling.temperature, 0.0, math.inf)
    check_number("top_p", sampling.top_p, 0.0, 1.0, low_open=True)
    check_integer("top_k", sampling.top_k, -1, MAX_COUNT)
    check_number("min_p", sampling.min_p, 0.0, 1.0)
    check_number("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    check_number("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    check_number("repetition_penalty", sampling.repetition_penalty, 0.0, math.inf, low_open=True)
    check_ids([token_id for token_id, _ in sampling.logit_bias], "logit_bias", vocab_size)
    for _, bias in sampling.logit_bias:
        check_number("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    if sampling.seed is not None:
        check_integer("seed", sampling.seed, 0, MAX_SEED)
    if sampling.logprobs is not None:
        check_integer("logprobs", sampling.logprobs, 0, MAX_LOGPROBS)
    if sampling.prompt_logprobs is not None:
        check_integer("prompt_logprobs", sampling.prompt_logprobs, 0, MAX_LOGPROBS)
    if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"stop_token_ids has {len(sampling.stop_token_ids)} ids, at most {MAX_STOP_TOKEN_IDS} are "
            f"allowed",
            "stop_token_ids",
        )
    check_ids(sampling.stop_token_ids, "stop_token_ids", vocab_size)
    check_ids(sampling.allowed_token_ids, "allowed_token_ids", vocab_size)
    if len(sampling.allowed_token_ids) > vocab_size:
        raise InvalidRequest(
            f"allowed_token_ids has {len(sampling.allowed_token_ids)} ids, at most {vocab_size} are allowed",
            "allowed_token_ids",
        )
    _check_bad_words(sampling.bad_words_token_ids, vocab_size)
    check_integer("min_tokens", sampling.min_tokens, 0, MAX_COUNT)
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens {sampling.min_tokens} is more than max_tokens {sampling.max_tokens}", "min_tokens"
        )


def _check_bad_words(words: Sequence[Sequence[int]], vocab_size: int) -> None:
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequest(
            f"bad_words has {len(words)} entries, at most {MAX_BAD_WORDS} are allowed", "bad_words"
        )
    for index, word in enumerate(words):
        param = f"bad_words[{index}]"
        if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
            raise InvalidRequest(
                f"{param} must have 1 to {MAX_BAD_WORD_TOKENS} tokens, got {len(word)}", param
            )
        check_ids(word, param, vocab_size)


def check_integer(param: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(f"{param} must be a whole number, got {value!r}", param)
    if not low <= value <= high:
        wanted = f"at least {low}" if value < low else f"at most {high}"
        raise InvalidRequest(f"{param} must be {wanted}, got {value}", param)


def check_number(param: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise InvalidRequest(f"{param} must be a finite number, got {value!r}", param)
    if value < low or value > high or (low_open and value == low):
        lower = f"above {low:g}" if low_open else f"at least {low:g}"
        wanted = lower if high == math.inf else f"{lower} and at most {high:g}"
        raise InvalidRequest(f"{param} must be {wanted}, got {value:g}", param)


def check_ids(token_ids: Sequence[int], param: str, vocab_size: int) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(
            f"{param} has token id {wrong}; this model's ids are 0 to {vocab_size - 1}", param
        )


def check_automaton(automaton: TokenAutomaton, vocab_size: int) -> None:
    """Refuse an automaton that no sequence over this vocabulary can follow. Indices and empty
    states were checked when it was built.

    Raises:
        InvalidRequest: `param` names the field.
    """
    if len(automaton.states) > MAX_AUTOMATON_STATES:
        raise InvalidRequest(
            f"constraint has {len(automaton.states)} states, at most {MAX_AUTOMATON_STATES} are allowed",
            "constraint",
        )
    num_chars = sum(map(len, automaton.grammars))
    if len(automaton.grammars) > MAX_GRAMMARS or num_chars > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(
            f"constraint has {len(automaton.grammars)} grammars of {num_chars} characters, at most "
            f"{MAX_GRAMMARS} of {MAX_GRAMMAR_CHARS} together are allowed",
            "constraint.grammars",
        )
    for index, state in enumerate(automaton.states):
        place = f"constraint.states[{index}]"
        check_ids(state.allowed or (), f"{place}.allowed", vocab_size)
        check_ids(state.forbidden, f"{place}.forbidden", vocab_size)
        check_ids([token_id for token_id, _ in state.transitions], f"{place}.transitions", vocab_size)
        if (
            state.allowed is None
            and len(state.forbidden) >= vocab_size
            and len(set(state.forbidden)) == vocab_size
        ):
            raise InvalidRequest(f"{place} forbids every token", f"{place}.forbidden")
