"""StepPlan and StepResult: all that the scheduler tells the ranks, and all that comes back.
`plan_wire` has their wire form.

A rank keeps each live sequence's tokens, block tables and sampling state. A plan therefore names
only what changed: sequences that start (or start again after preemption) with all their tokens,
blocks that were added, and per scheduled sequence how many tokens to compute. Entries carry no
token ids: prompt tokens came with `SequenceStart`, sampled ones are already on the rank. Drafts are
the exception: guesses of what comes next, which the rank checks by sampling after each of them.
"""

from dataclasses import dataclass, field

from workers.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """A sequence the ranks do not know (yet, or any more).

    Attributes:
        seq_id: number that identifies the sequence in plans; not used again within an engine's
            life.
        token_ids: prompt, then output tokens known so far.
        num_prompt_tokens: how many of them are the prompt.
        constraint: id of its automaton, which the ranks hold; None: all tokens are allowed.
        full_blocks, sliding_blocks: block tables up to the tokens found in the prefix cache;
            NULL_BLOCK where none is needed.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...] = ()
    constraint: bytes | None = None
    full_blocks: tuple[int, ...] = ()
    sliding_blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step = one forward pass. The lists `seq_ids`, `num_computed_tokens`,
    `num_scheduled_tokens` and `samples` run in parallel.

    Attributes:
        step: counts up by one; a rank refuses a gap.
        starts: sequences new to the ranks; applied first.
        drops: seq_ids whose rank state goes (finished, aborted or preempted); applied before
            `starts`.
        seq_ids: sequences computed in this step, in batch order.
        num_computed_tokens: tokens of each already in the KV cache.
        num_scheduled_tokens: tokens of each to compute now (decode: 1), its drafts included.
        samples: whether the last computed position yields a token.
        new_blocks: (index into seq_ids, full blocks to append, sliding blocks to append), only
            where there are any.
        automata: (id, encoded automaton) new to the ranks; applied before `starts`.
        dropped_automata: ids that are forgotten; applied before `automata`.
        drafts: (index into seq_ids, tokens that may follow all known ones), only where there are
            any and the entry samples. A sequence with drafts is in no further plan until the result
            is back: `num_computed_tokens` then says how many were right. KV slots of wrong ones are
            written again.
        prompt_logprobs: (index into seq_ids, first prompt position, number of positions, number of
            alternatives): log-probabilities of these prompt tokens, which follow on tokens that the
            entry computes.
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


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled.

    Attributes:
        seq_ids: in plan order, one for each `samples` that was true.
        token_ids: their tokens, one sequence after the other.
        num_tokens: how many of `token_ids` are each sequence's: the drafts that were right and the
            token after them, 1 to 1 + drafts. Empty: one each.
        logprobs: seq_id → one for each of its tokens, for the sequences that asked.
        prompt_logprobs: seq_id → those that the plan asked for, in order.
        elapsed_s: time in the runner.
        idle_s: time that the rank had nothing to do before this step's plan came.
        error: a sentence if the step failed; then nothing was sampled and the engine is dead.
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
