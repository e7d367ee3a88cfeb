"""The same answer every way, through the whole engine on real weights in float32: alone or in a
crowd, whole or in chunks, from the cache or not, preempted or not, resumed or not; greedy and with
seeds.

The engine's steps are checked against `logits`, which computes each sequence whole and alone;
`logits` is checked against transformers in the model's tests.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kernels.sampling import SamplingBatch, sample
from tests.support.tiny_model import TINY_BLOCK_BYTES, write_tiny_checkpoint
from workers.constraint.automaton import AutomatonState, TokenAutomaton
from workers.constraint.codec import Constraint
from workers.engine.llm import LLM
from workers.engine.stream import ThreadReader
from workers.request import EngineOutput, EngineRequest, SamplingParams

Tokens = tuple[int, ...]

NUM_TOKENS = 18
_draw = random.Random(7)
SHARED: Tokens = tuple(_draw.randrange(200) for _ in range(70))
# Lengths on both sides of blocks (16), the window (24) and the chunk size below; some share a
# prefix.
PROMPTS: list[Tokens] = [
    tuple(_draw.randrange(200) for _ in range(length)) for length in (1, 15, 16, 17, 25, 100)
]
PROMPTS += [SHARED, (*SHARED, 1, 2, 3), (*SHARED[:40], 9), SHARED[:64], SHARED + SHARED]
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, seed=0, ignore_eos=True, logprobs=2)
SEEDED = SamplingParams(
    max_tokens=NUM_TOKENS, temperature=1.5, top_p=0.95, top_k=60, seed=2**64 - 3, ignore_eos=True
)
SAMPLINGS = {"greedy": GREEDY, "seeded": SEEDED}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(llm: LLM, requests: Sequence[EngineRequest]) -> list[EngineOutput]:
    """Run all requests at once; return each stream's outputs joined."""
    reader = ThreadReader()
    prepared = [
        None if request.constraint is None else llm.engine.prepare(request.constraint).result(60)
        for request in requests
    ]
    streams = [
        llm.engine.submit(request, reader, ready) for request, ready in zip(requests, prepared, strict=True)
    ]
    tokens: dict[int, list[int]] = {stream.seq_id: [] for stream in streams}
    last: dict[int, EngineOutput] = {}
    for stream, output in reader.read(streams):
        tokens[stream.seq_id] += output.token_ids
        last[stream.seq_id] = output
    return [replace(last[stream.seq_id], token_ids=tuple(tokens[stream.seq_id])) for stream in streams]


def requests_for(sampling: SamplingParams) -> list[EngineRequest]:
    return [EngineRequest(str(index), prompt, sampling) for index, prompt in enumerate(PROMPTS)]


def metric(llm: LLM, name: str) -> float:
    value = llm.engine.metrics.registry.get_sample_value(f"cantata_engine_{name}")
    assert value is not None
    return value


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> dict[str, list[Tokens]]:
    """Return the answers to one request at a time, whole prefill, no cache: all others must equal
    them."""
    with LLM(
        checkpoint, dtype="float32", max_num_seqs=1, prefix_caching=False, kv_cache_bytes=4 << 20
    ) as llm:
        return {
            name: [run(llm, [request])[0].token_ids for request in requests_for(sampling)]
            for name, sampling in SAMPLINGS.items()
        }


def test_greedy_tokens_are_the_argmax_of_a_whole_forward(
    checkpoint: Path, alone: dict[str, list[Tokens]]
) -> None:
    with LLM(checkpoint, dtype="float32", kv_cache_bytes=4 << 20) as llm:
        for prompt, output in zip(PROMPTS, alone["greedy"], strict=True):
            logits = llm.logits(prompt + output[:-1])[len(prompt) - 1 :]
            # The engine's own rounding may decide exact near-ties only: the chosen logit is the
            # largest but for 1e-4 of the range.
            gap = logits.amax(-1) - logits.gather(1, torch.tensor(output)[:, None])[:, 0]
            assert gap.max() <= 1e-4 * logits.abs().max()


def test_seeded_tokens_are_what_the_sampler_defines_for_seed_and_position(
    checkpoint: Path, alone: dict[str, list[Tokens]]
) -> None:
    with LLM(checkpoint, dtype="float32", kv_cache_bytes=4 << 20) as llm:
        for prompt, output in zip(PROMPTS, alone["seeded"], strict=True):
            logits = llm.logits(prompt + output[:-1])[len(prompt) - 1 :]
            batch = SamplingBatch(
                temperature=torch.full((NUM_TOKENS,), SEEDED.temperature),
                seeds=torch.full((NUM_TOKENS,), -3),  # the signed number with the bits of 2**64 - 3
                output_positions=torch.arange(NUM_TOKENS),
                top_k=torch.full((NUM_TOKENS,), SEEDED.top_k),
                top_p=torch.full((NUM_TOKENS,), SEEDED.top_p),
            )
            assert tuple(sample(logits, batch).token_ids.tolist()) == output


