"""Conversion of the public gRPC API's messages to the service's requests, and of answers to its
messages."""

import math

from google.protobuf import struct_pb2

from cluster.events import FinishReason, GenerationEvent, TokenLogprob, Usage
from cluster.frontend.chat_messages import ChatMessage, ChatRole, ToolCall, harmony_messages
from cluster.frontend.fold import Finish, Fold, ReasoningDelta, TextDelta, ToolCallDelta, whole_answer
from cluster.generation import ChatRequest, FieldNames, Generation, Options, Truncation
from cluster.harmony.render import ReasoningEffort
from cluster.harmony.tools import ToolDefinition
from cluster.harmony.turn_grammar import HarmonyConstraint
from cluster.rpc import inference_pb2 as pb
from workers.errors import InvalidRequest
from workers.request import SamplingParams

_ROLES: dict[int, ChatRole] = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_DEVELOPER: "developer",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
}
_EFFORTS: dict[int, ReasoningEffort | None] = {
    pb.REASONING_EFFORT_UNSPECIFIED: None,
    pb.REASONING_EFFORT_LOW: "low",
    pb.REASONING_EFFORT_MEDIUM: "medium",
    pb.REASONING_EFFORT_HIGH: "high",
}
_CONSTRAINTS: dict[int, HarmonyConstraint | None] = {
    pb.HARMONY_CONSTRAINT_UNSPECIFIED: None,
    pb.HARMONY_CONSTRAINT_OFF: "off",
    pb.HARMONY_CONSTRAINT_HEADERS: "headers",
}
_SHOWS_TOOLS = {
    pb.TOOL_CHOICE_UNSPECIFIED: True,
    pb.TOOL_CHOICE_AUTO: True,
    pb.TOOL_CHOICE_NONE: False,
}
"""Whether the model sees the tools, by the choices that are offered."""
_FINISH: dict[FinishReason, pb.FinishReason.ValueType] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
}


def chat_request(request: pb.ChatRequest) -> ChatRequest:
    """Convert a message to the service's request. Errors name fields as the HTTP API spells them.

    Raises:
        InvalidRequest: a role, effort, constraint, tool choice or schema is invalid.
    """
    if request.reasoning_effort not in _EFFORTS:
        raise InvalidRequest(
            "reasoning_effort must be REASONING_EFFORT_LOW, REASONING_EFFORT_MEDIUM or "
            "REASONING_EFFORT_HIGH.",
            "reasoning_effort",
        )
    if request.harmony_constraint not in _CONSTRAINTS:
        raise InvalidRequest(
            "harmony_constraint must be HARMONY_CONSTRAINT_OFF or HARMONY_CONSTRAINT_HEADERS.",
            "harmony_constraint",
        )
    if request.tool_choice not in _SHOWS_TOOLS:
        raise InvalidRequest(
            "tool_choice must be TOOL_CHOICE_AUTO or TOOL_CHOICE_NONE: forcing a call is not offered yet.",
            "tool_choice",
        )
    shown_tools = request.tools if _SHOWS_TOOLS[request.tool_choice] else ()
    return ChatRequest(
        messages=harmony_messages(
            [_message(message, f"messages[{index}]") for index, message in enumerate(request.messages)]
        ),
        num_bytes=request.ByteSize(),
        sampling=_sampling(request),
        tools=tuple(
            _tool(tool, f"tools[{index}].function.parameters") for index, tool in enumerate(shown_tools)
        ),
        stop=tuple(request.stop),
        parallel_tool_calls=request.parallel_tool_calls or not request.HasField("parallel_tool_calls"),
        reasoning_effort=_EFFORTS[request.reasoning_effort],
        model_identity=request.model_identity if request.HasField("model_identity") else None,
        current_date=request.current_date if request.HasField("current_date") else None,
        harmony_constraint=_CONSTRAINTS[request.harmony_constraint],
        model=request.model or None,
        names=FieldNames(logprobs="top_logprobs"),
        options=_options(request),
    )


