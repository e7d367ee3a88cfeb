"""Sampling in torch: the definition that other implementations match.

For each row, from the fp32 logits x:

1. `x += logit_bias`; then for tokens seen before, in this order: repetition (`x / r` where x > 0,
   else `x * r`; a finite x is then cut to [-1e30, 1e30]), frequency (`x -= f * output_count`),
   presence (`x -= p` if output_count > 0); then tokens that the automaton's state, allowed_bits,
   allowed_ids or forbidden_ids do not allow become -inf, except that the last two are each ignored
   for a row in which they would leave nothing.
2. Temperature 0: the token of largest x, ties by lowest id. Otherwise the weight of token i is `w_i
    = exp((x_i - max x) / temperature)`.
3. Order the tokens by x descending, ties by id ascending. Keep the ones with `w_i >= min_p`; of
   these the first top_k; of these the shortest beginning whose weights sum to at least `top_p`
   times the sum of all that step 3 kept so far, but at least one.
4. With u the row's uniform number and c_i the running sum of the kept weights in ascending order of
   ids (in float64), the token is the first with `c_i > u * c_last`.

The order of operations is vLLM's. Only exact ties differ: vLLM's `top_k` keeps all tokens equal to
the k-th.

Randomness is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2,
3", SC 2011; Random123). The key is (seed mod 2^32, seed div 2^32); the counter is (position mod
2^32, position div 2^32, 0, 0), position being the token's index among its sequence's output tokens.
Of the four 32-bit words the first, W, gives `u = (W + 0.5) / 2^32`, exact in float64 and inside (0,
1). A row's token is thus a function of its logits, parameters, seed and position, not of the batch.

Last, the places of the rows' sequences in their automata advance (`kernels.automaton.reference`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.automaton import reference as automaton_reference
from kernels.automaton.layout import AutomatonRows
from kernels.sampling.batch import AllowedBits, LogitBias, Penalties, SampleOutput, SamplingBatch, TokenIds

MAX_ELEMENTS = 1 << 24
"""Maximum number of weights held in float64 at once."""

MAX_PENALISED = 1e30
"""Maximum magnitude of a logit after the repetition penalty: extreme penalties must not make it
infinite, since weights would be NaN."""

FIRST_CANDIDATES = 256
"""Number of tokens that are sorted first to find the end of top_p; more are sorted only if these do
not reach it."""

MaskAutomaton = Callable[[Tensor, AutomatonRows], None]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Compute Philox4x32-10.

    Args:
        counter: [..., 4] int64 holding 32-bit words.
        key: [..., 2] int64 holding 32-bit words.
    Returns:
        [..., 4] int64 holding 32-bit words.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(_NUM_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def philox_words(seeds: Tensor, positions: Tensor) -> Tensor:
    """Return the four words of each (seed, output position): [n] int64, [n] int64 → [n, 4]
    int64."""
    zero = torch.zeros_like(positions)
    counter = torch.stack((positions & _WORD, (positions >> 32) & _WORD, zero, zero), dim=-1)
    return philox4x32(counter, torch.stack((seeds & _WORD, (seeds >> 32) & _WORD), dim=-1))


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Return one number in (0, 1) for each (seed, output position): [n] int64, [n] int64 → [n]
    float64."""
    return (philox_words(seeds, positions)[..., 0].double() + 0.5) / 2.0**32


def sample(logits: Tensor, batch: SamplingBatch) -> SampleOutput:
    """Sample one token for each row of logits, as the module defines it.

    Args:
        logits: [S, V] float; changed only if `SamplingBatch.overwrite_logits` allows it.
    Returns:
        See SampleOutput. Log probabilities are those of `logits` itself, before step 1. A row
        without any finite logit gets some valid id.
    Raises:
        ValueError: names the argument or field of a wrong shape, dtype or range.
    """
    check(logits, batch)
    raw = logits.float()
    token_ids = _choose(modify(raw, batch), batch)
    if batch.automaton is not None:
        automaton_reference.advance(batch.automaton, token_ids)
    if batch.logprob_rows is None:
        return SampleOutput(token_ids)
    return logprobs(raw, token_ids, batch.logprob_rows, batch.num_top_logprobs)


def check(logits: Tensor, batch: SamplingBatch) -> None:
    """Refuse arguments that `sample` cannot take.

    Raises:
        ValueError: names the argument or field.
    """
    check_logits(logits)
    batch.check(*logits.shape)


