"""The answers of one rank in float32, in the test's own process, and a check that a server over
several ranks gives the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support.served import MAX_MODEL_LEN, MODEL_NAME, Served
from workers.engine.llm import LLM
from workers.request import SamplingParams

# Far from what the model was made to say its next token is close between many.
PROMPTS = [[300 + 7 * position + number for position in range(40)] for number in range(3)]
NUM_TOKENS = 48


@dataclass(frozen=True)
class Answer:
    """Greedy tokens and the logarithms of their probabilities."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def answers_of_one_rank(model: Path) -> list[Answer]:
    """Return one rank's answers to PROMPTS."""
    with LLM(model, dtype="float32", max_model_len=MAX_MODEL_LEN, kv_cache_bytes=64 << 20) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
        outputs = [output.outputs[0] for output in llm.generate(PROMPTS, sampling, use_tqdm=False)]
    return [
        Answer(output.token_ids, tuple(entry.logprob for entry in output.logprobs or ()))
        for output in outputs
    ]


def check_answers(served: Served, expected: list[Answer], headers: Mapping[str, str] | None = None) -> None:
    """Check that the server answers PROMPTS with the same tokens and, within 1e-4, the same
    log-probabilities: fp32 sums in another order."""
    body = completion(PROMPTS, logprobs=0, return_token_ids=True)
    response = httpx.post(
        f"{served.url}/v1/completions", json=body, headers=headers, timeout=120, trust_env=False
    )
    choices = response.json()["choices"]
    assert [tuple(choice["token_ids"]) for choice in choices] == [answer.token_ids for answer in expected]
    for choice, answer in zip(choices, expected, strict=True):
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(answer.logprobs, abs=1e-4)


def completion(prompt: list[int] | list[list[int]], **fields: object) -> dict[str, object]:
    """Return the body of a request for a greedy completion."""
    return {
        "model": MODEL_NAME,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
    } | fields