def _options(request: pb.ChatRequest) -> Options:
    if request.truncation_side not in pb.TruncationSide.values():
        raise InvalidRequest(
            "truncation_side must be TRUNCATION_SIDE_LEFT or TRUNCATION_SIDE_RIGHT.", "truncation_side"
        )
    truncation = None
    if request.HasField("truncate_prompt_tokens"):
        keeps_end = request.truncation_side != pb.TRUNCATION_SIDE_RIGHT
        truncation = Truncation(request.truncate_prompt_tokens, keeps_end=keeps_end)
    salt = request.cache_salt if request.HasField("cache_salt") else None
    return Options(truncation, salt, tuple(request.bad_words), request.priority)


def _message(message: pb.Message, path: str) -> ChatMessage:
    if message.role not in _ROLES:
        raise InvalidRequest(
            f"{path}.role must be ROLE_SYSTEM, ROLE_DEVELOPER, ROLE_USER, ROLE_ASSISTANT or ROLE_TOOL.",
            f"{path}.role",
        )
    role = _ROLES[message.role]
    return ChatMessage(
        role=role,
        content=message.content,
        reasoning=(message.reasoning or None) if role == "assistant" else None,
        tool_calls=tuple(ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls),
        tool_call_id=message.tool_call_id or None,
        name=message.name or None,
    )


def _tool(tool: pb.Tool, path: str) -> ToolDefinition:
    return ToolDefinition(
        tool.name,
        tool.description,
        _plain_object(tool.parameters, path) if tool.HasField("parameters") else None,
    )


def _plain_object(struct: struct_pb2.Struct, path: str) -> dict[str, object]:
    # A Struct has no order; sorted, the same tools give the same prompt in every process, and so
    # the same cached prefix.
    return {name: _plain(struct.fields[name], path) for name in sorted(struct.fields)}


def _plain(value: struct_pb2.Value, path: str) -> object:
    """Convert a Struct's value to the value that JSON would have given: a Struct has only
    floating-point numbers, and whole ones become integers."""
    match value.WhichOneof("kind"):
        case "number_value":
            if not math.isfinite(value.number_value):
                raise InvalidRequest(f"{path} has a number that is not finite or too large.", path)
            return int(value.number_value) if value.number_value.is_integer() else value.number_value
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return _plain_object(value.struct_value, path)
        case "list_value":
            return [_plain(entry, path) for entry in value.list_value.values]
        case _:
            return None


def _sampling(request: pb.ChatRequest) -> SamplingParams:
    default = SamplingParams()
    return SamplingParams(
        max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
        temperature=request.temperature if request.HasField("temperature") else default.temperature,
        top_p=request.top_p if request.HasField("top_p") else default.top_p,
        top_k=request.top_k if request.HasField("top_k") else default.top_k,
        min_p=request.min_p if request.HasField("min_p") else default.min_p,
        presence_penalty=request.presence_penalty
        if request.HasField("presence_penalty")
        else default.presence_penalty,
        frequency_penalty=request.frequency_penalty
        if request.HasField("frequency_penalty")
        else default.frequency_penalty,
        repetition_penalty=request.repetition_penalty
        if request.HasField("repetition_penalty")
        else default.repetition_penalty,
        logit_bias=tuple(sorted(request.logit_bias.items())),
        seed=request.seed if request.HasField("seed") else None,
        logprobs=request.top_logprobs if request.HasField("top_logprobs") else None,
        stop_token_ids=tuple(request.stop_token_ids),
        allowed_token_ids=tuple(sorted(set(request.allowed_token_ids))),
        min_tokens=request.min_tokens if request.HasField("min_tokens") else default.min_tokens,
        ignore_eos=request.ignore_eos if request.HasField("ignore_eos") else default.ignore_eos,
        n=request.n if request.HasField("n") else default.n,
    )


def _shows_reasoning(request: pb.ChatRequest) -> bool:
    return request.include_reasoning or not request.HasField("include_reasoning")


