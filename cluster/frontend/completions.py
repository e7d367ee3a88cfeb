"""`POST /v1/completions`: raw prompts, texts or token ids, and their continuations."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from cluster.events import FinishReason, TokenLogprob, Usage
from cluster.frontend import schema, sse
from cluster.frontend.answers import CompletionLogprobs, TextChoiceBody, TextCompletion
from cluster.frontend.chat import token_name, usage_body
from cluster.frontend.fold import Finish, Fold, TextDelta, whole_answer
from cluster.frontend.prompt_logprobs import echoed_logprobs, prompt_logprobs
from cluster.frontend.sampling import check_stream_options, options, sampling_params, stop_strings
from cluster.frontend.structure import body_structure
from cluster.frontend.timings import timings
from cluster.generation import CompletionRequest, FieldNames, Generation
from workers.errors import InvalidRequest


def completion_request(body: schema.CompletionRequest) -> CompletionRequest:
    """Convert a body to the service's request.

    Raises:
        InvalidRequest: a field requests something that is not supported.
    """
    check_stream_options(body)
    if body.suffix:
        raise InvalidRequest("suffix is not offered: gpt-oss only continues a text.", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("best_of is not offered: leave it out or set it to n.", "best_of")
    prompt_only = body.max_tokens == 0
    sampling = sampling_params(body, 1 if prompt_only else body.max_tokens, body.logprobs)
    scores_echo = body.echo and body.logprobs is not None
    if scores_echo:
        if body.stream and sampling.n > 1:
            raise InvalidRequest("echo with logprobs needs n to be 1 in a stream.", "n")
        sampling = replace(sampling, prompt_logprobs=max(body.logprobs or 0, body.prompt_logprobs or 0))
    return CompletionRequest(
        prompts=_prompts(body.prompt),
        sampling=sampling,
        stop=stop_strings(body),
        structure=body_structure(body),
        echo=bool(body.echo),
        prompt_only=prompt_only,
        skip_special_tokens=body.skip_special_tokens is not False,
        model=body.model,
        names=FieldNames(prompt_logprobs="logprobs" if scores_echo else "prompt_logprobs"),
        options=options(body),
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
    """Return the whole answer, when the generation is over."""
    n = body.n or 1
    whole = await whole_answer(generation, n * len(generation.prompts))
    choices = [
        _choice_body(
            index,
            choice.content or "",
            choice.logprobs,
            choice.finish,
            body,
            token_ids=choice.token_ids,
            prompt=generation.prompts[index // n],
        )
        for index, choice in enumerate(whole.choices)
    ]
    for prompt in range(len(generation.prompts)):
        echoed = await _echoed(generation, body, prompt)
        # One object for all choices of a prompt: it is large.
        scores = await prompt_logprobs(generation, body.prompt_logprobs, prompt)
        for choice_body in choices[prompt * n : (prompt + 1) * n]:
            _add_echoed(choice_body, echoed)
            choice_body["prompt_logprobs"] = scores
    for choice_body in () if body.return_token_ids else choices:  # null, as in vLLM; absent from streams
        choice_body["token_ids"] = choice_body["prompt_token_ids"] = None
    return {**_frame(generation, body, fingerprint, choices), "usage": usage_body(whole.usage)}


def _choice_body(
    index: int,
    text: str,
    logprobs: Sequence[TokenLogprob],
    finish: Finish | None,
    asked: schema.CompletionRequest,
    *,
    token_ids: Sequence[int],
    prompt: Sequence[int] | None,
) -> TextChoiceBody:
    reason: FinishReason | None = None if finish is None else finish.reason
    body: TextChoiceBody = {
        "index": index,
        "text": text,
        "logprobs": _logprobs_body(logprobs, bool(asked.return_tokens_as_token_ids))
        if asked.logprobs is not None
        else None,
        "finish_reason": reason,
        "stop_reason": None if finish is None else finish.stop_reason,
    }
    if asked.return_token_ids:
        body["token_ids"] = list(token_ids)
        if prompt is not None:
            body["prompt_token_ids"] = list(prompt)
    return body


async def _echoed(
    generation: Generation, body: schema.CompletionRequest, prompt: int
) -> CompletionLogprobs | None:
    """Return the log-probabilities of an echoed prompt; None: the client did not ask for them."""
    if not body.echo or body.logprobs is None:
        return None
    as_ids = bool(body.return_tokens_as_token_ids)
    return await echoed_logprobs(
        generation, body.logprobs, prompt, lambda entries: _logprobs_body(entries, as_ids)
    )


def _add_echoed(choice: TextChoiceBody, echoed: CompletionLogprobs | None) -> None:
    """Put the log-probabilities of an echoed prompt in front of the text's own."""
    found = choice["logprobs"]
    if echoed is None or found is None:
        return
    choice["logprobs"] = {
        "tokens": echoed["tokens"] + found["tokens"],
        "token_logprobs": echoed["token_logprobs"] + found["token_logprobs"],
        "top_logprobs": echoed["top_logprobs"] + found["top_logprobs"],
        "text_offset": echoed["text_offset"] + found["text_offset"],
    }


async def chunks(
    generation: Generation, body: schema.CompletionRequest, fingerprint: str
) -> AsyncGenerator[bytes, None]:
    """Yield server-sent events: text as it comes, each choice's finish reason; usage last, if
    requested."""
    options = body.stream_options
    include_usage = bool(options and options.include_usage)
    continuous = include_usage and bool(options and options.continuous_usage_stats)
    n = body.n or 1
    begun: set[int] = set()
    fold = Fold()
    async for event in generation:
        if isinstance(event, Usage):
            if include_usage:
                yield sse.event({**_frame(generation, body, fingerprint, []), "usage": usage_body(event)})
            continue
        shown = fold.add(event)
        if shown is None:
            continue
        choice = _choice_body(
            shown.choice,
            shown.delta.text if isinstance(shown.delta, TextDelta) else "",
            shown.logprobs,
            shown.delta if isinstance(shown.delta, Finish) else None,
            body,
            token_ids=shown.token_ids,
            prompt=None if shown.choice in begun else generation.prompts[shown.choice // n],
        )
        if shown.choice not in begun:
            _add_echoed(choice, await _echoed(generation, body, shown.choice // n))
        begun.add(shown.choice)
        chunk = _frame(generation, body, fingerprint, [choice])
        if include_usage:
            chunk["usage"] = usage_body(generation.usage()) if continuous else None
        yield sse.event(chunk)


def _frame(
    generation: Generation,
    body: schema.CompletionRequest,
    fingerprint: str,
    choices: list[TextChoiceBody],
) -> TextCompletion:
    frame: TextCompletion = {
        "id": generation.id,
        "object": "text_completion",
        "created": generation.created_unix_s,
        "model": generation.model,
        "system_fingerprint": fingerprint or None,
        "choices": choices,
    }
    if body.timings_per_token:
        frame["timings"] = timings(generation)
    return frame


def _logprobs_body(entries: Sequence[TokenLogprob], as_ids: bool) -> CompletionLogprobs:
    return {
        "tokens": [token_name(entry.chosen, as_ids) for entry in entries],
        "token_logprobs": [entry.chosen.logprob for entry in entries],
        # OpenAI's legacy format has the chosen token among its alternatives even if it is not one
        # of the most likely.
        "top_logprobs": [
            {token_name(candidate, as_ids): candidate.logprob for candidate in (*entry.top, entry.chosen)}
            for entry in entries
        ],
        "text_offset": [entry.text_offset for entry in entries],
    }
