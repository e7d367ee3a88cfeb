"""The part of `benchmarks/gpu_check.py` that generates through `LLM`, as a user does: tokens per
second, and the same answers from a graph, eagerly, in a batch, one by one and beside another
engine."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu_attempts import Attempts
from benchmarks.gpu_parts import DTYPE, ChosenModel, Options
from workers.config import ModelConfig, SchedulerConfig
from workers.model.make_checkpoint import plan_checkpoint
from workers.rank.memory_profile import run_largest_step, warm_up
from workers.request import SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from workers.engine.llm import LLM, CompletionOutput

NUM_PROMPTS = 16
PRESETS = {"cuda": "20b", "cpu": "tiny"}
TOLERANCE = 0.25
"""Nats by which a token's log probability may differ between two ways to compute it in bf16, which
add up in another order and, where two experts are all but equally good, choose the other one. Three
times the difference seen between bf16 and fp32 on a CPU (`small` with BRANCH_EXPONENT: median 0.01,
at most 0.08)."""
BRANCH_EXPONENT = -3
"""Exponent of random weights: with 0, bf16 and fp32 differ by 0.5 nats in the median, and no
tolerance separates rounding from an error."""
_ALTERNATIVES = 20
_MAX_MODEL_LEN = 1024
_KV_CACHE_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}

Step = tuple[int, TokenLogprobs]
"""A token, and the log probabilities from which it was chosen."""
Answer = Sequence[Step]


@dataclass(frozen=True, slots=True)
class Agreement:
    """The agreement of two sets of greedy answers.

    Attributes:
        same: sequences with the same tokens.
        near_ties: sequences that part where the first answer holds both tokens for equally likely,
            to TOLERANCE. What follows has another past and is not compared.
        others: sequences that part elsewhere, or whose log probabilities differ by more than
            TOLERANCE.
        worst: largest difference of a token's log probability before the sequences part, in nats.
    """

    sequences: int
    same: int
    near_ties: int
    others: int
    worst: float


def compare(expected: Sequence[Answer], actual: Sequence[Answer]) -> Agreement:
    """Compare answers to the same prompts."""
    same = near_ties = others = 0
    worst = 0.0
    for left, right in zip(expected, actual, strict=True):
        parts, differences = _compare(left, right)
        worst = max([worst, *differences])
        if parts > TOLERANCE or any(difference > TOLERANCE for difference in differences):
            others += 1
        elif parts > 0:
            near_ties += 1
        else:
            same += 1
    return Agreement(len(expected), same, near_ties, others, worst)


def _compare(expected: Answer, actual: Answer) -> tuple[float, list[float]]:
    """Return (by how much the first answer prefers its own token to the other's where they part, 0
    where they do not; the differences of log probabilities before that)."""
    differences: list[float] = []
    for (token, chosen), (other, seen) in zip(expected, actual, strict=True):
        if token != other:
            return max(chosen.logprob - dict(chosen.top).get(other, float("-inf")), 1e-9), differences
        differences.append(abs(chosen.logprob - seen.logprob))
    return 0.0, differences


def measure_llm(options: Options, attempts: Attempts) -> None:
    """Measure three engines on the same weights: an eager one, one with graphs, and a second one
    with graphs that is closed beside it."""
    on_gpu = options.device.type == "cuda"
    preset = options.preset or (None if options.model else PRESETS[options.device.type])
    chosen = ChosenModel(
        replace(options, preset=preset, batch_sizes=(NUM_PROMPTS,), contexts=(_MAX_MODEL_LEN,)),
        branch_exponent=BRANCH_EXPONENT,
    )
    config = chosen.model.config
    result = attempts.begin(
        chosen.about | {"tolerance": TOLERANCE, "prompts": NUM_PROMPTS}, lists=("ways", "agreements")
    )
    prompts = _prompts(config)
    # With 20 alternatives each, which say by how much two answers differ; timed without them.
    asked = SamplingParams(
        temperature=0,
        max_tokens=options.steps,
        ignore_eos=True,
        logprobs=min(_ALTERNATIVES, config.vocab_size),
    )
    graphs = "graphs" if on_gpu else "recorded steps"
    answers: dict[str, list[Answer]] = {}

    def answer(name: str, llm: "LLM", *, one_by_one: bool = False) -> None:
        batches = [[prompt] for prompt in prompts] if one_by_one else [prompts]
        outputs = [output for batch in batches for output in llm.generate(batch, asked, use_tqdm=False)]
        answers[name] = [_answer(output.outputs[0]) for output in outputs]

    def measure(way: str, llm: "LLM", num_prompts: int) -> None:
        started = time.perf_counter()
        outputs = llm.generate(prompts[:num_prompts], replace(asked, logprobs=None), use_tqdm=False)
        took = time.perf_counter() - started
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        rate = num_tokens / took
        result["ways"].append(
            {
                "way": way,
                "sequences": num_prompts,
                "tokens": num_tokens,
                "seconds": took,
                "tokens_per_s": rate,
            }
        )
        print(f"llm, {way}, {num_prompts} sequences: {rate:.0f} tokens per second", flush=True)

    def agree(name: str, expected: str, actual: str) -> None:
        found = compare(answers[expected], answers[actual])
        result["agreements"].append({"what": name} | asdict(found))
        assert not found.others, (
            f"{found.others} of {found.sequences} sequences differ by more than {TOLERANCE} nats"
        )

    def both_sizes(way: str, llm: "LLM") -> None:
        answer(way, llm)
        for num_prompts in (1, NUM_PROMPTS):
            measure(way, llm, num_prompts)

    def eager() -> None:
        with new(enforce_eager=True) as llm:
            both_sizes("eager", llm)

    def with_graphs() -> None:
        with new(enforce_eager=False) as llm:
            both_sizes(graphs, llm)
            if "eager" in answers:
                attempts.run(f"{graphs} = eager", partial(agree, f"{graphs} = eager", "eager", graphs))
            answer("one by one", llm, one_by_one=True)
            attempts.run("batch = one by one", partial(agree, "batch = one by one", "one by one", graphs))
            attempts.run("a second engine, closed", partial(beside, llm))

    def beside(llm: "LLM") -> None:
        with new(enforce_eager=False) as second:
            answer("the second engine", second)
        if on_gpu:
            torch.cuda.empty_cache()
        answer("afterwards", llm)
        agree("a second engine = the first", graphs, "the second engine")
        agree("after the second engine was closed = before", graphs, "afterwards")

    with _engines(options, chosen) as new:
        attempts.run("eager", eager)
        attempts.run(graphs, with_graphs)


def start_engine(options: Options, attempts: Attempts) -> None:
    """Launch the kernels that an engine of `measure_llm` launches before it answers, as a rank
    does; no part of a check."""
    model = ChosenModel(replace(options, batch_sizes=(NUM_PROMPTS,), contexts=(_MAX_MODEL_LEN,))).model
    limits = SchedulerConfig(NUM_PROMPTS, _MAX_MODEL_LEN), _MAX_MODEL_LEN, DTYPE
    attempts.run("warm up", lambda: warm_up(model, *limits))
    attempts.run("the largest step", lambda: run_largest_step(model, *limits))


@contextmanager
def _engines(options: Options, chosen: ChosenModel) -> "Iterator[Callable[..., LLM]]":
    """Yield a maker of engines of this model. It is in memory once, for all of them."""
    # Imported here, since the rest of a check needs fewer packages.
    from workers.engine.llm import LLM
    from workers.executor.inline import InlineExecutor

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch)
        if options.model is None:
            (name, text) = plan_checkpoint(chosen.model.config, seed=0).texts[0]
            (folder / name).write_text(text)
        yield partial(
            LLM,
            folder,
            dtype=DTYPE,
            device=str(options.device),
            max_model_len=_MAX_MODEL_LEN,
            max_num_seqs=NUM_PROMPTS,
            max_num_batched_tokens=_MAX_MODEL_LEN,
            kv_cache_bytes=_KV_CACHE_BYTES[options.device.type],
            # Its blocks were computed in other batches.
            prefix_caching=False,
            executor_factory=lambda config, model: InlineExecutor(
                config, model, loader=lambda *args, **options: chosen.model
            ),
        )


def _prompts(config: ModelConfig) -> list[list[int]]:
    """Return prompts of 1 to 400 tokens, on both sides of a sliding window; the same each time."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1 + 400 * index**2 // NUM_PROMPTS**2 for index in range(NUM_PROMPTS)]
    return [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def _answer(output: "CompletionOutput") -> Answer:
    assert output.logprobs is not None
    return list(zip(output.token_ids, output.logprobs, strict=True))
