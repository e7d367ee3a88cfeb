"""StepPlan and StepResult: everything that the scheduler sends to the ranks, and everything that
comes back. `plan_wire` has their wire form.

A rank keeps each live sequence's tokens, block tables and sampling state. A plan therefore contains
only changes: sequences that start (or start again after preemption) with all their tokens, blocks
that were added, and for each scheduled sequence the number of tokens to compute. Entries carry no
token ids: prompt tokens came with `SequenceStart`, sampled ones are already on the rank. Drafts are
the exception: guesses of the next tokens, which the rank checks by sampling after each of them.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from workers.constraint.automaton import NO_LIMITS, ConstraintLimits
from workers.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """A sequence that the ranks do not hold (not yet, or no longer).

    Attributes:
        seq_id: number that identifies the sequence in plans; never reused during the life of an
            engine.
        token_ids: prompt, then output tokens known so far.
        num_prompt_tokens: how many of them are the prompt.
        constraint: id of its automaton, which the ranks hold; None if all tokens are allowed.
        constraint_limits: the limits after which the automaton's states overflow.
        full_blocks, sliding_blocks: block tables up to the tokens found in the prefix cache;
            NULL_BLOCK where none is needed.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...] = ()
    constraint: bytes | None = None
    constraint_limits: ConstraintLimits = NO_LIMITS
    full_blocks: tuple[int, ...] = ()
    sliding_blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, which is one forward pass. The lists `seq_ids`, `num_computed_tokens`,
    `num_scheduled_tokens` and `samples` run in parallel.

    Attributes:
        step: number of the step, one more than that of the plan before; a rank refuses a gap.
        starts: sequences new to the ranks; applied first.
        drops: seq_ids whose state on the ranks is dropped (finished, aborted or preempted); applied
            before `starts`.
        seq_ids: sequences computed in this step, in batch order.
        num_computed_tokens: tokens of each already in the KV cache.
        num_scheduled_tokens: tokens of each to compute now (decode: 1), its drafts included.
        samples: whether the last computed position yields a token.
        new_blocks: (index into seq_ids, full blocks to append, sliding blocks to append), only
            where there are any.
        automata: (id, encoded automaton) new to the ranks; applied before `starts`.
        dropped_automata: ids of automata to drop; applied before `automata`.
        drafts: (index into seq_ids, tokens that may follow all known ones), only for entries that
            sample and have any. A sequence with drafts is in no further plan until the result is
            back: `num_computed_tokens` then tells how many were right. KV slots of wrong ones are
            written again.
        prompt_logprobs: (index into seq_ids, first prompt position, number of positions, number of
            alternatives): asks for the log-probabilities of these prompt tokens, each of which
            follows a token that the entry computes.
        awaits_masks: whether rank 0 gets `StepMasks` for this step, without which it must not
            sample.
    """

    step: int
    starts: tuple[SequenceStart, ...] = ()
    drops: tuple[int, ...] = ()
    seq_ids: tuple[int, ...] = ()
    num_computed_tokens: tuple[int, ...] = ()
    num_scheduled_tokens: tuple[int, ...] = ()
    samples: tuple[bool, ...] = ()
    new_blocks: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...] = ()
    automata: tuple[tuple[bytes, bytes], ...] = ()
    dropped_automata: tuple[bytes, ...] = ()
    drafts: tuple[tuple[int, tuple[int, ...]], ...] = ()
    prompt_logprobs: tuple[tuple[int, int, int, int], ...] = ()
    awaits_masks: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class StepMasks:
    """The tokens that sequences in a grammar may take in a step. They can only be computed once the
    tokens of the step before are known, so they follow the plan.

    Attributes:
        step: number of the plan, whose `awaits_masks` is true.
        rows: [n] int64, distinct, in ascending order: indices among the sampled rows, which are
            those of the entries that sample, in order, each followed by those of its drafts.
        bits: [n, num_bytes] uint8: bit i of byte b is token 8 * b + i. At least one is set.
    """

    step: int
    rows: npt.NDArray[np.int64]
    bits: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class StepResult:
    """The sampled tokens of a step.

    Attributes:
        seq_ids: in plan order, one for each true value in `samples`.
        token_ids: their tokens, one sequence after the other.
        num_tokens: number of `token_ids` of each sequence: the drafts that were right and the token
            after them, 1 to 1 + drafts. Empty if each sequence has one.
        logprobs: by seq_id, one entry for each of its tokens; only sequences that asked.
        prompt_logprobs: by seq_id, the entries that the plan asked for, in order.
        elapsed_s: time in the runner, in seconds.
        idle_s: seconds without work on the rank before this step's plan arrived.
        error: one sentence if the step failed, else None; then nothing was sampled and the engine
            is dead.
    """

    step: int
    seq_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    elapsed_s: float = 0.0
    error: str | None = None
    idle_s: float = 0.0
    num_tokens: tuple[int, ...] = ()
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
