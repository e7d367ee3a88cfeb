"""Log-probabilities of prompt tokens in answers: vLLM's `prompt_logprobs`, and in completions
OpenAI's `echo` with `logprobs`."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from cluster.events import TokenLogprob
from cluster.frontend.answers import CompletionLogprobs, PromptLogprob, PromptLogprobs
from cluster.generation import Generation

T = TypeVar("T")

_INLINE = 4096
"""Number of log-probabilities that are converted in the event loop; more in a thread."""


async def prompt_logprobs(
    generation: Generation, asked: int | None, prompt: int = 0
) -> PromptLogprobs | None:
    """Return an entry for each token of a prompt, by token id; None for the first, which follows
    nothing.

    Args:
        asked: number of alternatives; None: the client asked for none of it.
        prompt: index of the prompt.
    """
    if asked is None:
        return None
    return await _converted(generation, asked, prompt, lambda: _vllm_body(generation, asked, prompt))


def _vllm_body(generation: Generation, num_top: int, prompt: int) -> PromptLogprobs:
    body: PromptLogprobs = [None]
    for entry in generation.prompt_logprobs(prompt):
        ranks = {candidate.token_id: rank for rank, candidate in enumerate(entry.top, start=1)}
        # The token itself comes first, as in vLLM, and once.
        shown: dict[str, PromptLogprob] = {}
        for candidate in (entry.chosen, *entry.top[:num_top]):
            shown.setdefault(
                str(candidate.token_id),
                {
                    "logprob": candidate.logprob,
                    "rank": ranks.get(candidate.token_id),
                    "decoded_token": candidate.text,
                },
            )
        body.append(shown)
    return body


async def echoed_logprobs(
    generation: Generation,
    num_top: int,
    prompt: int,
    as_body: Callable[[list[TokenLogprob]], CompletionLogprobs],
) -> CompletionLogprobs:
    """Return those of an echoed prompt, in the form of the text's own; null for its first token.

    Args:
        as_body: converts those of the text.
    """

    def body() -> CompletionLogprobs:
        entries = [
            TokenLogprob(entry.chosen, entry.text_offset, entry.top[:num_top])
            for entry in generation.prompt_logprobs(prompt, with_first=True)
        ]
        found = as_body(entries)
        found["token_logprobs"][0] = found["top_logprobs"][0] = None
        return found

    return await _converted(generation, num_top, prompt, body)


async def _converted(generation: Generation, num_top: int, prompt: int, convert: Callable[[], T]) -> T:
    if len(generation.prompts[prompt]) * (1 + num_top) <= _INLINE:
        return convert()
    return await asyncio.to_thread(convert)
