"""`POST /v1/completions`: raw prompts, texts or token ids, continued as they are."""

from collections.abc import AsyncGenerator, Sequence

from cluster.events import ChoiceDelta, ChoiceFinish, TextDelta, TokenLogprob, Usage
from cluster.frontend import schema, sse
from cluster.frontend.answers import (
    CompletionLogprobs,
    FinishReason,
    TextChoiceBody,
    TextCompletion,
    UsageBody,
)
from cluster.frontend.chat import usage_body
from cluster.frontend.sampling import check_stream_options, sampling_params, stop_strings
from cluster.generation import CompletionRequest, Generation
from workers.errors import InvalidRequest


def completion_request(body: schema.CompletionRequest) -> CompletionRequest:
    """What the service is asked.

    Raises:
        InvalidRequest: a field asks for something that is not offered.
    """
    check_stream_options(body)
    if body.suffix:
        raise InvalidRequest("suffix is not offered: gpt-oss only continues a text.", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("best_of is not offered: leave it out or set it to n.", "best_of")
    if body.echo and body.logprobs is not None:
        raise InvalidRequest(
            "echo cannot be combined with logprobs: log-probabilities of prompts are not computed.", "echo"
        )
    return CompletionRequest(
        prompts=_prompts(body.prompt),
        sampling=sampling_params(body, body.max_tokens, body.logprobs),
        stop=stop_strings(body),
        echo=bool(body.echo),
        skip_special_tokens=body.skip_special_tokens is not False,
        model=body.model,
    )


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(prompt, str):
        return (prompt,)
    ids = tuple(entry for entry in prompt if isinstance(entry, int))
    if ids:
        return (ids,)
    return tuple(
        entry if isinstance(entry, str) else tuple(entry) for entry in prompt if not isinstance(entry, int)
    )


async def answer(generation: Generation, body: schema.CompletionRequest, fingerprint: str) -> TextCompletion:
    """The whole answer, when the generation is over."""
    n = body.n or 1
    choices = [
        _ChoiceBuilder(index, body, generation.prompts[index // n])
        for index in range(n * len(generation.prompts))
    ]
    usage: UsageBody | None = None
    async for event in generation:
        if isinstance(event, Usage):
            usage = usage_body(event)
        else:
            choices[event.choice].add(event)
    return {**_frame(generation, fingerprint, [choice.body() for choice in choices]), "usage": usage}


class _ChoiceBuilder:
    def __init__(self, index: int, request: schema.CompletionRequest, prompt: tuple[int, ...]) -> None:
        self._index = index
        self._request = request
        self._prompt = prompt
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._token_ids: list[int] = []
        self._reason: FinishReason | None = None
        self._stop_reason: str | int | None = None

    def add(self, event: ChoiceDelta | ChoiceFinish) -> None:
        self._token_ids += event.token_ids
        self._logprobs += event.logprobs
        if isinstance(event, ChoiceFinish):
            self._reason, self._stop_reason = event.reason, event.stop_reason
        elif isinstance(event.delta, TextDelta):
            self._text.append(event.delta.text)

    def body(self) -> TextChoiceBody:
        body: TextChoiceBody = {
            "index": self._index,
            "text": "".join(self._text),
            "logprobs": _logprobs_body(self._logprobs) if self._request.logprobs is not None else None,
            "finish_reason": self._reason,
            "stop_reason": self._stop_reason,
        }
        if self._request.return_token_ids:
            body["token_ids"] = self._token_ids
            body["prompt_token_ids"] = list(self._prompt)
        return body


async def chunks(
    generation: Generation, body: schema.CompletionRequest, fingerprint: str
) -> AsyncGenerator[bytes, None]:
    """Server-sent events: text as it comes, each choice's finish reason; usage last, where asked
    for."""
    options = body.stream_options
    include_usage = bool(options and options.include_usage)
    continuous = include_usage and bool(options and options.continuous_usage_stats)
    n = body.n or 1
    begun: set[int] = set()
    async for event in generation:
        if isinstance(event, Usage):
            if include_usage:
                yield sse.event({**_frame(generation, fingerprint, []), "usage": usage_body(event)})
            continue
        builder = _ChoiceBuilder(event.choice, body, generation.prompts[event.choice // n])
        builder.add(event)
        choice = builder.body()
        if event.choice in begun:
            choice.pop("prompt_token_ids", None)
        begun.add(event.choice)
        chunk = _frame(generation, fingerprint, [choice])
        if include_usage:
            chunk["usage"] = usage_body(generation.usage()) if continuous else None
        yield sse.event(chunk)


def _frame(generation: Generation, fingerprint: str, choices: list[TextChoiceBody]) -> TextCompletion:
    return {
        "id": generation.id,
        "object": "text_completion",
        "created": generation.created_unix_s,
        "model": generation.model,
        "system_fingerprint": fingerprint or None,
        "choices": choices,
    }


def _logprobs_body(entries: Sequence[TokenLogprob]) -> CompletionLogprobs:
    return {
        "tokens": [entry.chosen.text for entry in entries],
        "token_logprobs": [entry.chosen.logprob for entry in entries],
        # OpenAI's legacy format has the chosen token among its alternatives even if it is not one
        # of the most likely.
        "top_logprobs": [
            {candidate.text: candidate.logprob for candidate in (*entry.top, entry.chosen)}
            for entry in entries
        ],
        "text_offset": [entry.text_offset for entry in entries],
    }
