"""The sampling state of each live sequence, on rank 0: parameters by slot, and for the sequences
with a bias, penalties, allowed tokens, bad words or stop tokens before min_tokens also the state
that their next token depends on; automata are in `automata`. Builds the SamplingBatch of a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.sampling import LogitBias, Penalties, SamplingBatch, TokenIds
from workers.rank.automata import Automata
from workers.rank.bad_words import BadWords
from workers.rank.drafts import DraftRows
from workers.rank.step_inputs import Array, InputBuffers
from workers.request import SamplingParams
from workers.scheduler.plan import SequenceStart

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
_NO_PREFIXES: Mapping[int, Sequence[int]] = MappingProxyType({})


class TokenListener(Protocol):
    """A state, besides the model's, that a sequence's next token depends on. It must receive each
    token before the next one is sampled."""

    def push(self, token_id: int) -> None:
        """Add one output token."""


class SeenTokens:
    """The distinct tokens of a sequence and how often each occurs in its output, updated token by
    token."""

    def __init__(self, prompt: tuple[int, ...], output: tuple[int, ...]) -> None:
        self._index: dict[int, int] = {}
        self._token_ids = np.zeros(256, dtype=np.int64)
        self._counts = np.zeros(256, dtype=np.int32)
        for token_id in prompt:
            self._add(token_id, 0)
        for token_id in output:
            self._add(token_id, 1)

    @property
    def token_ids(self) -> Ints:
        return self._token_ids[: len(self._index)]

    @property
    def output_counts(self) -> npt.NDArray[np.int32]:
        return self._counts[: len(self._index)]

    def push(self, token_id: int) -> None:
        """Add one output token."""
        self._add(token_id, 1)

    def with_output(self, token_ids: Sequence[int]) -> "SeenTokens":
        """Return a copy with further output tokens."""
        copy = SeenTokens((), ())
        copy._index = dict(self._index)
        copy._token_ids, copy._counts = self._token_ids.copy(), self._counts.copy()
        for token_id in token_ids:
            copy.push(token_id)
        return copy

    def _add(self, token_id: int, count: int) -> None:
        index = self._index.setdefault(token_id, len(self._index))
        if index == len(self._token_ids):
            self._token_ids = np.concatenate((self._token_ids, np.zeros_like(self._token_ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._token_ids[index] = token_id
        self._counts[index] += count


@dataclass(slots=True)
class _Extras:
    """State that most sequences do not need."""

    bias_ids: Ints | None
    bias_values: Floats | None
    seen: SeenTokens | None
    allowed_ids: Ints | None
    bad_words: BadWords | None
    stop_token_ids: Ints
    min_tokens: int
    num_logprobs: int | None

    @property
    def listens(self) -> bool:
        """True if the next token depends on the output so far."""
        return self.seen is not None or (self.bad_words is not None and self.bad_words.depend_on_output)

    def push(self, token_id: int) -> None:
        """Add one output token."""
        if self.seen is not None:
            self.seen.push(token_id)
        if self.bad_words is not None:
            self.bad_words.push(token_id)

    @classmethod
    def of(cls, start: SequenceStart) -> "_Extras | None":
        sampling = start.sampling
        prompt, output = (
            start.token_ids[: start.num_prompt_tokens],
            start.token_ids[start.num_prompt_tokens :],
        )
        penalised = _penalises(sampling)
        stops = start.stop_token_ids if sampling.min_tokens > 0 else ()
        filtered = sampling.logit_bias or sampling.allowed_token_ids or sampling.bad_words_token_ids
        if not (filtered or penalised or stops or sampling.logprobs is not None):
            return None
        return cls(
            bias_ids=np.array([token_id for token_id, _ in sampling.logit_bias], dtype=np.int64)
            if sampling.logit_bias
            else None,
            bias_values=np.array([value for _, value in sampling.logit_bias], dtype=np.float32)
            if sampling.logit_bias
            else None,
            seen=SeenTokens(prompt if sampling.repetition_penalty != 1.0 else (), output)
            if penalised
            else None,
            allowed_ids=np.array(sampling.allowed_token_ids, dtype=np.int64)
            if sampling.allowed_token_ids
            else None,
            bad_words=BadWords(sampling.bad_words_token_ids, output)
            if sampling.bad_words_token_ids
            else None,
            stop_token_ids=np.array(stops, dtype=np.int64),
            min_tokens=sampling.min_tokens,
            num_logprobs=sampling.logprobs,
        )


class _Pairs:
    """(row, token id) pairs with a value each, collected row by row."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._token_ids: list[Ints] = []
        self._values: list[npt.NDArray[np.generic]] = []

    def add(self, row: int, token_ids: Ints, values: npt.NDArray[np.generic] | None = None) -> None:
        self._rows.append(row)
        self._token_ids.append(token_ids)
        if values is not None:
            self._values.append(values)

    def __bool__(self) -> bool:
        return any(len(token_ids) for token_ids in self._token_ids)

    def arrays(self) -> tuple[Ints, Ints]:
        """Return (rows, token ids)."""
        rows = np.repeat(
            np.array(self._rows, dtype=np.int64), [len(token_ids) for token_ids in self._token_ids]
        )
        return rows, np.concatenate(self._token_ids)

    def values(self) -> npt.NDArray[np.generic]:
        return np.concatenate(self._values)


