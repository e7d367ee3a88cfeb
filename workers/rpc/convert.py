"""Conversion between the messages of engine.proto and the dataclasses that the rest of the code
uses. No other module handles both.

Incoming messages are checked here (`validate.py` has the ranges); outgoing ones are trusted.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from workers import errors
from workers.constraint.automaton import NO_LIMITS, ConstraintLimits
from workers.constraint.codec import Constraint, automaton_id, decode
from workers.constraint.registry import KnownAutomata
from workers.request import (
    EngineLoad,
    EngineOutput,
    EngineRequest,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
)
from workers.rpc import engine_pb2 as pb
from workers.rpc.validate import check_automaton, check_request

ERROR_CLASS_KEY = "error-class"
PARAM_KEY = "param"
RETRY_AFTER_KEY = "retry-after-s"
"""Names in the trailing metadata of a failed call: the class in `workers.errors`, its `param`, its
`retry_after_s`."""
TAKEN_METADATA = (("cantata-taken", "1"),)
"""Initial metadata of Generate, sent once the engine has taken the request, before its first
token."""

ADAPTER, CACHE_SALT, PROMPT_LOGPROBS = "adapter", "cache_salt", "prompt_logprobs"
ALLOWED_TOKEN_IDS, BAD_WORDS = "allowed_token_ids", "bad_words"
CONSTRAINT_REF, PRIORITY = "constraint_ref", "priority"
CONSTRAINT_GRAMMARS, CONSTRAINT_LIMITS = "constraint_grammars", "constraint_limits"
IGNORED_STOP_TOKEN_IDS = "ignored_stop_token_ids"
CAPABILITIES = (
    CONSTRAINT_REF,
    CACHE_SALT,
    PROMPT_LOGPROBS,
    ALLOWED_TOKEN_IDS,
    BAD_WORDS,
    PRIORITY,
    CONSTRAINT_GRAMMARS,
    CONSTRAINT_LIMITS,
    IGNORED_STOP_TOKEN_IDS,
)
"""Names of the request fields beyond the first version, as this engine lists them in EngineInfo. A
gateway sends only fields that an engine lists. No engine has adapters yet."""

OF_CONSTRAINTS = frozenset((CONSTRAINT_GRAMMARS, CONSTRAINT_LIMITS, IGNORED_STOP_TOKEN_IDS))
"""Those that only a request with a constraint needs."""

_MAX_PARAM_CHARS = 500
_NOT_METADATA = re.compile(r"[^ -~]")
"""Pattern of characters that gRPC refuses to send in a text entry."""

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""Maximum bytes of one gRPC message, both ways. A prompt of 131,072 tokens packs into at most 0.4
MB; the rest is room for constraints and metrics."""