def test_the_answers_are_not_all_alike(alone: dict[str, list[Tokens]]) -> None:
    """Guards the tests below: a model with one answer to everything would pass them all."""
    for outputs in alone.values():
        assert len(set(outputs)) == len(outputs)
        assert sum(len(set(output)) > 5 for output in outputs) > len(outputs) // 2
    assert alone["greedy"] != alone["seeded"]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_in_a_batch_as_alone(checkpoint: Path, alone: dict[str, list[Tokens]], name: str) -> None:
    with LLM(checkpoint, dtype="float32", prefix_caching=False, kv_cache_bytes=8 << 20) as llm:
        outputs = run(llm, requests_for(SAMPLINGS[name]))
        assert metric(llm, "step_sequences_sum") / metric(llm, "step_sequences_count") > 6, (
            "they ran together"
        )
    assert [output.token_ids for output in outputs] == alone[name]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_with_other_samplings_in_the_batch(
    checkpoint: Path, alone: dict[str, list[Tokens]], name: str
) -> None:
    others = [
        SamplingParams(max_tokens=9, temperature=2.0, seed=1, repetition_penalty=1.3, logprobs=5),
        SamplingParams(max_tokens=40, temperature=0, seed=1, frequency_penalty=1.0, logit_bias=((3, 5.0),)),
        SamplingParams(max_tokens=5, min_p=0.1, seed=3, min_tokens=5, stop_token_ids=(4, 5)),
    ]
    with LLM(checkpoint, dtype="float32", kv_cache_bytes=8 << 20) as llm:
        crowd = [
            EngineRequest(f"other {index}", (index, 2, 3), sampling)
            for index, sampling in enumerate(others * 3)
        ]
        outputs = run(
            llm,
            [
                request
                for pair in zip(crowd * 2, requests_for(SAMPLINGS[name]), strict=False)
                for request in pair
            ],
        )
    assert [output.token_ids for output in outputs[1::2]] == alone[name]


@pytest.mark.parametrize(("name", "chunk"), [("greedy", 33), ("seeded", 7)])
def test_in_chunks_as_whole(checkpoint: Path, alone: dict[str, list[Tokens]], name: str, chunk: int) -> None:
    with LLM(
        checkpoint,
        dtype="float32",
        max_num_batched_tokens=chunk,
        prefix_caching=False,
        kv_cache_bytes=8 << 20,
    ) as llm:
        outputs = run(llm, requests_for(SAMPLINGS[name]))
        assert metric(llm, "step_tokens_sum") / metric(llm, "step_tokens_count") <= chunk
    assert [output.token_ids for output in outputs] == alone[name]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_from_the_prefix_cache_as_computed(
    checkpoint: Path, alone: dict[str, list[Tokens]], name: str
) -> None:
    with LLM(checkpoint, dtype="float32", kv_cache_bytes=8 << 20) as llm:
        first = run(llm, requests_for(SAMPLINGS[name]))
        again = run(llm, requests_for(SAMPLINGS[name]))
        # A conversation's next turn: prompt and answer, then something new. Its own answer without
        # the cache is the reference.
        turn = [
            replace(request, prompt_token_ids=request.prompt_token_ids + output.token_ids + (8, 9))
            for request, output in zip(requests_for(SAMPLINGS[name]), first, strict=True)
        ]
        turn_outputs = run(llm, turn)
    assert [output.token_ids for output in first] == alone[name]
    assert [output.token_ids for output in again] == alone[name]
    for prompt, output in zip(PROMPTS, again, strict=True):
        assert output.num_cached_tokens == (len(prompt) - 1) // 16 * 16
    with LLM(
        checkpoint, dtype="float32", max_num_seqs=1, prefix_caching=False, kv_cache_bytes=4 << 20
    ) as llm:
        fresh = run(llm, turn)
    assert [output.token_ids for output in turn_outputs] == [output.token_ids for output in fresh]
    assert all(
        output.num_cached_tokens > len(prompt) // 16 * 16 - 16
        for prompt, output in zip(PROMPTS, turn_outputs, strict=True)
    )
    assert {output.num_cached_tokens for output in fresh} == {0}


