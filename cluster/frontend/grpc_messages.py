"""Conversion of the public gRPC API's messages to the service's requests, and of answers to its
messages."""

from collections.abc import Iterator

from cluster.chat_options import HarmonyConstraint, ReasoningEffort
from cluster.events import FinishReason, GenerationEvent, TokenLogprob, Usage
from cluster.frontend.chat_messages import ChatMessage, ChatRole, ToolCall, harmony_messages
from cluster.frontend.fold import Finish, Fold, ReasoningDelta, TextDelta, ToolCallDelta, whole_answer
from cluster.frontend.grpc_tools import answer_structure, tools_and_choice
from cluster.generation import ChatRequest, FieldNames, Generation, Options, Truncation
from cluster.generation.limits import check_reasoning_budget
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
    pb.REASONING_EFFORT_NONE: "low",
}
_CONSTRAINTS: dict[int, HarmonyConstraint | None] = {
    pb.HARMONY_CONSTRAINT_UNSPECIFIED: None,
    pb.HARMONY_CONSTRAINT_OFF: "off",
    pb.HARMONY_CONSTRAINT_HEADERS: "headers",
}
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
            "reasoning_effort must be REASONING_EFFORT_LOW, REASONING_EFFORT_MEDIUM, REASONING_EFFORT_HIGH "
            "or REASONING_EFFORT_NONE.",
            "reasoning_effort",
        )
    if request.harmony_constraint not in _CONSTRAINTS:
        raise InvalidRequest(
            "harmony_constraint must be HARMONY_CONSTRAINT_OFF or HARMONY_CONSTRAINT_HEADERS.",
            "harmony_constraint",
        )
    tools, choice = tools_and_choice(request)
    budget = request.max_reasoning_tokens if request.HasField("max_reasoning_tokens") else None
    if budget is not None:
        check_reasoning_budget(budget, "max_reasoning_tokens")
    return ChatRequest(
        messages=harmony_messages(
            [_message(message, f"messages[{index}]") for index, message in enumerate(request.messages)]
        ),
        num_bytes=request.ByteSize(),
        sampling=_sampling(request),
        tools=tools,
        tool_choice=choice,
        stop=tuple(request.stop),
        parallel_tool_calls=request.parallel_tool_calls or not request.HasField("parallel_tool_calls"),
        structure=answer_structure(request),
        skips_reasoning=request.reasoning_effort == pb.REASONING_EFFORT_NONE,
        max_reasoning_tokens=budget,
        reasoning_effort=_EFFORTS[request.reasoning_effort],
        model_identity=request.model_identity if request.HasField("model_identity") else None,
        current_date=request.current_date if request.HasField("current_date") else None,
        harmony_constraint=_CONSTRAINTS[request.harmony_constraint],
        model=request.model or None,
        names=FieldNames(logprobs="top_logprobs"),
        options=_options(request),
        continues_last=request.continue_final_message,
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
        tool_calls=tuple(_earlier_call(call) for call in message.tool_calls),
        tool_call_id=message.tool_call_id or None,
        name=message.name or None,
    )


def _earlier_call(call: pb.ToolCall) -> ToolCall:
    return ToolCall(call.id, call.name, call.arguments, custom=call.type == pb.TOOL_TYPE_CUSTOM)


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
        prompt_logprobs=request.prompt_logprobs if request.HasField("prompt_logprobs") else None,
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
    whole = await whole_answer(generation, request.n if request.HasField("n") else 1, _custom_tools(request))
    response = pb.ChatResponse(
        id=generation.id,
        model=generation.model,
        created_unix_s=generation.created_unix_s,
        system_fingerprint=fingerprint,
        usage=_usage(whole.usage),
        prompt_token_ids=generation.prompts[0] if request.return_token_ids else (),
        prompt_logprobs=_prompt_logprobs(generation, request),
    )
    for index, choice in enumerate(whole.choices):
        response.choices.add(
            index=index,
            message=pb.Message(
                role=pb.ROLE_ASSISTANT,
                content=choice.content or "",
                reasoning=(choice.reasoning or "") if _shows_reasoning(request) else "",
                tool_calls=[
                    pb.ToolCall(
                        id=call.id, name=call.name, arguments=call.arguments, type=_tool_type(call.custom)
                    )
                    for call in choice.calls
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


def _custom_tools(request: pb.ChatRequest) -> frozenset[str]:
    return frozenset(tool.name for tool in request.tools if tool.type == pb.TOOL_TYPE_CUSTOM)


def _tool_type(custom: bool) -> pb.ToolType.ValueType:
    return pb.TOOL_TYPE_CUSTOM if custom else pb.TOOL_TYPE_FUNCTION


def _stop_reason(reason: str | int) -> pb.StopReason:
    return pb.StopReason(text=reason) if isinstance(reason, str) else pb.StopReason(token_id=reason)


class ChatEvents:
    """The converter of one generation's events to a stream's messages."""

    def __init__(self, generation: Generation, request: pb.ChatRequest, fingerprint: str) -> None:
        self._id = generation.id
        self._generation = generation
        self._request = request
        self._fold = Fold(_custom_tools(request), generation.id)
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
            message.head.prompt_logprobs.extend(_prompt_logprobs(self._generation, self._request))
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
            case ToolCallDelta(index, name, arguments, call_id, custom):
                answer.tool_call.call_index = index
                answer.tool_call.id = call_id or ""
                answer.tool_call.name = name or ""
                answer.tool_call.arguments = arguments
                answer.tool_call.type = _tool_type(custom)
                answer.tool_call.SetInParent()
        return answer


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
    )


def _prompt_logprobs(generation: Generation, request: pb.ChatRequest) -> Iterator[pb.TokenLogprob]:
    if request.HasField("prompt_logprobs"):
        yield from map(_logprob, generation.prompt_logprobs())


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
