"""The timings of an answer, in llama.cpp's form."""

from cluster.frontend.answers import Timings
from cluster.generation import Generation


def timings(generation: Generation) -> Timings:
    """Return how long an answer has taken so far, as this gateway sees it."""
    usage = generation.usage()
    prompt_ms, predicted_ms = (1e3 * seconds for seconds in generation.times_s())
    num_prompt, num_predicted = usage.prompt_tokens - usage.cached_tokens, usage.completion_tokens
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": num_prompt,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": _ratio(prompt_ms, num_prompt),
        "prompt_per_second": _ratio(1e3 * num_prompt, prompt_ms),
        "predicted_n": num_predicted,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": _ratio(predicted_ms, num_predicted),
        "predicted_per_second": _ratio(1e3 * num_predicted, predicted_ms),
    }


def _ratio(value: float, by: float) -> float:
    return value / by if by else 0.0
