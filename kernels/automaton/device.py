# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Token automata in Triton, as `kernels/automaton/reference.py` defines them. One launch masks, one
advances; nothing is read back.

A program of the mask takes CHUNK tokens of a row. It follows the row's drafts, which are few, reads
the words of its state, and finds the words of its tokens in the state's set by binary search. It
writes only to tokens that may not come: in a body, whose forbidden tokens lie close together,
almost all programs end after a few loads.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.automaton import layout
from kernels.automaton.layout import AutomatonRows, Row, State

CHUNK = 8192
"""Number of tokens per program of the mask; a multiple of 32."""
NUM_WARPS = 8

STATE_WORDS: tl.constexpr = tl.constexpr(layout.STATE_WORDS)
FLAGS: tl.constexpr = tl.constexpr(int(State.FLAGS))
OVERFLOW: tl.constexpr = tl.constexpr(int(State.OVERFLOW))
SET: tl.constexpr = tl.constexpr(int(State.SET))
SET_SIZE: tl.constexpr = tl.constexpr(int(State.SET_SIZE))
NEXT: tl.constexpr = tl.constexpr(int(State.NEXT))
NEXT_SIZE: tl.constexpr = tl.constexpr(int(State.NEXT_SIZE))
FORBIDS: tl.constexpr = tl.constexpr(layout.FORBIDS)
COUNTED: tl.constexpr = tl.constexpr(layout.COUNTED)
NO_STATE: tl.constexpr = tl.constexpr(layout.NO_STATE)
ON_DEVICE: tl.constexpr = tl.constexpr(layout.ON_DEVICE)
ROW: tl.constexpr = tl.constexpr(int(Row.ROW))
SLOT: tl.constexpr = tl.constexpr(int(Row.SLOT))
BASE: tl.constexpr = tl.constexpr(int(Row.BASE))
STATE: tl.constexpr = tl.constexpr(int(Row.STATE))
NUM_COUNTED: tl.constexpr = tl.constexpr(int(Row.NUM_COUNTED))
POSITION: tl.constexpr = tl.constexpr(int(Row.POSITION))
MAX_COUNTED: tl.constexpr = tl.constexpr(int(Row.MAX_COUNTED))
MAX_LENGTH: tl.constexpr = tl.constexpr(int(Row.MAX_LENGTH))
NUM_DRAFTS: tl.constexpr = tl.constexpr(int(Row.NUM_DRAFTS))
DRAFT: tl.constexpr = tl.constexpr(int(Row.DRAFT))


@triton.jit
def _after(automaton_ptr, state, num_counted, token, num_tokens, max_counted, max_length):
    """Return the place after one more token; scalars.

    Args:
        automaton_ptr: the automaton's first word.
    """
    state_ptr = automaton_ptr + state * STATE_WORDS
    num_counted += tl.where((tl.load(state_ptr + FLAGS) & COUNTED) != 0, 1, 0)
    next_ptr = automaton_ptr + tl.load(state_ptr + NEXT)
    size = tl.load(state_ptr + NEXT_SIZE)
    low = size * 0
    left = size
    while left > 0:  # the first transition that is not below the token lies in low .. low + left
        half = left // 2
        is_below = tl.load(next_ptr + low + half) < token
        low = tl.where(is_below, low + half + 1, low)
        left = tl.where(is_below, left - half - 1, half)
    is_found = low < size
    is_found = is_found & (tl.load(next_ptr + low, mask=is_found, other=-1) == token)
    state = tl.load(next_ptr + size + low, mask=is_found, other=state)
    overflow = tl.load(automaton_ptr + state * STATE_WORDS + OVERFLOW)
    is_full = (num_counted >= max_counted) | (num_tokens >= max_length)
    return tl.where((overflow != NO_STATE) & is_full, overflow, state), num_counted


@triton.jit
def _place(automaton_ptr, places_ptr, rows_ptr, index, num_rows):
    """Return the place at which a row's token is sampled, and the limits; scalars."""
    row_ptr = rows_ptr + index
    slot = tl.load(row_ptr + SLOT * num_rows).to(tl.int64)
    state = tl.load(row_ptr + STATE * num_rows)
    is_on_device = state == ON_DEVICE
    state = tl.load(places_ptr + 2 * slot, mask=is_on_device, other=state)
    num_counted = tl.load(row_ptr + NUM_COUNTED * num_rows)
    num_counted = tl.load(places_ptr + 2 * slot + 1, mask=is_on_device, other=num_counted)
    max_counted = tl.load(row_ptr + MAX_COUNTED * num_rows)
    max_length = tl.load(row_ptr + MAX_LENGTH * num_rows)
    num_drafts = tl.load(row_ptr + NUM_DRAFTS * num_rows)
    for nth in range(num_drafts):
        draft_ptr = row_ptr - num_drafts + nth
        token = tl.load(draft_ptr + DRAFT * num_rows)
        num_tokens = tl.load(draft_ptr + POSITION * num_rows) + 1
        state, num_counted = _after(
            automaton_ptr, state, num_counted, token, num_tokens, max_counted, max_length
        )
    return state, num_counted, max_counted, max_length