@pytest.mark.parametrize(("name", "prefix_caching"), [("greedy", False), ("seeded", True), ("greedy", True)])
def test_preempted_as_not(
    checkpoint: Path, alone: dict[str, list[Tokens]], name: str, prefix_caching: bool
) -> None:
    with LLM(
        checkpoint, dtype="float32", max_model_len=200, prefix_caching=prefix_caching,
        kv_cache_bytes=40 * TINY_BLOCK_BYTES,
        max_num_batched_tokens=64,
    ) as llm:  # fmt: skip
        outputs = run(llm, requests_for(SAMPLINGS[name]))
        assert metric(llm, "preemptions_total") > 0, "the pool was meant to be too small"
    assert [output.token_ids for output in outputs] == alone[name]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_resumed_as_not(checkpoint: Path, alone: dict[str, list[Tokens]], name: str) -> None:
    with LLM(checkpoint, dtype="float32", kv_cache_bytes=8 << 20) as llm:
        cuts = [index * 5 % (NUM_TOKENS + 1) for index in range(len(PROMPTS))]
        assert {0, NUM_TOKENS} & set(cuts)
        resumed = [
            replace(request, output_token_ids=tokens[:cut])
            for request, tokens, cut in zip(requests_for(SAMPLINGS[name]), alone[name], cuts, strict=True)
        ]
        outputs = run(llm, resumed)
    assert [
        tokens[:cut] + output.token_ids
        for tokens, cut, output in zip(alone[name], cuts, outputs, strict=True)
    ] == alone[name]


def test_penalties_bias_and_constraints_survive_preemption_and_resumption(checkpoint: Path) -> None:
    odd, even = tuple(range(1, 210, 2)), tuple(range(0, 210, 2))
    alternating = TokenAutomaton(
        (
            AutomatonState(allowed=odd, transitions=tuple((token, 1) for token in odd)),
            AutomatonState(forbidden=odd, transitions=tuple((token, 0) for token in even)),
        )
    )
    sampling = SamplingParams(
        max_tokens=30, temperature=1.2, seed=11, presence_penalty=0.7, frequency_penalty=0.4,
        repetition_penalty=1.2, ignore_eos=True,
        logit_bias=((6, 3.0), (7, 3.0)),
    )  # fmt: skip
    requests = [
        EngineRequest(str(index), prompt, sampling, constraint=Constraint.of(alternating))
        for index, prompt in enumerate(PROMPTS)
    ]
    with LLM(
        checkpoint, dtype="float32", max_num_seqs=1, prefix_caching=False, kv_cache_bytes=4 << 20
    ) as llm:
        expected = [run(llm, [request])[0].token_ids for request in requests]
        for tokens in expected:
            assert [token % 2 for token in tokens] == [1, 0] * 15
    with LLM(checkpoint, dtype="float32", max_model_len=200, kv_cache_bytes=40 * TINY_BLOCK_BYTES) as llm:
        assert [output.token_ids for output in run(llm, requests)] == expected
        assert metric(llm, "preemptions_total") > 0
        resumed = [
            replace(request, output_token_ids=tokens[:13])
            for request, tokens in zip(requests, expected, strict=True)
        ]
        assert [output.token_ids for output in run(llm, resumed)] == [tokens[13:] for tokens in expected]


def test_bad_words_and_allowed_tokens_survive_preemption_and_resumption(checkpoint: Path) -> None:
    allowed = tuple(range(0, 200, 9))
    sampling = SamplingParams(
        max_tokens=30, temperature=2.0, seed=11, ignore_eos=True, allowed_token_ids=allowed,
    )  # fmt: skip
    requests = [EngineRequest(str(index), prompt, sampling) for index, prompt in enumerate(PROMPTS)]

    def pairs(outputs: Sequence[Tokens]) -> set[Tokens]:
        return {pair for tokens in outputs for pair in pairwise(tokens)}

    with LLM(
        checkpoint, dtype="float32", max_num_seqs=1, prefix_caching=False, kv_cache_bytes=4 << 20
    ) as llm:
        free = [run(llm, [request])[0].token_ids for request in requests]
        assert {token for tokens in free for token in tokens} <= set(allowed)
        # What the model likes to write, so that it has to be kept from it.
        bad = ((free[0][0],), *sorted(pairs(free))[:100:2])
        requests = [
            replace(request, sampling=replace(sampling, bad_words_token_ids=bad)) for request in requests
        ]
        expected = [run(llm, [request])[0].token_ids for request in requests]
    assert expected != free
    assert {token for tokens in expected for token in tokens} <= set(allowed) - {free[0][0]}
    assert pairs(expected) & set(bad) == set()
    with LLM(checkpoint, dtype="float32", max_model_len=200, kv_cache_bytes=40 * TINY_BLOCK_BYTES) as llm:
        assert [output.token_ids for output in run(llm, requests)] == expected
        assert metric(llm, "preemptions_total") > 0
        resumed = [
            replace(request, output_token_ids=tokens[:13])
            for request, tokens in zip(requests, expected, strict=True)
        ]
        assert [output.token_ids for output in run(llm, resumed)] == [tokens[13:] for tokens in expected]
