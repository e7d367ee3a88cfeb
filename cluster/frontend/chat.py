"""`POST /v1/chat/completions`: the body as a ChatRequest, its generation as an answer or chunks."""

from collections.abc import AsyncGenerator, Sequence

from cluster.events import TokenCandidate, TokenLogprob, Usage
from cluster.frontend import sse
from cluster.frontend.answers import (
    AnswerMessage,
    ChatChoiceBody,
    ChatCompletion,
    ChatCompletionChunk,
    ChoiceLogprobs,
    ChunkChoice,
    CustomBody,
    DeltaBody,
    FunctionBody,
    ToolCallBody,
    ToolCallDeltaBody,
    TopLogprob,
    UsageBody,
)
from cluster.frontend.chat_messages import ChatMessage, ToolCall, harmony_messages
from cluster.frontend.fold import (
    AnswerCall,
    AnswerChoice,
    AnswerDelta,
    Finish,
    Fold,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    whole_answer,
)
from cluster.frontend.prompt_logprobs import prompt_logprobs
from cluster.frontend.reasoning import (
    chat_effort,
    earlier_reasoning,
    reasoning_budget,
    shown_effort,
    shows_reasoning,
)
from cluster.frontend.sampling import check_stream_options, options, sampling_params, stop_strings
from cluster.frontend.schema import (
    ChatCompletionRequest,
    ChatFields,
    ChatTemplateKwargs,
    ContentPart,
    ReasoningPart,
    RefusalPart,
    TextPart,
)
from cluster.frontend.schema import Message as MessageBody
from cluster.frontend.schema_tools import (
    AllowedToolChoice,
    AssistantToolCall,
    CustomTool,
    CustomToolCall,
    GrammarInput,
    NamedCustomTool,
    NamedFunction,
    NamedTool,
    Tool,
)
from cluster.frontend.structure import body_structure
from cluster.frontend.timings import timings
from cluster.frontend.tool_choices import Named, text_input, tool_choice
from cluster.generation import ChatRequest, FieldNames, Generation, ToolChoice
from cluster.harmony.message import Message
from cluster.harmony.tools import ToolDefinition
from workers.errors import InvalidRequest


def chat_request(body: ChatCompletionRequest, num_bytes: int) -> ChatRequest:
    """Convert a body of `num_bytes` to the service's request.

    Raises:
        InvalidRequest: a field requests something that is not supported, or contradicts another.
    """
    _refuse_what_is_not_offered(body)
    check_stream_options(body)
    if (
        body.max_tokens is not None
        and body.max_completion_tokens is not None
        and body.max_tokens != body.max_completion_tokens
    ):
        raise InvalidRequest(
            "max_completion_tokens and max_tokens are the same limit and differ; send one.",
            "max_completion_tokens",
        )
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true.", "top_logprobs")
    kwargs = body.chat_template_kwargs or ChatTemplateKwargs()
    effort = chat_effort(body, kwargs)
    max_reasoning_tokens, budget_name = reasoning_budget(body)
    tools, choice = tools_and_choice(body, body.max_parallel_tool_calls, body.parallel_tool_calls)
    return ChatRequest(
        messages=chat_messages(body.messages),
        num_bytes=num_bytes,
        sampling=sampling_params(body, max_tokens, (body.top_logprobs or 0) if body.logprobs else None),
        tools=tools,
        tool_choice=choice,
        stop=stop_strings(body),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        structure=body_structure(body),
        skips_reasoning=effort == "none",
        max_reasoning_tokens=max_reasoning_tokens,
        reasoning_effort=shown_effort(effort),
        model_identity=kwargs.model_identity,
        current_date=kwargs.current_date,
        harmony_constraint=body.harmony_constraint,
        model=body.model,
        continues_last=continues_last(body),
        names=FieldNames(
            "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
            "top_logprobs",
            budget_name,
        ),
        options=options(body),
    )


def continues_last(body: ChatFields) -> bool:
    """Return whether the answer continues the last message.

    Raises:
        InvalidRequest: it would both continue and begin one.
    """
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt cannot both be true: leave one of them out.",
            "continue_final_message",
        )
    return bool(body.continue_final_message)