@triton.jit(do_not_specialize=["num_rows", "num_logits_rows"])
def mask_kernel(
    logits_ptr, words_ptr, places_ptr, rows_ptr, num_rows, num_logits_rows, vocab_size, CHUNK: tl.constexpr
):
    WORDS: tl.constexpr = CHUNK // 32
    index = tl.program_id(0)
    row = tl.load(rows_ptr + ROW * num_rows + index).to(tl.int64)
    automaton_ptr = words_ptr + tl.load(rows_ptr + BASE * num_rows + index).to(tl.int64)
    state, _, _, _ = _place(automaton_ptr, places_ptr, rows_ptr, index, num_rows)
    state_ptr = automaton_ptr + state * STATE_WORDS
    forbids = (tl.load(state_ptr + FLAGS) & FORBIDS) != 0
    set_ptr = automaton_ptr + tl.load(state_ptr + SET)
    size = tl.load(state_ptr + SET_SIZE)
    first = tl.program_id(1) * WORDS
    least = tl.load(set_ptr, mask=size > 0, other=0)
    greatest = tl.load(set_ptr + size - 1, mask=size > 0, other=-1)
    is_touched = (least < first + WORDS) & (greatest >= first)
    if (row >= 0) & (row < num_logits_rows) & (is_touched | (forbids == 0)):
        word = first + tl.arange(0, WORDS)  # [WORDS]
        low = tl.zeros((WORDS,), tl.int32)
        left = size
        while left > 1:  # the first word that is not below lies in low .. low + left
            half = left // 2
            low = tl.where(tl.load(set_ptr + low + half - 1) < word, low + half, low)
            left -= half
        low = tl.where(tl.load(set_ptr + low, mask=low < size, other=0) < word, low + 1, low)
        is_found = low < size
        is_found = is_found & (tl.load(set_ptr + low, mask=is_found, other=-1) == word)
        bits = tl.load(set_ptr + size + low, mask=is_found, other=0)
        banned = tl.where(forbids, bits, ~bits)
        bit = tl.arange(0, 32)
        at = word[:, None] * 32 + bit[None, :]  # [WORDS, 32]
        tl.store(
            logits_ptr + row * vocab_size + at,
            tl.full((WORDS, 32), float("-inf"), tl.float32),
            mask=(at < vocab_size) & (((banned[:, None] >> bit[None, :]) & 1) != 0),
        )


@triton.jit(do_not_specialize=["num_rows"])
def advance_kernel(words_ptr, places_ptr, rows_ptr, token_ids_ptr, num_rows):
    """Store a sequence's place, if this row's token is its newest: of the rows of a sequence, one
    program reads and writes its place."""
    index = tl.program_id(0)
    row_ptr = rows_ptr + index
    num_drafts = tl.load(row_ptr + NUM_DRAFTS * num_rows)
    token = tl.load(token_ids_ptr + tl.load(row_ptr + ROW * num_rows)).to(tl.int32)
    num_wrong = tl.where(token == tl.load(row_ptr + DRAFT * num_rows), 1, 0)  # not the last kept row
    for nth in range(num_drafts):
        draft_ptr = row_ptr - num_drafts + nth
        sampled = tl.load(token_ids_ptr + tl.load(draft_ptr + ROW * num_rows)).to(tl.int32)
        num_wrong += tl.where(sampled == tl.load(draft_ptr + DRAFT * num_rows), 0, 1)
    if num_wrong == 0:
        automaton_ptr = words_ptr + tl.load(row_ptr + BASE * num_rows).to(tl.int64)
        state, num_counted, max_counted, max_length = _place(
            automaton_ptr, places_ptr, rows_ptr, index, num_rows
        )
        num_tokens = tl.load(row_ptr + POSITION * num_rows) + 1
        state, num_counted = _after(
            automaton_ptr, state, num_counted, token, num_tokens, max_counted, max_length
        )
        slot = tl.load(row_ptr + SLOT * num_rows).to(tl.int64)
        tl.store(places_ptr + 2 * slot, state)
        tl.store(places_ptr + 2 * slot + 1, num_counted)


def mask(logits: Tensor, automaton: AutomatonRows) -> None:
    """Compute `kernels.automaton.reference.mask`. The range of rows is not checked, as that would
    wait for the device: rows outside the logits are skipped.

    Args:
        logits: [S, V] fp32, contiguous; changed.
    """
    num_rows = automaton.num_rows
    if num_rows:
        mask_kernel[(num_rows, triton.cdiv(logits.shape[1], CHUNK))](
            logits,
            automaton.words,
            automaton.places,
            automaton.rows,
            num_rows,
            *logits.shape,
            CHUNK=CHUNK,
            num_warps=NUM_WARPS,
        )


def advance(automaton: AutomatonRows, token_ids: Tensor) -> None:
    """Compute `kernels.automaton.reference.advance`; ranges are not checked."""
    num_rows = automaton.num_rows
    if num_rows:
        advance_kernel[(num_rows,)](
            automaton.words, automaton.places, automaton.rows, token_ids, num_rows, num_warps=1
        )