async def chat_response(generation: Generation, request: pb.ChatRequest, fingerprint: str) -> pb.ChatResponse:
    """Return the whole answer, when the generation is over."""
    whole = await whole_answer(generation, request.n if request.HasField("n") else 1)
    response = pb.ChatResponse(
        id=generation.id,
        model=generation.model,
        created_unix_s=generation.created_unix_s,
        system_fingerprint=fingerprint,
        usage=_usage(whole.usage),
        prompt_token_ids=generation.prompts[0] if request.return_token_ids else (),
    )
    for index, choice in enumerate(whole.choices):
        response.choices.add(
            index=index,
            message=pb.Message(
                role=pb.ROLE_ASSISTANT,
                content=choice.content or "",
                reasoning=(choice.reasoning or "") if _shows_reasoning(request) else "",
                tool_calls=[
                    pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in choice.calls
                ],
            ),
            finish_reason=_FINISH[choice.finish.reason],
            stop_reason=None
            if choice.finish.stop_reason is None
            else _stop_reason(choice.finish.stop_reason),
            logprobs=map(_logprob, choice.logprobs),
            token_ids=choice.token_ids if request.return_token_ids else (),
        )
    return response


def _stop_reason(reason: str | int) -> pb.StopReason:
    return pb.StopReason(text=reason) if isinstance(reason, str) else pb.StopReason(token_id=reason)


class ChatEvents:
    """The converter of one generation's events to a stream's messages."""

    def __init__(self, generation: Generation, request: pb.ChatRequest, fingerprint: str) -> None:
        self._id = generation.id
        self._fold = Fold()
        self._shows_reasoning = _shows_reasoning(request)
        self._shows_ids = request.return_token_ids
        self._head: pb.StreamHead | None = pb.StreamHead(
            model=generation.model,
            created_unix_s=generation.created_unix_s,
            system_fingerprint=fingerprint,
            prompt_token_ids=generation.prompts[0] if self._shows_ids else (),
        )

    def add(self, event: GenerationEvent) -> pb.ChatEvent | None:
        """Return the message for an event; None if it shows nothing."""
        message = self._message(event)
        if message is not None and self._head is not None:
            message.head.CopyFrom(self._head)
            self._head = None
        return message

    def _message(self, event: GenerationEvent) -> pb.ChatEvent | None:
        if isinstance(event, Usage):
            return pb.ChatEvent(id=self._id, usage=_usage(event))
        shown = self._fold.add(event)
        if shown is None:
            return None
        answer = pb.ChatEvent(id=self._id, choice=shown.choice)
        if self._shows_ids:
            answer.token_ids.extend(shown.token_ids)
        match shown.delta:
            case Finish(reason, stop_reason):
                answer.finish.reason = _FINISH[reason]
                if stop_reason is not None:
                    answer.finish.stop_reason.CopyFrom(_stop_reason(stop_reason))
                answer.finish.logprobs.extend(map(_logprob, shown.logprobs))
            case TextDelta(text):
                answer.text.text = text
                answer.text.logprobs.extend(map(_logprob, shown.logprobs))
            case ReasoningDelta(text) if self._shows_reasoning:
                answer.reasoning.text = text
            case ReasoningDelta():
                return answer if answer.token_ids else None  # its text is left out, its tokens are not
            case ToolCallDelta(index, name, arguments, call_id):
                answer.tool_call.call_index = index
                answer.tool_call.id = call_id or ""
                answer.tool_call.name = name or ""
                answer.tool_call.arguments = arguments
                answer.tool_call.SetInParent()
        return answer


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
    )


def _logprob(entry: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token=entry.chosen.token_bytes,
        token_id=entry.chosen.token_id,
        logprob=entry.chosen.logprob,
        top=[
            pb.TokenLogprob.Candidate(
                token=candidate.token_bytes, token_id=candidate.token_id, logprob=candidate.logprob
            )
            for candidate in entry.top
        ],
    )
