# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Step 1 of `kernels/sampling/reference.py` on the device: logit bias, penalties, automata, allowed
and forbidden tokens, on a copy of the logits unless they may be overwritten.

Sparse parts are applied entry by entry. Entries outside the logits, which the reference refuses,
are skipped, since looking for them would need the host. Sets of tokens become bitmasks, and one
pass over the rows that have one applies them. Sizes that change from step to step do not specialise
a kernel: each new one would be compiled while requests wait.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.automaton import device as automaton_device
from kernels.sampling.batch import AllowedBits, LogitBias, Penalties, SamplingBatch, TokenIds
from kernels.sampling.reference import MAX_PENALISED

ENTRIES = 256
"""Number of entries per program."""
CHUNK = 4096
"""Number of tokens per program in the passes over rows; a multiple of 32."""
NUM_WARPS = 8
"""Warps of the passes that apply sets: with 4 the compiler runs out of registers on Hopper."""


@triton.jit
def _entries(rows_ptr, token_ids_ptr, num_entries, num_rows, vocab_size, ENTRIES: tl.constexpr):
    """Return (index, row, token, whether it is valid) of this program's entries."""
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    row = tl.load(rows_ptr + entry, mask=entry < num_entries, other=-1)
    token = tl.load(token_ids_ptr + entry, mask=entry < num_entries, other=-1)
    return entry, row, token, (row >= 0) & (row < num_rows) & (token >= 0) & (token < vocab_size)


@triton.jit(do_not_specialize=["num_entries", "num_rows"])
def bias_kernel(
    logits_ptr, rows_ptr, token_ids_ptr, values_ptr, num_entries, num_rows, vocab_size, ENTRIES: tl.constexpr
):
    entry, row, token, valid = _entries(rows_ptr, token_ids_ptr, num_entries, num_rows, vocab_size, ENTRIES)
    value = tl.load(values_ptr + entry, mask=valid, other=0.0)
    tl.atomic_add(logits_ptr + row * vocab_size + token, value, mask=valid)


@triton.jit(do_not_specialize=["num_entries", "num_rows"])
def penalties_kernel(
    logits_ptr,
    rows_ptr,
    token_ids_ptr,
    counts_ptr,
    presence_ptr,
    frequency_ptr,
    repetition_ptr,
    num_entries,
    num_rows,
    vocab_size,
    limit,
    ENTRIES: tl.constexpr,
):
    entry, row, token, valid = _entries(rows_ptr, token_ids_ptr, num_entries, num_rows, vocab_size, ENTRIES)
    at = logits_ptr + row * vocab_size + token
    seen = tl.load(at, mask=valid, other=0.0)
    repetition = tl.load(repetition_ptr + row, mask=valid, other=1.0)
    frequency = tl.load(frequency_ptr + row, mask=valid, other=0.0)
    presence = tl.load(presence_ptr + row, mask=valid, other=0.0)
    count = tl.load(counts_ptr + entry, mask=valid, other=0)
    repeated = tl.where(seen > 0, tl.div_rn(seen, repetition), seen * repetition)
    repeated = tl.minimum(tl.maximum(repeated, -limit), limit)
    # True only for finite logits.
    seen = tl.where(seen - seen == 0, repeated, seen)
    seen = seen - frequency * count.to(tl.float32)
    tl.store(at, seen - tl.where(count > 0, presence, 0.0), mask=valid)


@triton.jit(do_not_specialize=["num_entries", "num_rows"], do_not_specialize_on_alignment=["bits_ptr"])
def mark_kernel(
    bits_ptr, rows_ptr, token_ids_ptr, num_entries, num_rows, vocab_size, num_words, ENTRIES: tl.constexpr
):
    """Set the bit of each entry, and the first bit of the word after a row's last one."""
    _, row, token, valid = _entries(rows_ptr, token_ids_ptr, num_entries, num_rows, vocab_size, ENTRIES)
    words = bits_ptr + row * (num_words + 1)
    one = tl.full((ENTRIES,), 1, tl.int32)
    tl.atomic_or(words + (token >> 5), one << (token & 31).to(tl.int32), mask=valid)
    tl.atomic_or(words + num_words, one, mask=valid)


