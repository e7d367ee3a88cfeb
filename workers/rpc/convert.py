"""Messages of engine.proto ⇄ the dataclasses that the rest of the code knows. The only place that
touches both.

What comes in is checked here (`validate.py` has the ranges); what goes out is trusted.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from workers import errors
from workers.constraint.automaton import AutomatonState, TokenAutomaton
from workers.request import (
    EngineLoad,
    EngineOutput,
    EngineRequest,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
)
from workers.rpc import engine_pb2 as pb
from workers.rpc.validate import check_request

ERROR_CLASS_KEY = "error-class"
PARAM_KEY = "param"
RETRY_AFTER_KEY = "retry-after-s"
"""Trailing metadata of a failed call: name of the class in `workers.errors`, its `param`, its
`retry_after_s`."""
TAKEN_METADATA = (("cantata-taken", "1"),)
"""Initial metadata of Generate, sent when the engine has taken the request, before its first
token."""

_MAX_PARAM_CHARS = 500
_NOT_METADATA = re.compile(r"[^ -~]")
"""What gRPC refuses to send as the value of a text entry."""

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""Of one gRPC message, both ways. A prompt of 131,072 tokens packs into at most 0.4 MB; the rest is
room for constraints and metrics."""

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
    """What an engine serves; constant for its life. Replicas of one model agree in
    `model_fingerprint`.

    Attributes:
        start_id: drawn at random at the engine's start: tells it from the one before it at the same
            address.
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


def request_to_wire(request: EngineRequest) -> pb.GenerateRequest:
    """The deadline is not part of the message: it is the call's own."""
    return pb.GenerateRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        sampling=_sampling_to_wire(request.sampling),
        constraint=None if request.constraint is None else _automaton_to_wire(request.constraint),
    )


def request_from_wire(
    message: pb.GenerateRequest, *, vocab_size: int, deadline_s: float | None = None
) -> EngineRequest:
    """Check a message and convert it.

    Raises:
        InvalidRequest: a field is missing or outside its range; `param` names it.
    """
    request = EngineRequest(
        request_id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=_sampling_from_wire(message.sampling),
        output_token_ids=tuple(message.output_token_ids),
        deadline_s=deadline_s,
        constraint=_automaton_from_wire(message.constraint) if message.HasField("constraint") else None,
    )
    check_request(request, vocab_size)
    return request


def output_to_wire(output: EngineOutput) -> pb.GenerateResponse:
    """An engine's output as the next message of a stream."""
    return pb.GenerateResponse(
        token_ids=output.token_ids,
        logprobs=[
            pb.TokenLogprobs(
                logprob=entry.logprob,
                top=[
                    pb.TokenLogprobs.Candidate(token_id=token_id, logprob=logprob)
                    for token_id, logprob in entry.top
                ],
            )
            for entry in output.logprobs
        ],
        finish_reason=_FINISH_TO_WIRE[output.finish_reason],
        stop_token_id=output.stop_token_id,
        num_cached_tokens=output.num_cached_tokens,
        error=output.error or "",
    )


def output_from_wire(message: pb.GenerateResponse) -> EngineOutput:
    """The inverse of `output_to_wire`; log-probabilities come back as float32. A finish reason of a
    newer engine is an `error`."""
    known = message.finish_reason in _FINISH_FROM_WIRE
    return EngineOutput(
        token_ids=tuple(message.token_ids),
        logprobs=tuple(
            TokenLogprobs(
                entry.logprob, tuple((candidate.token_id, candidate.logprob) for candidate in entry.top)
            )
            for entry in message.logprobs
        ),
        finish_reason=_FINISH_FROM_WIRE[message.finish_reason] if known else "error",
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        num_cached_tokens=message.num_cached_tokens,
        error=message.error
        or (None if known else f"the engine ended with the unknown finish reason {message.finish_reason}"),
    )


def info_to_wire(info: EngineInfo) -> pb.EngineInfo:
    """As a message."""
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
    )


def info_from_wire(message: pb.EngineInfo) -> EngineInfo:
    """The inverse of `info_to_wire`."""
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
    )


def load_to_wire(load: EngineLoad) -> pb.EngineLoad:
    """As a message."""
    return pb.EngineLoad(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        kv_usage=load.kv_usage,
        accepting=load.accepting,
    )


def load_from_wire(message: pb.EngineLoad) -> EngineLoad:
    """The inverse of `load_to_wire`."""
    return EngineLoad(message.num_running, message.num_waiting, message.kv_usage, message.accepting)


def error_to_metadata(error: errors.CantataError) -> tuple[tuple[str, str], ...]:
    """Trailing metadata that lets the caller rebuild the error; the status is `error.status`, the
    details `error.message`."""
    metadata = [(ERROR_CLASS_KEY, type(error).__name__)]
    if isinstance(error, errors.InvalidRequest) and error.param:
        metadata.append((PARAM_KEY, _NOT_METADATA.sub("?", error.param[:_MAX_PARAM_CHARS])))
    if error.retry_after_s is not None:
        metadata.append((RETRY_AFTER_KEY, f"{error.retry_after_s:g}"))
    return tuple(metadata)


def error_from_status(status: str, message: str, metadata: Mapping[str, str]) -> errors.CantataError:
    """The error of a failed call.

    Args:
        status: name of the gRPC status code.
        metadata: the call's trailing metadata, where there was any (proxies may lose it).
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
        errors.ContextLengthExceeded,
        errors.ModelNotFound,
        errors.Overloaded,
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
    )


def _sampling_from_wire(message: pb.SamplingParams) -> SamplingParams:
    # An absent field is the dataclass's default, except max_tokens, where absent means up to the
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
    )


def _automaton_to_wire(automaton: TokenAutomaton) -> pb.TokenAutomaton:
    return pb.TokenAutomaton(
        states=[
            pb.TokenAutomaton.State(
                restrict=state.allowed is not None,
                allowed=state.allowed or (),
                forbidden=state.forbidden,
                transitions=[
                    pb.TokenAutomaton.State.Transition(token_id=token_id, state=target)
                    for token_id, target in state.transitions
                ],
            )
            for state in automaton.states
        ],
        start=automaton.start,
    )


def _automaton_from_wire(message: pb.TokenAutomaton) -> TokenAutomaton:
    try:
        return TokenAutomaton(
            tuple(
                AutomatonState(
                    allowed=tuple(state.allowed) if state.restrict else None,
                    forbidden=tuple(state.forbidden),
                    transitions=tuple(
                        (transition.token_id, transition.state) for transition in state.transitions
                    ),
                )
                for state in message.states
            ),
            message.start,
        )
    except ValueError as error:
        raise errors.InvalidRequest(f"constraint: {error}", "constraint") from error
