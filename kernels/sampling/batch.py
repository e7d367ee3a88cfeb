"""Input of `sample` besides the logits: parameters for S rows over a vocabulary of V tokens.

Every part that no row of a batch uses is None and costs nothing. Parts that few rows use are
sparse: parallel vectors with one entry for each (row, token) pair. All tensors are on the device of
the logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.automaton.layout import AutomatonRows


@dataclass(frozen=True, slots=True)
class LogitBias:
    """Values to add to the logits.

    Attributes:
        rows, token_ids: [n] int64; pairs that occur twice are added twice.
        values: [n] fp32, finite or -inf.
    """

    rows: Tensor
    token_ids: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties for tokens seen before. Rows without a penalty have no entries.

    Attributes:
        rows, token_ids: [n] int64: the distinct (row, token) pairs of a row's output tokens, and of
            its prompt tokens if its repetition penalty is not 1.
        output_counts: [n] int32, number of times that the token occurs in the row's output; 0 if it
            is only in the prompt.
        presence, frequency, repetition: [S] fp32; 0, 0 and 1 are off.
    """

    rows: Tensor
    token_ids: Tensor
    output_counts: Tensor
    presence: Tensor
    frequency: Tensor
    repetition: Tensor


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Sets of token ids, for some rows.

    Attributes:
        rows, token_ids: [n] int64, in any order; repeats are harmless.
    """

    rows: Tensor
    token_ids: Tensor


@dataclass(frozen=True, slots=True)
class AllowedBits:
    """Bitmasks of the allowed tokens, for some rows.

    Attributes:
        rows: [n] int64, distinct.
        bits: [n, num_bytes] uint8; bit i of byte b (value 1 << i) is token 8 * b + i. Tokens past
            the end are not allowed.
    """

    rows: Tensor
    bits: Tensor


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Parameters of S rows.

    Attributes:
        temperature: [S] fp32; 0 is greedy. None if every row is greedy.
        seeds: [S] int64, the bits of the unsigned 64-bit seed. Required unless temperature is None,
            as is output_positions.
        output_positions: [S] int64, index of the token to sample among the sequence's output
            tokens, from 0.
        top_k: [S] int64; 0 or less keeps all tokens.
        top_p: [S] fp32 in (0, 1].
        min_p: [S] fp32 in [0, 1].
        logit_bias, penalties, automaton, allowed_bits, allowed_ids, forbidden_ids: applied in this
            order, also to greedy rows.
        automaton: rows that may take only the tokens of their state; `sample` advances the state.
        allowed_bits: tokens that a row may take, as bitmasks.
        allowed_ids: likewise as ids; ignored for a row that would have no token left.
        forbidden_ids: tokens that a row may not take: stop tokens before min_tokens, and ends of
            bad words. Ignored for a row that would have no token left.
        logprob_rows: [L] int64, rows whose log probabilities are wanted.
        num_top_logprobs: number of alternatives reported for each of them, at most V.
        overwrite_logits: whether the logits given to `sample` may be changed. They are not if
            log probabilities are wanted, which are those of the logits as they were.
    """

    temperature: Tensor | None = None
    seeds: Tensor | None = None
    output_positions: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    logit_bias: LogitBias | None = None
    penalties: Penalties | None = None
    automaton: AutomatonRows | None = None
    allowed_ids: TokenIds | None = None
    allowed_bits: AllowedBits | None = None
    forbidden_ids: TokenIds | None = None
    logprob_rows: Tensor | None = None
    num_top_logprobs: int = 0
    overwrite_logits: bool = False

    def check(self, num_rows: int, vocab_size: int) -> None:
        """Check shapes, dtypes and the range of rows and token ids against logits [num_rows,
        vocab_size].

        Raises:
            ValueError: names the field.
        """
        self.check_shapes(num_rows, vocab_size)
        for name, part in self._index_parts():
            _check_range(f"{name}.rows", part.rows, num_rows)
            _check_range(f"{name}.token_ids", part.token_ids, vocab_size)
        if self.automaton is not None:
            self.automaton.check(num_rows)
        if self.allowed_bits is not None:
            _check_range("allowed_bits.rows", self.allowed_bits.rows, num_rows)
        if self.logprob_rows is not None:
            _check_range("logprob_rows", self.logprob_rows, num_rows)

    def check_shapes(self, num_rows: int, vocab_size: int) -> None:
        """Check everything that `check` does except ranges, whose check waits for the device.

        Raises:
            ValueError: names the field.
        """
        if self.temperature is not None:
            for name, tensor in (("seeds", self.seeds), ("output_positions", self.output_positions)):
                if tensor is None:
                    raise ValueError(f"{name} must be given when temperature is")
        vectors = (
            ("temperature", self.temperature, torch.float32),
            ("seeds", self.seeds, torch.int64),
            ("output_positions", self.output_positions, torch.int64),
            ("top_k", self.top_k, torch.int64),
            ("top_p", self.top_p, torch.float32),
            ("min_p", self.min_p, torch.float32),
        )
        for name, tensor, dtype in vectors:
            if tensor is not None:
                _check_vector(name, tensor, dtype, num_rows)
        for name, part in self._index_parts():
            _check_indices(f"{name}.rows", part.rows)
            _check_indices(f"{name}.token_ids", part.token_ids, part.rows.numel())
        if self.logit_bias is not None:
            _check_vector(
                "logit_bias.values", self.logit_bias.values, torch.float32, self.logit_bias.rows.numel()
            )
        if self.penalties is not None:
            _check_vector(
                "penalties.output_counts",
                self.penalties.output_counts,
                torch.int32,
                self.penalties.rows.numel(),
            )
            for name in ("presence", "frequency", "repetition"):
                _check_vector(f"penalties.{name}", getattr(self.penalties, name), torch.float32, num_rows)
        if self.automaton is not None:
            self.automaton.check_shapes()
        if self.allowed_bits is not None:
            _check_indices("allowed_bits.rows", self.allowed_bits.rows)
            bits, num_masks = self.allowed_bits.bits, self.allowed_bits.rows.numel()
            if bits.ndim != 2 or bits.shape[0] != num_masks or bits.dtype != torch.uint8:
                raise ValueError(
                    f"allowed_bits.bits must be [{num_masks}, n] uint8, got shape {list(bits.shape)} of "
                    f"{bits.dtype}"
                )
        if self.logprob_rows is not None:
            _check_indices("logprob_rows", self.logprob_rows)
        if not 0 <= self.num_top_logprobs <= vocab_size:
            raise ValueError(
                f"num_top_logprobs must be from 0 to the {vocab_size} tokens, got {self.num_top_logprobs}"
            )

    @property
    def changes_logits(self) -> bool:
        """True if a part changes the logits before a token is selected."""
        parts = (
            *(self.logit_bias, self.penalties, self.automaton),
            *(self.allowed_ids, self.allowed_bits, self.forbidden_ids),
        )
        return any(part is not None for part in parts)

    @property
    def keeps_logits(self) -> bool:
        """True if the logits must be what they were after sampling."""
        return not self.overwrite_logits or self.logprob_rows is not None

    def _index_parts(self) -> Iterator[tuple[str, LogitBias | Penalties | TokenIds]]:
        parts = (self.logit_bias, self.penalties, self.allowed_ids, self.forbidden_ids)
        for name, part in zip(
            ("logit_bias", "penalties", "allowed_ids", "forbidden_ids"), parts, strict=True
        ):
            if part is not None:
                yield name, part


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """The sampled tokens.

    Attributes:
        token_ids: [S] int64.
        logprobs: [L] fp32, natural logarithm of the probabilities of the sampled tokens, parallel
            to `logprob_rows`; None without logprob_rows.
        top_ids: [L, num_top_logprobs] int64, most likely first, ties by id; None without
            logprob_rows.
        top_logprobs: [L, num_top_logprobs] fp32.
    """

    token_ids: Tensor
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


def _check_vector(name: str, tensor: Tensor, dtype: torch.dtype, length: int) -> None:
    if tuple(tensor.shape) != (length,) or tensor.dtype != dtype:
        raise ValueError(
            f"{name} must be [{length}] {dtype}, got shape {list(tensor.shape)} of {tensor.dtype}"
        )


def _check_indices(name: str, tensor: Tensor, length: int | None = None) -> None:
    wanted = tensor.shape[0] if length is None and tensor.ndim == 1 else length
    if tensor.ndim != 1 or tensor.shape[0] != wanted or tensor.dtype != torch.int64:
        raise ValueError(
            f"{name} must be [{'n' if wanted is None else wanted}] int64, got shape {list(tensor.shape)} of "
            f"{tensor.dtype}"
        )


def _check_range(name: str, tensor: Tensor, bound: int) -> None:
    if tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < bound:
        raise ValueError(
            f"{name} must be from 0 to {bound - 1}, found {int(tensor.min())} to {int(tensor.max())}"
        )
