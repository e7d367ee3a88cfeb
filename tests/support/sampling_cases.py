"""Sampling batches that use every parameter at once, for the comparison of implementations."""

import math
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from kernels.automaton.layout import NO_STATE, UNLIMITED, AutomatonRows, StateLists, pack
from kernels.sampling import (
    AllowedBits,
    LogitBias,
    Penalties,
    SampleOutput,
    SamplingBatch,
    TokenIds,
    philox_words,
)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def random_logits(rows: int, vocab: int, seed: int = 0, levels: int = 0) -> Tensor:
    """Return normal logits; `levels`: rounded to this many distinct values, which makes ties."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2
    return (logits * levels / 8).round() * 8 / levels if levels else logits


def random_batch(
    rows: int,
    vocab: int,
    seed: int = 0,
    parts: str = "k p m bias penalties automaton allowed bits forbidden logprobs",
) -> SamplingBatch:
    """Return a batch in which rows differ in every parameter, with the named parts; every third row
    is greedy."""
    generator = torch.Generator().manual_seed(seed)

    def uniform_in(low: float, high: float) -> Tensor:
        return torch.rand(rows, generator=generator) * (high - low) + low

    def pairs(count: int) -> tuple[Tensor, Tensor]:
        flat = torch.randperm(rows * vocab, generator=generator)[:count]
        return flat // vocab, flat % vocab

    has = set(parts.split())
    temperature = uniform_in(0.3, 2)
    temperature[2::3] = 0
    some = min(5 * rows, rows * vocab)
    # Half of the tokens of the first row, and one of the last: others are not restricted. Token 0
    # is always among them.
    allowed_tokens = torch.cat((ints(0), torch.randperm(vocab, generator=generator)[: vocab // 2]))
    allowed_rows = torch.cat((torch.zeros_like(allowed_tokens), ints(rows - 1)))
    masked_rows = torch.randperm(rows, generator=generator)[: (rows + 1) // 2]
    bits = torch.randint(
        0, 256, (len(masked_rows), max(-(-vocab // 8) - 1, 1)), generator=generator, dtype=torch.uint8
    )
    bits[:, 0] |= 1
    forbidden = pairs(some)
    return SamplingBatch(
        temperature,
        torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        torch.randint(0, 10_000, (rows,), generator=generator),
        top_k=torch.randint(-1, vocab + 2, (rows,), generator=generator) if "k" in has else None,
        top_p=uniform_in(0.3, 1.3).clamp(max=1) if "p" in has else None,
        min_p=uniform_in(-0.1, 0.2).clamp(min=0) if "m" in has else None,
        logit_bias=LogitBias(*pairs(some), torch.randn(some, generator=generator) * 5)
        if "bias" in has
        else None,
        penalties=Penalties(
            *pairs(some),
            torch.randint(0, 4, (some,), generator=generator, dtype=torch.int32),
            uniform_in(-2, 2),
            uniform_in(-2, 2),
            uniform_in(0.5, 2),
        )
        if "penalties" in has
        else None,
        automaton=random_automaton(rows, vocab, generator) if "automaton" in has else None,
        allowed_ids=TokenIds(allowed_rows, torch.cat((allowed_tokens, allowed_tokens[:1])))
        if "allowed" in has
        else None,
        allowed_bits=AllowedBits(masked_rows, bits) if "bits" in has else None,
        # Every token of the last row: ignored there.
        forbidden_ids=TokenIds(
            torch.cat((forbidden[0], torch.full((vocab,), rows - 1))),
            torch.cat((forbidden[1], torch.arange(vocab))),
        )
        if "forbidden" in has
        else None,
        logprob_rows=torch.randperm(rows, generator=generator)[: max(rows - 1, 1)]
        if "logprobs" in has
        else None,
        num_top_logprobs=min(3, vocab) if "logprobs" in has else 0,
    )


def random_automaton(rows: int, vocab: int, generator: torch.Generator) -> AutomatonRows:
    """Return all rows but the second in random states of one automaton, each of which allows token
    0."""
    num_states = 6

    def some(count: int) -> list[int]:
        return torch.randint(1, max(vocab, 2), (count,), generator=generator).tolist()

    tokens = [some(vocab // 4 * (state % 3)) for state in range(num_states)]
    words = pack(
        StateLists(
            forbids=[state % 2 == 0 for state in range(num_states)],
            tokens=[ids if state % 2 == 0 else [0, *ids] for state, ids in enumerate(tokens)],
            next_tokens=[[0, *some(state)] for state in range(num_states)],
            next_states=[list(range(state + 1)) for state in range(num_states)],
            counted=[state % 2 == 1 for state in range(num_states)],
            overflow=[NO_STATE] * num_states,
        )
    )
    at = [row for row in range(rows) if row != 1]
    state = torch.randint(0, num_states, (len(at),), generator=generator)
    columns = [(row, row, 0, int(state[i]), 5, 9, UNLIMITED, UNLIMITED, 0, -1) for i, row in enumerate(at)]
    return AutomatonRows(
        torch.from_numpy(words),
        torch.zeros(rows, 2, dtype=torch.int32),
        torch.tensor(columns, dtype=torch.int32).T.contiguous(),
    )


def assert_same(found: SampleOutput, expected: SampleOutput) -> None:
    """Compare two results. Log probabilities are sums of some hundred fp32 exponentials in another
    order: 1e-5."""
    assert torch.equal(found.token_ids, expected.token_ids)
    assert (found.logprobs is None) == (expected.logprobs is None)
    if found.logprobs is not None:
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
        assert torch.equal(found.top_ids, expected.top_ids)
        torch.testing.assert_close(found.top_logprobs, expected.top_logprobs, atol=1e-5, rtol=1e-5)


def on_device(batch: SamplingBatch, device: torch.device) -> SamplingBatch:
    """Return the same batch on the device."""

    def moved(part: object) -> object:
        if isinstance(part, Tensor):
            return part.to(device)
        if is_dataclass(part) and not isinstance(part, type):
            return type(part)(**{entry.name: moved(getattr(part, entry.name)) for entry in fields(part)})
        return part

    found = moved(batch)
    assert isinstance(found, SamplingBatch)
    return found


_HALF = -math.log(2)  # a logit whose weight beside a logit of 0, rounded to fp32, is 0.5 exactly
_NEVER = -math.inf
# (logits, top_k, top_p, min_p, first and last token kept), with thresholds that a token or a sum
# meets exactly.
_EXACT: list[tuple[list[float], int, float, float, set[int]]] = [
    ([0.0, 3.0, 3.0, 1.0, 2.0], 0, 1.0, 1.0, {1, 2}),
    ([_HALF, 0.0, _HALF, -9.0, -9.0], 0, 1.0, 0.5, {0, 2}),
    ([2.0, 2.0, 2.0, 2.0, _NEVER], 0, 0.5, 0.0, {0, 1}),
    ([_HALF, 0.0, _HALF, _NEVER, _NEVER], 0, 0.5, 0.0, {1}),
    ([_HALF, 0.0, _HALF, _NEVER, _NEVER], 0, 0.75, 0.0, {0, 1}),
    ([0.0, _HALF, _HALF, _HALF, _HALF], 3, 0.75, 0.0, {0, 1}),
]


def exact_thresholds() -> tuple[Tensor, SamplingBatch, list[set[int]]]:
    """Return logits and a batch of cases whose thresholds are met exactly, each drawn with a number
    near 0 and one near 1, and the set of the two tokens that each case yields."""
    numbers = philox_words(torch.full((2000,), 5), torch.arange(2000))[:, 0]

    def per_row(column: int) -> Tensor:
        return torch.tensor([case[column] for case in _EXACT]).repeat_interleave(2, 0)

    rows = 2 * len(_EXACT)
    batch = SamplingBatch(
        torch.ones(rows),
        torch.full((rows,), 5),
        torch.stack((numbers.argmin(), numbers.argmax())).repeat(len(_EXACT)),
        top_k=per_row(1),
        top_p=per_row(2),
        min_p=per_row(3),
    )
    return per_row(0), batch, [case[4] for case in _EXACT]


def drawn_by_case(token_ids: Tensor) -> list[set[int]]:
    """Return the tokens drawn in each case of `exact_thresholds`."""
    return [set(tokens) for tokens in token_ids.reshape(-1, 2).tolist()]