@triton.jit
def _bit(bits_ptr, row, at, inside, num_words):
    word = tl.load(bits_ptr + row * (num_words + 1) + (at >> 5), mask=inside, other=0)
    return ((word >> (at & 31)) & 1) != 0


@triton.jit
def _has_set(bits_ptr, row, num_words):
    """Return whether the row has a set; a scalar."""
    return tl.load(bits_ptr + row * (num_words + 1) + num_words) != 0


@triton.jit(do_not_specialize_on_alignment=["allowed_ptr", "forbidden_ptr", "left_ptr"])
def look_kernel(logits_ptr, allowed_ptr, forbidden_ptr, left_ptr, vocab_size, num_words, CHUNK: tl.constexpr):
    """Add to a row's word of `left`: 1 if the allowed tokens leave any, 2 if all but the forbidden
    ones do, 4 if both sets together do."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = at < vocab_size
    restricted = False
    forbids = False
    if allowed_ptr is not None:
        restricted = _has_set(allowed_ptr, row, num_words)
    if forbidden_ptr is not None:
        forbids = _has_set(forbidden_ptr, row, num_words)
    if restricted | forbids:
        x = tl.load(logits_ptr + row * vocab_size + at, mask=inside, other=float("-inf"))  # [CHUNK]
        left = x > float("-inf")
        found = tl.zeros((CHUNK,), tl.int32)
        if allowed_ptr is not None:
            allowed = left & _bit(allowed_ptr, row, at, inside, num_words)
            found |= tl.where(allowed, 1, 0)
        if forbidden_ptr is not None:
            kept = left & (_bit(forbidden_ptr, row, at, inside, num_words) == 0)
            found |= tl.where(kept, 2, 0)
            if allowed_ptr is not None:
                found |= tl.where(kept & allowed, 4, 0)
        found = tl.reduce(found, 0, _or)
        if found != 0:
            tl.atomic_or(left_ptr + row, found)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit(do_not_specialize_on_alignment=["allowed_ptr", "forbidden_ptr", "left_ptr"])
def restrict_kernel(
    logits_ptr, allowed_ptr, forbidden_ptr, left_ptr, vocab_size, num_words, CHUNK: tl.constexpr
):
    """Apply the allowed tokens, then the forbidden ones, each if it leaves any token."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = at < vocab_size
    left = tl.load(left_ptr + row)
    restricts = (left & 1) != 0  # also says that the row has such a set
    forbids = False
    if forbidden_ptr is not None:
        forbids = _has_set(forbidden_ptr, row, num_words) & ((left & tl.where(restricts, 4, 2)) != 0)
    if restricts | forbids:
        banned = at < 0
        if allowed_ptr is not None:
            banned |= restricts & (_bit(allowed_ptr, row, at, inside, num_words) == 0)
        if forbidden_ptr is not None:
            banned |= forbids & _bit(forbidden_ptr, row, at, inside, num_words)
        tl.store(
            logits_ptr + row * vocab_size + at,
            tl.full((CHUNK,), float("-inf"), tl.float32),
            mask=banned & inside,
        )


@triton.jit(
    do_not_specialize=["num_rows", "num_bytes", "bits_stride"], do_not_specialize_on_alignment=["bits_ptr"]
)
def allow_bits_kernel(
    logits_ptr, rows_ptr, bits_ptr, num_rows, vocab_size, num_bytes, bits_stride, CHUNK: tl.constexpr
):
    mask_index = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    row = tl.load(rows_ptr + mask_index)
    byte = tl.load(bits_ptr + mask_index * bits_stride + (at >> 3), mask=(at >> 3) < num_bytes, other=0).to(
        tl.int32
    )
    banned = (at < vocab_size) & (row >= 0) & (row < num_rows) & (((byte >> (at & 7)) & 1) == 0)
    tl.store(logits_ptr + row * vocab_size + at, tl.full((CHUNK,), float("-inf"), tl.float32), mask=banned)