_FINISH_TO_WIRE: dict[FinishReason | None, pb.FinishReason.ValueType] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
    "error": pb.FINISH_REASON_ERROR,
}
_FINISH_FROM_WIRE = {wire: reason for reason, wire in _FINISH_TO_WIRE.items()}


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The properties of an engine, constant for its life. Replicas of one model agree in
    `model_fingerprint`.

    Attributes:
        start_id: drawn at random at the engine's start; tells it from an earlier engine at the same
            address.
        capabilities: names in CAPABILITIES that the engine supports; an older engine lists none.
    """

    version: str
    model_name: str
    model_fingerprint: str
    max_model_len: int
    vocab_size: int
    block_size: int
    device: str
    dtype: str
    kv_capacity_tokens: int
    num_ranks: int
    start_id: str
    capabilities: tuple[str, ...] = ()


def capabilities_of(request: EngineRequest) -> frozenset[str]:
    """Return the names in CAPABILITIES that an engine must list to serve this request.
    Two are never among them: without CONSTRAINT_REF an engine receives the whole automaton, without
    PRIORITY it serves the request in its turn."""
    wanted = {
        ADAPTER: request.adapter is not None,
        CACHE_SALT: request.cache_salt is not None,
        PROMPT_LOGPROBS: request.sampling.prompt_logprobs is not None,
        ALLOWED_TOKEN_IDS: bool(request.sampling.allowed_token_ids),
        BAD_WORDS: bool(request.sampling.bad_words_token_ids),
        CONSTRAINT_GRAMMARS: request.constraint is not None and request.constraint.extended,
        CONSTRAINT_LIMITS: request.constraint_limits != NO_LIMITS,
        IGNORED_STOP_TOKEN_IDS: bool(request.ignored_stop_token_ids),
    }
    return frozenset(name for name, is_wanted in wanted.items() if is_wanted)


def without_constraint(request: EngineRequest) -> EngineRequest:
    """Return the request without its constraint and what belongs to that."""
    return replace(request, constraint=None, constraint_limits=NO_LIMITS, ignored_stop_token_ids=())


def request_to_wire(
    request: EngineRequest,
    *,
    by_reference: bool = False,
    with_body: bool = True,
    with_priority: bool = True,
) -> pb.GenerateRequest:
    """Return the request's message. The deadline is not part of it: it belongs to the call.

    Args:
        by_reference: identify the automaton by its id (CONSTRAINT_REF).
        with_body: send the automaton along with its id.
        with_priority: send the priority (PRIORITY).
    """
    message = pb.GenerateRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        sampling=_sampling_to_wire(request.sampling),
        adapter=request.adapter,
        cache_salt=request.cache_salt,
        priority=request.priority if with_priority and request.priority else None,
        ignored_stop_token_ids=request.ignored_stop_token_ids,
    )
    limits = request.constraint_limits
    if limits != NO_LIMITS:
        message.constraint_limits.CopyFrom(
            pb.ConstraintLimits(max_counted_tokens=limits.max_counted_tokens, max_length=limits.max_length)
        )
    constraint = request.constraint
    if constraint is not None and by_reference:
        message.constraint_ref.id = constraint.id
        if with_body:
            message.constraint_ref.automaton = constraint.body
    elif constraint is not None:
        message.constraint.ParseFromString(constraint.body)
    return message


def request_from_wire(
    message: pb.GenerateRequest,
    *,
    vocab_size: int,
    deadline_s: float | None = None,
    automata: KnownAutomata | None = None,
) -> EngineRequest:
    """Check a message and convert it.

    Args:
        automata: those known to the engine; new ones are added.
    Raises:
        InvalidRequest: a field is missing or outside its range; `param` names it.
        UnknownAutomaton: the request contains only an id of an automaton, which is not known.
    """
    request = EngineRequest(
        request_id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=_sampling_from_wire(message.sampling),
        output_token_ids=tuple(message.output_token_ids),
        deadline_s=deadline_s,
        constraint=_constraint_from_wire(message, vocab_size, automata),
        adapter=message.adapter if message.HasField("adapter") else None,
        cache_salt=message.cache_salt if message.HasField("cache_salt") else None,
        priority=message.priority if message.HasField("priority") else 0,
        constraint_limits=_limits_from_wire(message.constraint_limits),
        ignored_stop_token_ids=tuple(message.ignored_stop_token_ids),
    )
    check_request(request, vocab_size)
    return request


def _constraint_from_wire(
    message: pb.GenerateRequest, vocab_size: int, automata: KnownAutomata | None
) -> Constraint | None:
    if message.HasField("constraint_ref"):
        ref = message.constraint_ref
        known = None if automata is None else automata.get(ref.id)
        if known is not None:
            return known
        if not ref.HasField("automaton"):
            raise errors.UnknownAutomaton("the engine does not know this automaton; send it with its id")
        if automaton_id(ref.automaton) != ref.id:
            raise errors.InvalidRequest(
                "constraint_ref.id must be the hash of constraint_ref.automaton", "constraint_ref.id"
            )
        constraint = Constraint(ref.id, ref.automaton)
    elif message.HasField("constraint"):
        body = message.constraint.SerializeToString(deterministic=True)
        constraint = Constraint(automaton_id(body), body)
    else:
        return None
    try:
        check_automaton(decode(constraint.body), vocab_size)
    except ValueError as error:
        raise errors.InvalidRequest(f"constraint: {error}", "constraint") from error
    if automata is not None:
        automata.add(constraint)
    return constraint


def _limits_from_wire(message: pb.ConstraintLimits) -> ConstraintLimits:
    return ConstraintLimits(
        message.max_counted_tokens if message.HasField("max_counted_tokens") else None,
        message.max_length if message.HasField("max_length") else None,
    )


def output_to_wire(output: EngineOutput) -> pb.GenerateResponse:
    """Return an engine's output as the next message of a stream."""
    return pb.GenerateResponse(
        token_ids=output.token_ids,
        logprobs=_logprobs_to_wire(output.logprobs),
        prompt_logprobs=_logprobs_to_wire(output.prompt_logprobs),
        finish_reason=_FINISH_TO_WIRE[output.finish_reason],
        stop_token_id=output.stop_token_id,
        num_cached_tokens=output.num_cached_tokens,
        error=output.error or "",
    )