@dataclass(slots=True)
class _Sparse:
    """The parts of a batch that only few rows have."""

    bias: _Pairs
    seen: _Pairs
    allowed: _Pairs
    forbidden: _Pairs
    logprob_rows: list[int] = field(default_factory=list)
    num_top_logprobs: int = 0


class SamplingState:
    """Sampling parameters and states by slot.

    Args:
        max_num_seqs: number of slots.
        device: the device that samples.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self._temperature = np.zeros(max_num_seqs, dtype=np.float32)
        self._seed = np.zeros(max_num_seqs, dtype=np.int64)
        self._top_k = np.zeros(max_num_seqs, dtype=np.int64)
        self._top_p = np.ones(max_num_seqs, dtype=np.float32)
        self._min_p = np.zeros(max_num_seqs, dtype=np.float32)
        self._presence = np.zeros(max_num_seqs, dtype=np.float32)
        self._frequency = np.zeros(max_num_seqs, dtype=np.float32)
        self._repetition = np.ones(max_num_seqs, dtype=np.float32)
        self._extras: dict[int, _Extras] = {}
        self._automata = Automata(max_num_seqs, device)

    def update_automata(self, new: Sequence[tuple[bytes, bytes]], dropped: Sequence[bytes]) -> None:
        """Drop and add automata, as listed in `StepPlan`."""
        self._automata.update(new, dropped)

    def start(self, slot: int, start: SequenceStart) -> None:
        """Add a sequence with its output so far."""
        sampling = start.sampling
        assert sampling.seed is not None, "the engine got a request without a seed"
        self._temperature[slot] = sampling.temperature
        # The same 64 bits as a signed number.
        self._seed[slot] = sampling.seed - (1 << 64) if sampling.seed >= 1 << 63 else sampling.seed
        self._top_k[slot] = max(sampling.top_k, 0)
        self._top_p[slot] = sampling.top_p
        self._min_p[slot] = sampling.min_p
        self._presence[slot] = sampling.presence_penalty
        self._frequency[slot] = sampling.frequency_penalty
        self._repetition[slot] = sampling.repetition_penalty
        self._automata.start(slot, start)
        extras = _Extras.of(start)
        if extras is not None:
            self._extras[slot] = extras

    def drop(self, slot: int) -> None:
        """Drop a sequence."""
        self._extras.pop(slot, None)
        self._automata.drop(slot)

    def logprob_rows(self, slots: Ints) -> list[tuple[int, int]]:
        """Return (row, number of alternatives) of the rows whose sequences want
        log-probabilities."""
        if not self._extras:
            return []
        extras = [(row, self._extras.get(slot)) for row, slot in enumerate(slots.tolist())]
        return [
            (row, entry.num_logprobs)
            for row, entry in extras
            if entry is not None and entry.num_logprobs is not None
        ]

    def listeners(self, slots: Ints) -> list[tuple[int, TokenListener]]:
        """Return (row, listener) of the slots that have one. The listeners stay those of the
        present sequences if a slot is reused."""
        if not self._extras:
            return []
        extras = [(row, self._extras.get(slot)) for row, slot in enumerate(slots.tolist())]
        return [(row, entry) for row, entry in extras if entry is not None and entry.listens]

    def build(
        self, slots: Ints, output_positions: Ints, inputs: InputBuffers, drafts: DraftRows | None = None
    ) -> SamplingBatch:
        """Return the batch for one row per slot, which must be sampled. The output so far has been
        pushed to `listeners`.

        Args:
            output_positions: [S] index of each slot's next token among its output tokens.
            inputs: uploads all arrays at once; the host does not wait for the device.
            drafts: the relations between the rows; None if each is a sequence of its own.
        """
        temperature, top_k, top_p, min_p = (
            self._temperature[slots],
            self._top_k[slots],
            self._top_p[slots],
            self._min_p[slots],
        )
        random = bool((temperature > 0).any())
        sparse = self._gather(slots, output_positions, _NO_PREFIXES if drafts is None else drafts.prefixes)
        parts: dict[str, tuple[Array, ...]] = {}
        if random:
            parts |= {
                "temperature": (temperature,),
                "seeds": (self._seed[slots],),
                "output_positions": (output_positions,),
            }
            filters: tuple[tuple[str, Array, bool], ...] = (
                ("top_k", top_k, bool((top_k > 0).any())),
                ("top_p", top_p, bool((top_p < 1).any())),
                ("min_p", min_p, bool((min_p > 0).any())),
            )
            parts |= {name: (values,) for name, values, used in filters if used}
        vectors = tuple(parts)
        if sparse.bias:
            parts["logit_bias"] = (*sparse.bias.arrays(), sparse.bias.values())
        if sparse.seen:
            limits = (self._presence[slots], self._frequency[slots], self._repetition[slots])
            parts["penalties"] = (*sparse.seen.arrays(), sparse.seen.values(), *limits)
        if sparse.allowed:
            parts["allowed_ids"] = sparse.allowed.arrays()
        if sparse.forbidden:
            parts["forbidden_ids"] = sparse.forbidden.arrays()
        if (rows := self._automata.rows(slots, output_positions, drafts)) is not None:
            parts["automaton"] = (rows,)
        if sparse.logprob_rows:
            parts["logprob_rows"] = (np.array(sparse.logprob_rows, dtype=np.int64),)
        tensors = _upload(parts, inputs)
        return SamplingBatch(
            **{name: tensors[name][0] for name in vectors},  # type: ignore[arg-type]
            logit_bias=LogitBias(*tensors["logit_bias"]) if "logit_bias" in tensors else None,
            penalties=Penalties(*tensors["penalties"]) if "penalties" in tensors else None,
            automaton=self._automata.on_device(tensors["automaton"][0]) if "automaton" in tensors else None,
            allowed_ids=TokenIds(*tensors["allowed_ids"]) if "allowed_ids" in tensors else None,
            forbidden_ids=TokenIds(*tensors["forbidden_ids"]) if "forbidden_ids" in tensors else None,
            logprob_rows=tensors["logprob_rows"][0] if sparse.logprob_rows else None,
            num_top_logprobs=sparse.num_top_logprobs,
            overwrite_logits=True,
        )

    def _gather(
        self, slots: Ints, output_positions: Ints, prefixes: Mapping[int, Sequence[int]]
    ) -> "_Sparse":
        """Collect the parts of the batch that few rows use."""
        sparse = _Sparse(_Pairs(), _Pairs(), _Pairs(), _Pairs())
        for row, slot in enumerate(slots.tolist()) if self._extras else ():
            extras = self._extras.get(slot)
            if extras is None:
                continue
            prefix = prefixes.get(row, ())
            if extras.bias_ids is not None:
                sparse.bias.add(row, extras.bias_ids, extras.bias_values)
            if extras.seen is not None:
                tokens = extras.seen.with_output(prefix) if prefix else extras.seen
                sparse.seen.add(row, tokens.token_ids, tokens.output_counts)
            if extras.allowed_ids is not None:
                sparse.allowed.add(row, extras.allowed_ids)
            if extras.bad_words is not None:
                sparse.forbidden.add(row, extras.bad_words.forbidden(prefix))
            if len(extras.stop_token_ids) and output_positions[row] < extras.min_tokens:
                sparse.forbidden.add(row, extras.stop_token_ids)
            if extras.num_logprobs is not None:
                sparse.logprob_rows.append(row)
                sparse.num_top_logprobs = max(sparse.num_top_logprobs, extras.num_logprobs)
        return sparse


def _upload(parts: dict[str, tuple[Array, ...]], inputs: InputBuffers) -> dict[str, list[Tensor]]:
    """Upload all arrays in one copy, without waiting for it."""
    if not parts:
        return {}
    tensors = iter(inputs.upload([array for arrays in parts.values() for array in arrays]))
    return {name: [next(tensors) for _ in arrays] for name, arrays in parts.items()}


def _penalises(sampling: SamplingParams) -> bool:
    return (
        sampling.presence_penalty != 0 or sampling.frequency_penalty != 0 or sampling.repetition_penalty != 1
    )