def modify(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Return the logits after step 1: the input itself if the batch has no part that changes them,
    or it is fp32, contiguous and may be overwritten; else a changed fp32 copy."""
    if not batch.changes_logits or logits.shape[0] == 0:
        return logits
    modified = logits
    if batch.keeps_logits or logits.dtype != torch.float32 or not logits.is_contiguous():
        modified = torch.empty(logits.shape, dtype=torch.float32, device=logits.device).copy_(logits)
    if batch.logit_bias is not None:
        _add_bias(modified, batch.logit_bias)
    if batch.penalties is not None:
        _penalise(modified, batch.penalties)
    if batch.automaton is not None:
        automaton_device.mask(modified, batch.automaton)
    if batch.allowed_bits is not None:
        _allow_bits(modified, batch.allowed_bits)
    if batch.allowed_ids is not None or batch.forbidden_ids is not None:
        _restrict(modified, batch.allowed_ids, batch.forbidden_ids)
    return modified


def _add_bias(logits: Tensor, bias: LogitBias) -> None:
    num_entries = len(bias.rows)
    if num_entries:
        bias_kernel[(triton.cdiv(num_entries, ENTRIES),)](
            logits, bias.rows, bias.token_ids, bias.values, num_entries, *logits.shape, ENTRIES=ENTRIES
        )


def _penalise(logits: Tensor, penalties: Penalties) -> None:
    num_entries = len(penalties.rows)
    if num_entries:
        penalties_kernel[(triton.cdiv(num_entries, ENTRIES),)](
            logits,
            penalties.rows,
            penalties.token_ids,
            penalties.output_counts,
            penalties.presence,
            penalties.frequency,
            penalties.repetition,
            num_entries,
            *logits.shape,
            MAX_PENALISED,
            ENTRIES=ENTRIES,
            # Product and difference are rounded one by one, as in the reference: a token's rank may
            # depend on it.
            enable_fp_fusion=False,
        )


def _allow_bits(logits: Tensor, allowed: AllowedBits) -> None:
    num_masks, num_bytes = allowed.bits.shape
    if num_masks:
        grid = (num_masks, triton.cdiv(logits.shape[1], CHUNK))
        allow_bits_kernel[grid](
            logits, allowed.rows, allowed.bits, *logits.shape, num_bytes, num_bytes, CHUNK=CHUNK
        )


def _restrict(logits: Tensor, allowed: TokenIds | None, forbidden: TokenIds | None) -> None:
    num_rows, vocab_size = logits.shape
    num_words = triton.cdiv(vocab_size, 32)
    sets = [tokens for tokens in (allowed, forbidden) if tokens is not None]
    # For each set the rows' bitmasks, each followed by a word that tells whether the row has one;
    # after all sets, a word per row that tells which of them leave any token.
    size = num_rows * (num_words + 1)
    scratch = torch.zeros(len(sets) * size + num_rows, dtype=torch.int32, device=logits.device)
    masks = [scratch[index * size : (index + 1) * size] for index in range(len(sets))]
    left = scratch[len(sets) * size :]
    for mask, tokens in zip(masks, sets, strict=True):
        num_entries = len(tokens.rows)
        if num_entries:
            mark_kernel[(triton.cdiv(num_entries, ENTRIES),)](
                mask,
                tokens.rows,
                tokens.token_ids,
                num_entries,
                num_rows,
                vocab_size,
                num_words,
                ENTRIES=ENTRIES,
            )
    grid = (num_rows, triton.cdiv(vocab_size, CHUNK))
    allowed_mask = masks[0] if allowed is not None else None
    forbidden_mask = masks[-1] if forbidden is not None else None
    for kernel in (look_kernel, restrict_kernel):
        kernel[grid](
            logits,
            allowed_mask,
            forbidden_mask,
            left,
            vocab_size,
            num_words,
            CHUNK=CHUNK,
            num_warps=NUM_WARPS,
        )