def chat_messages(messages: Sequence[MessageBody]) -> tuple[Message, ...]:
    """Return messages with their parts joined and their reasoning read.

    Raises:
        InvalidRequest: with `param`.
    """
    return harmony_messages(
        [_chat_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    )


def _chat_message(message: MessageBody, path: str) -> ChatMessage:
    calls = tuple(_earlier_call(call) for call in message.tool_calls or ())
    content = message.content
    if content is None and message.role == "assistant":
        content = message.refusal or ""
    if content is None:
        raise InvalidRequest(f"{path}.content is missing.", f"{path}.content")
    if not isinstance(content, str):
        content = _text(content, message.role, f"{path}.content")
    return ChatMessage(
        role=message.role,
        content=content,
        reasoning=earlier_reasoning(message) if message.role == "assistant" else None,
        tool_calls=calls,
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


def _text(parts: Sequence[ContentPart], role: str, path: str) -> str:
    """Return the text of content in parts, refusals included."""
    texts = []
    for index, part in enumerate(parts):
        if isinstance(part, TextPart):
            texts.append(part.text)
        elif isinstance(part, RefusalPart):
            texts.append(part.refusal)
        elif isinstance(part, ReasoningPart) and role != "assistant":
            place = f"{path}[{index}]"
            raise InvalidRequest(f"{place} is reasoning, which only an assistant message has.", place)
    return "".join(texts)


def _earlier_call(call: AssistantToolCall) -> ToolCall:
    if isinstance(call, CustomToolCall):
        return ToolCall(call.id, call.custom.name, call.custom.input, custom=True)
    return ToolCall(call.id, call.function.name, call.function.arguments)


def tools_and_choice(
    body: ChatFields, max_calls: int | None = None, parallel: bool | None = None
) -> tuple[tuple[ToolDefinition, ...], ToolChoice]:
    """Return the tools that the model sees, and which of them may be called.

    Args:
        max_calls: `max_parallel_tool_calls`.
        parallel: `parallel_tool_calls`.
    Raises:
        InvalidRequest: the grammar of a custom tool is wrong; see `tool_choice`.
    """
    shown = () if body.tool_choice == "none" else body.tools or ()
    tools = tuple(_tool_definition(tool, index) for index, tool in enumerate(shown))
    choice, named, required, param = body.tool_choice, None, False, "tool_choice"
    match choice:
        case NamedFunction() | NamedCustomTool():
            named, required = [_named(choice, param)], True
        case AllowedToolChoice(allowed_tools=allowed):
            param = "tool_choice.allowed_tools.tools"
            named = [_named(tool, f"{param}[{index}]") for index, tool in enumerate(allowed.tools)]
            required = allowed.mode == "required"
        case _:
            required = choice == "required"
    return tools, tool_choice(
        tools, named, required=required, max_calls=max_calls, parallel=parallel, param=param
    )


def _tool_definition(tool: Tool, index: int) -> ToolDefinition:
    if isinstance(tool, CustomTool):
        custom, grammar = tool.custom, None
        if isinstance(custom.format, GrammarInput):
            grammar = custom.format.grammar
        text = text_input(
            None if grammar is None else grammar.syntax,
            "" if grammar is None else grammar.definition,
            f"tools[{index}].custom.format.grammar.definition",
        )
        return ToolDefinition(custom.name, custom.description or "", text=text)
    function = tool.function
    return ToolDefinition(
        function.name, function.description or "", function.parameters, strict=bool(function.strict)
    )


def _named(tool: NamedTool, place: str) -> Named:
    if isinstance(tool, NamedCustomTool):
        return Named(tool.custom.name, f"{place}.custom.name", custom=True)
    return Named(tool.function.name, f"{place}.function.name", custom=False)


def _refuse_what_is_not_offered(body: ChatCompletionRequest) -> None:
    if body.add_generation_prompt is False and not body.continue_final_message:
        raise InvalidRequest(
            "add_generation_prompt false needs continue_final_message to be true: otherwise there is no "
            "message that an answer could be written in.",
            "add_generation_prompt",
        )
    if body.audio is not None:
        raise InvalidRequest("audio is not offered: the model writes text only.", "audio")
    if body.functions is not None:
        raise InvalidRequest("functions was removed from OpenAI's API: use tools.", "functions")
    if body.function_call is not None:
        raise InvalidRequest("function_call was removed from OpenAI's API: use tool_choice.", "function_call")


async def answer(generation: Generation, body: ChatCompletionRequest, fingerprint: str) -> ChatCompletion:
    """Return the whole answer, when the generation is over."""
    whole = await whole_answer(generation, body.n or 1, _custom_tools(body))
    answer: ChatCompletion = {
        "id": generation.id,
        "object": "chat.completion",
        "created": generation.created_unix_s,
        "model": generation.model,
        "system_fingerprint": fingerprint or None,
        "choices": [_choice_body(index, choice, body) for index, choice in enumerate(whole.choices)],
        "usage": usage_body(whole.usage),
        "prompt_token_ids": list(generation.prompts[0]) if body.return_token_ids else None,
        "prompt_logprobs": await prompt_logprobs(generation, body.prompt_logprobs),
    }
    if body.timings_per_token:
        answer["timings"] = timings(generation)
    return answer


def _choice_body(index: int, choice: AnswerChoice, asked: ChatCompletionRequest) -> ChatChoiceBody:
    message: AnswerMessage = {"role": "assistant", "content": choice.content, "refusal": None}
    if choice.reasoning is not None and shows_reasoning(asked):
        message["reasoning"] = message["reasoning_content"] = choice.reasoning
    if choice.calls:
        message["tool_calls"] = [_call_body(call) for call in choice.calls]
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs_body(choice.logprobs, asked) if asked.logprobs else None,
        "finish_reason": choice.finish.reason,
        "stop_reason": choice.finish.stop_reason,
        "token_ids": choice.token_ids if asked.return_token_ids else None,
    }


def _call_body(call: AnswerCall) -> ToolCallBody:
    if call.custom:
        return {"id": call.id, "type": "custom", "custom": {"name": call.name, "input": call.arguments}}
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _custom_tools(body: ChatCompletionRequest) -> frozenset[str]:
    return frozenset(tool.custom.name for tool in body.tools or () if isinstance(tool, CustomTool))


async def chunks(
    generation: Generation, body: ChatCompletionRequest, fingerprint: str
) -> AsyncGenerator[bytes, None]:
    """Yield server-sent events: the role of each choice, its deltas, its finish reason; usage last,
    if requested."""
    options = body.stream_options
    include_usage = bool(options and options.include_usage)
    continuous = include_usage and bool(options and options.continuous_usage_stats)
    include_reasoning = shows_reasoning(body)
    frame = _ChunkFrame(generation, fingerprint, include_usage, continuous, bool(body.timings_per_token))
    fold = Fold(_custom_tools(body), generation.id)
    for index in range(body.n or 1):
        chunk = frame.chunk([_chunk_choice(index, {"role": "assistant", "content": ""})])
        if body.return_token_ids and index == 0:
            chunk["prompt_token_ids"] = list(generation.prompts[0])
        yield sse.event(chunk)
    async for event in generation:
        if isinstance(event, Usage):
            if include_usage:
                yield sse.event({**frame.chunk([]), "usage": usage_body(event)})
            continue
        shown = fold.add(event)
        if shown is None:
            continue
        if isinstance(shown.delta, ReasoningDelta) and not include_reasoning:
            if not (body.return_token_ids and shown.token_ids):
                continue
            choice = _chunk_choice(shown.choice, {})  # its text is left out, its tokens are not
        else:
            choice = _shown_choice(shown)
        if shown.logprobs:
            choice["logprobs"] = _logprobs_body(shown.logprobs, body)
        if body.return_token_ids:
            choice["token_ids"] = list(shown.token_ids)
        yield sse.event(frame.chunk([choice]))


class _ChunkFrame:
    """The fields that all chunks of a generation share."""

    def __init__(
        self,
        generation: Generation,
        fingerprint: str,
        include_usage: bool,
        continuous: bool,
        has_timings: bool,
    ) -> None:
        self._generation = generation
        self._fingerprint = fingerprint or None
        self._include_usage = include_usage
        self._continuous = continuous
        self._has_timings = has_timings

    def chunk(self, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        chunk: ChatCompletionChunk = {
            "id": self._generation.id,
            "object": "chat.completion.chunk",
            "created": self._generation.created_unix_s,
            "model": self._generation.model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
        }
        if self._include_usage:
            chunk["usage"] = usage_body(self._generation.usage()) if self._continuous else None
        if self._has_timings:
            chunk["timings"] = timings(self._generation)
        return chunk


def _chunk_choice(index: int, delta: DeltaBody) -> ChunkChoice:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _shown_choice(shown: AnswerDelta) -> ChunkChoice:
    match shown.delta:
        case Finish(reason, stop_reason):
            choice = _chunk_choice(shown.choice, {})
            choice["finish_reason"] = reason
            choice["stop_reason"] = stop_reason
            return choice
        case TextDelta(text):
            return _chunk_choice(shown.choice, {"content": text})
        case ReasoningDelta(text):
            return _chunk_choice(shown.choice, {"reasoning": text, "reasoning_content": text})
        case ToolCallDelta() as delta:
            return _chunk_choice(shown.choice, {"tool_calls": [_call_delta(delta)]})


def _call_delta(delta: ToolCallDelta) -> ToolCallDeltaBody:
    body: ToolCallDeltaBody = {"index": delta.call_index}
    if delta.name is not None:
        body["id"] = delta.id or ""
        body["type"] = "custom" if delta.custom else "function"
    if delta.custom:
        custom: CustomBody = {"input": delta.arguments}
        body["custom"] = custom if delta.name is None else {"name": delta.name, **custom}
    else:
        function: FunctionBody = {"arguments": delta.arguments}
        body["function"] = function if delta.name is None else {"name": delta.name, **function}
    return body


def _logprobs_body(entries: Sequence[TokenLogprob], asked: ChatCompletionRequest) -> ChoiceLogprobs:
    as_ids = bool(asked.return_tokens_as_token_ids)
    return {
        "content": [
            {
                **_top_logprob(entry.chosen, as_ids),
                "top_logprobs": [_top_logprob(candidate, as_ids) for candidate in entry.top],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def _top_logprob(candidate: TokenCandidate, as_ids: bool) -> TopLogprob:
    return {
        "token": token_name(candidate, as_ids),
        "logprob": candidate.logprob,
        "bytes": list(candidate.token_bytes) or None,
    }


def token_name(candidate: TokenCandidate, as_ids: bool) -> str:
    """Return a token's text, or its id in the form of vLLM's `return_tokens_as_token_ids`."""
    return f"token_id:{candidate.token_id}" if as_ids else candidate.text


def usage_body(usage: Usage) -> UsageBody:
    """Return token counts under OpenAI's names."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