def output_from_wire(message: pb.GenerateResponse) -> EngineOutput:
    """Return the output of a message. Log-probabilities come back as float32; a finish reason that
    only a newer engine knows becomes `error`."""
    known = message.finish_reason in _FINISH_FROM_WIRE
    return EngineOutput(
        token_ids=tuple(message.token_ids),
        logprobs=_logprobs_from_wire(message.logprobs),
        prompt_logprobs=_logprobs_from_wire(message.prompt_logprobs),
        finish_reason=_FINISH_FROM_WIRE[message.finish_reason] if known else "error",
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        num_cached_tokens=message.num_cached_tokens,
        error=message.error
        or (None if known else f"the engine ended with the unknown finish reason {message.finish_reason}"),
    )


def _logprobs_to_wire(entries: Iterable[TokenLogprobs]) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(
            logprob=entry.logprob,
            top=[
                pb.TokenLogprobs.Candidate(token_id=token_id, logprob=logprob)
                for token_id, logprob in entry.top
            ],
        )
        for entry in entries
    ]


def _logprobs_from_wire(entries: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(
            entry.logprob, tuple((candidate.token_id, candidate.logprob) for candidate in entry.top)
        )
        for entry in entries
    )


def info_to_wire(info: EngineInfo) -> pb.EngineInfo:
    """Return an engine's properties as a message."""
    return pb.EngineInfo(
        version=info.version,
        model_name=info.model_name,
        model_fingerprint=info.model_fingerprint,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        block_size=info.block_size,
        device=info.device,
        dtype=info.dtype,
        kv_capacity_tokens=info.kv_capacity_tokens,
        num_ranks=info.num_ranks,
        start_id=info.start_id,
        capabilities=info.capabilities,
    )


def info_from_wire(message: pb.EngineInfo) -> EngineInfo:
    """Return the engine's properties from a message."""
    return EngineInfo(
        version=message.version,
        model_name=message.model_name,
        model_fingerprint=message.model_fingerprint,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        block_size=message.block_size,
        device=message.device,
        dtype=message.dtype,
        kv_capacity_tokens=message.kv_capacity_tokens,
        num_ranks=message.num_ranks,
        start_id=message.start_id,
        capabilities=tuple(message.capabilities),
    )


def load_to_wire(load: EngineLoad) -> pb.EngineLoad:
    """Return an engine's load as a message."""
    return pb.EngineLoad(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        kv_usage=load.kv_usage,
        accepting=load.accepting,
    )


def load_from_wire(message: pb.EngineLoad) -> EngineLoad:
    """Return the engine's load from a message."""
    return EngineLoad(message.num_running, message.num_waiting, message.kv_usage, message.accepting)