def check_logits(logits: Tensor) -> None:
    """Refuse logits that `sample` cannot read.

    Raises:
        ValueError: names the argument.
    """
    if logits.ndim != 2 or not logits.dtype.is_floating_point or logits.shape[1] == 0:
        raise ValueError(
            f"logits must be [S, V] float with V > 0, got shape {list(logits.shape)} of {logits.dtype}"
        )


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the (high, low) 32 bits of the product. It overflows int64, which keeps its low 64
    bits; the shift copies the sign, the mask drops it."""
    product = word * multiplier
    return (product >> 32) & _WORD, product & _WORD


def modify(raw: Tensor, batch: SamplingBatch, mask: MaskAutomaton = automaton_reference.mask) -> Tensor:
    """Apply step 1. Return `raw` itself if nothing changes or it may be overwritten, else a changed
    copy.

    Args:
        mask: computes `kernels.automaton.reference.mask`.
    """
    if not batch.changes_logits:
        return raw
    logits = raw.clone() if batch.keeps_logits else raw
    if batch.logit_bias is not None:
        _add_bias(logits, batch.logit_bias)
    if batch.penalties is not None:
        _penalise(logits, batch.penalties)
    if batch.automaton is not None:
        mask(logits, batch.automaton)
    if batch.allowed_bits is not None:
        _allow_bits(logits, batch.allowed_bits)
    if batch.allowed_ids is not None:
        _allow_ids(logits, batch.allowed_ids)
    if batch.forbidden_ids is not None:
        _forbid_ids(logits, batch.forbidden_ids)
    return logits


def _add_bias(logits: Tensor, bias: LogitBias) -> None:
    logits.index_put_((bias.rows, bias.token_ids), bias.values, accumulate=True)


def _penalise(logits: Tensor, penalties: Penalties) -> None:
    rows, ids = penalties.rows, penalties.token_ids
    seen = logits[rows, ids]
    repetition = penalties.repetition[rows]
    repeated = torch.where(seen > 0, seen / repetition, seen * repetition).clamp(
        -MAX_PENALISED, MAX_PENALISED
    )
    seen = torch.where(seen.isfinite(), repeated, seen)
    seen = seen - penalties.frequency[rows] * penalties.output_counts
    logits[rows, ids] = seen - penalties.presence[rows] * (penalties.output_counts > 0)


def _allow_ids(logits: Tensor, allowed: TokenIds) -> None:
    kept = logits[allowed.rows, allowed.token_ids]
    restricted = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    restricted[allowed.rows[kept > -torch.inf]] = True  # the others would have nothing left
    logits[restricted] = -torch.inf
    logits[allowed.rows, allowed.token_ids] = kept


def _allow_bits(logits: Tensor, allowed: AllowedBits) -> None:
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    bits = ((allowed.bits[:, :, None] >> shifts) & 1).bool().flatten(1)[:, : logits.shape[1]]
    mask = torch.zeros(len(allowed.rows), logits.shape[1], dtype=torch.bool, device=logits.device)
    mask[:, : bits.shape[1]] = bits
    logits[allowed.rows] = logits[allowed.rows].masked_fill(~mask, -torch.inf)


def _forbid_ids(logits: Tensor, forbidden: TokenIds) -> None:
    rows, ids = forbidden.rows, forbidden.token_ids
    kept = logits[rows, ids]
    logits[rows, ids] = -torch.inf
    nothing_left = logits.amax(-1) == -torch.inf
    logits[rows, ids] = torch.where(nothing_left[rows], kept, -torch.inf)


def _choose(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Apply steps 2 to 4 and return the tokens, [S] int64."""
    token_ids = logits.argmax(-1)
    if batch.temperature is None or batch.seeds is None or batch.output_positions is None:
        return token_ids
    random_rows = (batch.temperature > 0).nonzero()[:, 0]
    for rows in torch.split(random_rows, max(1, MAX_ELEMENTS // logits.shape[1])):
        chosen = logits[rows]
        scaled = (chosen - chosen.amax(-1, keepdim=True)) / batch.temperature[rows, None]
        weights = scaled.exp_()
        _filter(chosen, weights, rows, batch)
        sums = weights.cumsum(-1, dtype=torch.float64)
        target = uniform(batch.seeds[rows], batch.output_positions[rows])[:, None] * sums[:, -1:]
        token_ids[rows] = torch.searchsorted(sums, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return token_ids


def _filter(logits: Tensor, weights: Tensor, rows: Tensor, batch: SamplingBatch) -> None:
    """Apply step 3: set the weights of tokens that are not kept to zero. Row i of logits and
    weights [R, V] is row rows[i] of the batch."""
    vocab_size = logits.shape[1]
    if batch.min_p is not None:
        weights.masked_fill_(weights < batch.min_p[rows, None], 0)
    top_k = torch.full_like(rows, vocab_size) if batch.top_k is None else batch.top_k[rows]
    top_k = top_k.masked_fill(top_k <= 0, vocab_size).clamp(max=vocab_size)
    top_p = torch.ones(len(rows), device=rows.device) if batch.top_p is None else batch.top_p[rows]
    pending = ((top_k < vocab_size) | (top_p < 1)).nonzero()[:, 0]
    num_candidates = min(FIRST_CANDIDATES, vocab_size)
    while len(pending):
        leading = logits[pending].topk(num_candidates)
        num_kept, found = _count_kept(
            weights[pending], leading.indices, top_k[pending], top_p[pending].double()
        )
        done = pending[found]
        weights[done] = weights[done].masked_fill(
            ~_leading_mask(logits[done], leading.values[found], num_kept[found]), 0
        )
        pending = pending[~found]
        num_candidates = min(8 * num_candidates, vocab_size)


def _count_kept(weights: Tensor, candidates: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of tokens from the front of the order that top_k and top_p keep, [R] int64,
    and whether the candidates were enough to tell, [R] bool.

    Args:
        weights: [R, V].
        candidates: [R, c], the front of the order; ties may be in any order, which does not affect
            the sums, as equal logits have equal weights.
    """
    vocab_size, num_candidates = weights.shape[1], candidates.shape[1]
    sums = weights.gather(1, candidates).cumsum(-1, dtype=torch.float64)
    within = top_k <= num_candidates
    last = (top_k.clamp(max=num_candidates) - 1)[:, None]
    wanted = top_p * torch.where(within, sums.gather(1, last)[:, 0], weights.sum(-1, dtype=torch.float64))
    num_kept = ((sums < wanted[:, None]).sum(-1) + 1).minimum(top_k)
    found = within | ((top_k == vocab_size) & (sums[:, -1] >= wanted)) | (num_candidates == vocab_size)
    return torch.where(top_p < 1, num_kept, top_k), found


def _leading_mask(values: Tensor, leading: Tensor, counts: Tensor) -> Tensor:
    """Return [R, V] bool: the first counts[i] of each row of values [R, V] in descending order,
    ties by lowest id.

    Args:
        leading: [R, c], the largest values of each row, descending; c is at least every count.
    """
    threshold = leading.gather(1, counts[:, None] - 1)
    ties = values == threshold
    num_ties_kept = counts - (leading > threshold).sum(-1)
    mask = values >= threshold
    crowded = (ties.sum(-1) > num_ties_kept).nonzero()[:, 0]
    mask[crowded] &= ~ties[crowded] | (ties[crowded].cumsum(-1) <= num_ties_kept[crowded, None])
    return mask


def logprobs(logits: Tensor, token_ids: Tensor, rows: Tensor, num_top: int) -> SampleOutput:
    """Return log probabilities of the sampled tokens and of the num_top most likely ones in the
    given rows of logits."""
    wanted = logits[rows]
    normaliser = wanted.logsumexp(-1)
    chosen = wanted.gather(1, token_ids[rows, None])[:, 0] - normaliser
    top_ids = torch.empty(len(rows), 0, dtype=torch.int64, device=logits.device)
    if num_top and len(rows):
        # Logits may be broken, but the number of alternatives must be right: NaN counts as least
        # likely.
        values = wanted.masked_fill(wanted.isnan(), -torch.inf)
        mask = _leading_mask(values, values.topk(num_top).values, torch.full_like(rows, num_top))
        # ascending ids, which a stable sort keeps among ties
        top_ids = mask.nonzero()[:, 1].view(len(rows), num_top)
        top_ids = top_ids.gather(1, wanted.gather(1, top_ids).argsort(dim=-1, descending=True, stable=True))
    return SampleOutput(token_ids, chosen, top_ids, wanted.gather(1, top_ids) - normaliser[:, None])
