"""Conversion of a body's sampling fields to the service's parameters."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from cluster.frontend.schema import SamplingFields
from cluster.generation import Options, Truncation
from workers.errors import InvalidRequest
from workers.request import SamplingParams

T = TypeVar("T")

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def sampling_params(body: SamplingFields, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """Return the service's parameters. Fields that are absent or null take their defaults; ranges
    are the service's check.

    Raises:
        InvalidRequest: a key of logit_bias is not a token id; no token is allowed.
    """
    default = SamplingParams()
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(body.temperature, default.temperature),
        top_p=_or(body.top_p, default.top_p),
        top_k=_or(body.top_k, default.top_k),
        min_p=_or(body.min_p, default.min_p),
        presence_penalty=_or(body.presence_penalty, default.presence_penalty),
        frequency_penalty=_or(body.frequency_penalty, default.frequency_penalty),
        repetition_penalty=_or(body.repetition_penalty, default.repetition_penalty),
        logit_bias=_logit_bias(body.logit_bias or {}),
        seed=body.seed,
        logprobs=logprobs,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        min_tokens=_or(body.min_tokens, default.min_tokens),
        ignore_eos=_or(body.ignore_eos, default.ignore_eos),
        n=_or(body.n, default.n),
        prompt_logprobs=body.prompt_logprobs,
        allowed_token_ids=_allowed(body.allowed_token_ids),
    )


def options(body: SamplingFields) -> Options:
    """Return the service's options of a request."""
    cut = body.truncate_prompt_tokens
    return Options(
        truncation=None if cut is None else Truncation(cut, keeps_end=body.truncation_side != "right"),
        cache_salt=body.cache_salt,
        bad_words=tuple(body.bad_words or ()),
        priority=_or(body.priority, 0),
    )


def stop_strings(body: SamplingFields) -> tuple[str, ...]:
    """Return the stop strings of a field that holds one string or several."""
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def check_stream_options(body: SamplingFields) -> None:
    """Refuse stream options in a request that does not stream, and what a stream does not have.

    Raises:
        InvalidRequest: with `param`.
    """
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream to be true.", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest("prompt_logprobs needs stream to be false.", "prompt_logprobs")


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _allowed(token_ids: Sequence[int] | None) -> tuple[int, ...]:
    if token_ids is not None and not token_ids:
        raise InvalidRequest("allowed_token_ids must have at least one token id.", "allowed_token_ids")
    return tuple(sorted(set(token_ids or ())))


def _logit_bias(biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    for key in biases:
        if not _TOKEN_ID.fullmatch(key):
            raise InvalidRequest(f"logit_bias has the key {key[:40]!r}, which is no token id.", "logit_bias")
    return tuple(sorted((int(key), bias) for key, bias in biases.items()))