def error_to_metadata(error: errors.CantataError) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata from which the caller rebuilds the error. The call's status is
    `error.status`, its details are `error.message`."""
    metadata = [(ERROR_CLASS_KEY, type(error).__name__)]
    if error.param:
        metadata.append((PARAM_KEY, _NOT_METADATA.sub("?", error.param[:_MAX_PARAM_CHARS])))
    if error.retry_after_s is not None:
        metadata.append((RETRY_AFTER_KEY, f"{error.retry_after_s:g}"))
    return tuple(metadata)


def error_from_status(status: str, message: str, metadata: Mapping[str, str]) -> errors.CantataError:
    """Return the error of a failed call.

    Args:
        status: name of the gRPC status code.
        metadata: the call's trailing metadata; empty if there was none (proxies may drop it).
    """
    error_class = _CLASS_BY_NAME.get(
        metadata.get(ERROR_CLASS_KEY, ""), _CLASS_BY_STATUS.get(status, errors.CantataError)
    )
    if issubclass(error_class, errors.InvalidRequest):
        return error_class(message, metadata.get(PARAM_KEY))
    if issubclass(error_class, errors.Overloaded):
        return error_class(message, _seconds(metadata.get(RETRY_AFTER_KEY)))
    return error_class(message)


_CLASS_BY_NAME: dict[str, type[errors.CantataError]] = {
    error_class.__name__: error_class
    for error_class in (
        errors.InvalidRequest,
        errors.UnknownAutomaton,
        errors.ContextLengthExceeded,
        errors.ModelNotFound,
        errors.Overloaded,
        errors.ConstraintNotReady,
        errors.DeadlineExceeded,
        errors.Cancelled,
        errors.EngineDead,
        errors.NoReplica,
    )
}
_CLASS_BY_STATUS: dict[str, type[errors.CantataError]] = {
    error_class.status: error_class
    for error_class in (
        errors.InvalidRequest,
        errors.ModelNotFound,
        errors.Overloaded,
        errors.DeadlineExceeded,
        errors.Cancelled,
        errors.EngineDead,
    )
}


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text)) if text else 1.0
    except ValueError:
        return 1.0


def _sampling_to_wire(sampling: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        stop_token_ids=sampling.stop_token_ids,
        min_tokens=sampling.min_tokens,
        ignore_eos=sampling.ignore_eos,
        prompt_logprobs=sampling.prompt_logprobs,
        allowed_token_ids=sampling.allowed_token_ids,
        bad_words=[pb.SamplingParams.Word(token_ids=word) for word in sampling.bad_words_token_ids],
    )


def _sampling_from_wire(message: pb.SamplingParams) -> SamplingParams:
    # An absent field becomes the dataclass's default, except max_tokens, which then extends to the
    # end of the context.
    default = SamplingParams()
    return SamplingParams(
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        temperature=message.temperature if message.HasField("temperature") else default.temperature,
        top_p=message.top_p if message.HasField("top_p") else default.top_p,
        top_k=message.top_k if message.HasField("top_k") else default.top_k,
        min_p=message.min_p if message.HasField("min_p") else default.min_p,
        presence_penalty=message.presence_penalty
        if message.HasField("presence_penalty")
        else default.presence_penalty,
        frequency_penalty=message.frequency_penalty
        if message.HasField("frequency_penalty")
        else default.frequency_penalty,
        repetition_penalty=message.repetition_penalty
        if message.HasField("repetition_penalty")
        else default.repetition_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        seed=message.seed if message.HasField("seed") else None,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        stop_token_ids=tuple(message.stop_token_ids),
        min_tokens=message.min_tokens if message.HasField("min_tokens") else default.min_tokens,
        ignore_eos=message.ignore_eos if message.HasField("ignore_eos") else default.ignore_eos,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        allowed_token_ids=tuple(message.allowed_token_ids),
        bad_words_token_ids=tuple(tuple(word.token_ids) for word in message.bad_words),
    )
