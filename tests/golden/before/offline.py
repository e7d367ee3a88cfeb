"""`LLM`: answers with token ids, its refusals, and preemption."""

import random
from pathlib import Path

from tests.golden.before.compare import Json
from tests.golden.before.internals import CantataError, num_preemptions, restored_instruction_set
from workers.engine.llm import LLM, SamplingParams

SAMPLINGS: tuple[SamplingParams, ...] = (
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(temperature=0, max_tokens=6, logprobs=2),
    SamplingParams(seed=1, max_tokens=12),
    SamplingParams(seed=2**64 - 1, temperature=1.5, top_p=0.8, top_k=50, max_tokens=10),
    SamplingParams(seed=3, min_p=0.4, n=3, max_tokens=5),
    SamplingParams(
        seed=4, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2, max_tokens=20
    ),
    SamplingParams(
        temperature=0, logit_bias=((500, 50.0),), stop_token_ids=(500,), min_tokens=3, max_tokens=9
    ),
    SamplingParams(temperature=0, logit_bias=((2041, 90.0),), ignore_eos=True, max_tokens=4),
    SamplingParams(seed=5, logprobs=0, n=2, max_tokens=3),
    SamplingParams(seed=6, max_tokens=1),
)
WRONG: tuple[dict[str, object], ...] = (
    {"max_tokens": 0},
    {"temperature": -1.0},
    {"temperature": float("nan")},
    {"top_p": 0.0},
    {"top_k": -2},
    {"min_p": 2.0},
    {"presence_penalty": 3.0},
    {"frequency_penalty": -3.0},
    {"repetition_penalty": 0.0},
    {"logit_bias": ((2048, 1.0),)},
    {"logit_bias": ((1, float("inf")),)},
    {"seed": -1},
    {"seed": 2**64},
    {"logprobs": 21},
    {"stop_token_ids": (2048,)},
    {"min_tokens": -1},
    {"min_tokens": 17},
    {"n": 0},
    {"max_tokens": 5000},
)
_FLAGS = {"dtype": "float32", "cpu_isa": "portable", "max_model_len": 512}


def prompts() -> list[str | list[int]]:
    """Return texts and token ids, some with a shared beginning."""
    draw = random.Random(11)
    shared = [draw.randrange(2000) for _ in range(70)]
    made: list[str | list[int]] = [
        "Once upon a time",
        "<|start|>user<|message|>Hi<|end|><|start|>assistant",
        "naïve 🎉",
    ]
    made += [[draw.randrange(2000) for _ in range(length)] for length in (1, 15, 16, 17, 150)]
    return [*made, shared, [*shared, 1, 2], [*shared[:40], 9]]


def offline(folder: Path) -> Json:
    """Answers alone and together, from the cache, with too few KV blocks, and what is refused."""
    from tests.golden.before.sections import make_checkpoint

    checkpoint = make_checkpoint(folder)
    with restored_instruction_set():
        with LLM(checkpoint, kv_cache_bytes=32 << 20, **_FLAGS) as llm:
            found = {
                f"prompt {index}": _answers(llm, index, prompt) for index, prompt in enumerate(prompts())
            }
            found["refused"] = {str(fields): _refused(llm, fields) for fields in WRONG}
            found["wrong prompts"] = {
                str(prompt): _refused(llm, {}, prompt) for prompt in ([], [2048], [-1], [[1], "x"], [1, "x"])
            }
            found["together"] = _crowd(llm)
        small = len(prompts()) * 2 * 70_000
        with LLM(checkpoint, kv_cache_bytes=small, max_num_batched_tokens=48, **_FLAGS) as llm:
            found["preempted"] = _crowd(llm) | {"any preempted": num_preemptions(llm) > 0}
    different = [name for name in found["together"] if found["together"][name] != found["preempted"][name]]
    assert not different, f"answers differ after preemption: {different}"
    return found


def _answers(llm: LLM, index: int, prompt: str | list[int]) -> Json:
    return [
        _answer(answer)
        for answer in llm.generate(
            [prompt] * 4, [SAMPLINGS[(index + 3 * k) % 10] for k in range(4)], use_tqdm=False
        )
    ]


def _crowd(llm: LLM) -> dict[str, Json]:
    asked = [
        (prompt, SamplingParams(seed=index, max_tokens=40, ignore_eos=True))
        for index, prompt in enumerate(prompts())
    ]
    asked += [
        (prompt, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)) for prompt in prompts()[::2]
    ]
    answers = llm.generate(
        [prompt for prompt, _ in asked], [sampling for _, sampling in asked], use_tqdm=False
    )
    return {f"{index}": _answer(answer) for index, answer in enumerate(answers)}


def _answer(answer: object) -> Json:
    outputs = [
        {
            "text": output.text,
            "token_ids": list(output.token_ids),
            "logprobs": None
            if output.logprobs is None
            else [[entry.logprob, [list(one) for one in entry.top]] for entry in output.logprobs],
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        for output in answer.outputs  # type: ignore[attr-defined]
    ]
    return {"prompt": answer.prompt, "prompt_token_ids": list(answer.prompt_token_ids), "outputs": outputs}  # type: ignore[attr-defined]


def _refused(llm: LLM, fields: dict[str, object], prompt: object = "Once") -> str:
    try:
        llm.generate(prompt, SamplingParams(**{"seed": 1, **fields}), use_tqdm=False)  # type: ignore[arg-type]
    except (CantataError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error} ({getattr(error, 'param', None)})"
    return "answered"
