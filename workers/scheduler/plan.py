"""StepPlan and StepResult: all that the scheduler tells the ranks, and all that comes back. They
cross processes as msgpack.

A rank keeps each live sequence's tokens, block tables and sampling state. A plan therefore names
only what changed: sequences that start (or start again after preemption) with all their tokens,
blocks that were added, and per scheduled sequence how many tokens to compute. Entries carry no
token ids: prompt tokens came with `SequenceStart`, sampled ones are already on the rank.
"""

from dataclasses import dataclass, field
from typing import Any

from workers.constraint.automaton import AutomatonState, TokenAutomaton
from workers.request import SamplingParams, TokenLogprobs

PLAN_VERSION = 2
NULL_BLOCK = 0
"""Block 0 of each KV group is never handed out: it stands for freed or skipped blocks, and padding
is written to it."""


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """A sequence the ranks do not know (yet, or any more).

    Attributes:
        seq_id: number that identifies the sequence in plans; not used again within an engine's
            life.
        token_ids: prompt, then output tokens known so far.
        num_prompt_tokens: how many of them are the prompt.
        full_blocks, sliding_blocks: block tables up to the tokens found in the prefix cache;
            NULL_BLOCK where none is needed.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...] = ()
    constraint: TokenAutomaton | None = None
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
        num_scheduled_tokens: tokens of each to compute now (decode: 1).
        samples: whether the last computed position yields a token.
        new_blocks: (index into seq_ids, full blocks to append, sliding blocks to append), only
            where there are any.
        masks: (seq_id, bitmask of allowed ids, little-endian bits) for sequences in a grammar
            state.
    """

    step: int
    starts: tuple[SequenceStart, ...] = ()
    drops: tuple[int, ...] = ()
    seq_ids: tuple[int, ...] = ()
    num_computed_tokens: tuple[int, ...] = ()
    num_scheduled_tokens: tuple[int, ...] = ()
    samples: tuple[bool, ...] = ()
    new_blocks: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...] = ()
    masks: tuple[tuple[int, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled. `seq_ids` and `token_ids` run in parallel, in plan order, one for each
    `samples` that was true.

    Attributes:
        logprobs: seq_id → logprobs, for the sequences that asked.
        elapsed_s: time in the runner.
        idle_s: time that the rank had nothing to do before this step's plan came.
        error: a sentence if the step failed; then nothing was sampled and the engine is dead.
    """

    step: int
    seq_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    elapsed_s: float = 0.0
    error: str | None = None
    idle_s: float = 0.0


def encode_plan(plan: StepPlan) -> bytes:
    """A plan as msgpack: positional arrays, one version number in front."""
    starts = [
        (
            start.seq_id,
            start.token_ids,
            start.num_prompt_tokens,
            _sampling_to_wire(start.sampling),
            start.stop_token_ids,
            None if start.constraint is None else _automaton_to_wire(start.constraint),
            start.full_blocks,
            start.sliding_blocks,
        )
        for start in plan.starts
    ]
    return _pack(
        (
            PLAN_VERSION,
            plan.step,
            starts,
            plan.drops,
            plan.seq_ids,
            plan.num_computed_tokens,
            plan.num_scheduled_tokens,
            plan.samples,
            plan.new_blocks,
            plan.masks,
        )
    )


def decode_plan(data: bytes) -> StepPlan:
    """The inverse of `encode_plan`.

    Raises:
        ValueError: another version of the plan format.
    """
    version, step, starts, *rest = _unpack(data)
    _check_version(version)
    decoded = tuple(
        SequenceStart(
            seq_id=seq_id,
            token_ids=token_ids,
            num_prompt_tokens=num_prompt_tokens,
            sampling=SamplingParams(*sampling),
            stop_token_ids=stop_token_ids,
            constraint=None if constraint is None else _automaton_from_wire(constraint),
            full_blocks=full_blocks,
            sliding_blocks=sliding_blocks,
        )
        for (
            seq_id,
            token_ids,
            num_prompt_tokens,
            sampling,
            stop_token_ids,
            constraint,
            full_blocks,
            sliding_blocks,
        ) in starts
    )
    return StepPlan(step, decoded, *rest)


def encode_result(result: StepResult) -> bytes:
    """A result as msgpack."""
    logprobs = [(seq_id, entry.logprob, entry.top) for seq_id, entry in result.logprobs.items()]
    return _pack(
        (
            PLAN_VERSION,
            result.step,
            result.seq_ids,
            result.token_ids,
            logprobs,
            result.elapsed_s,
            result.error,
            result.idle_s,
        )
    )


def decode_result(data: bytes) -> StepResult:
    """The inverse of `encode_result`.

    Raises:
        ValueError: another version of the plan format.
    """
    version, step, seq_ids, token_ids, logprobs, elapsed_s, error, idle_s = _unpack(data)
    _check_version(version)
    decoded = {seq_id: TokenLogprobs(logprob, top) for seq_id, logprob, top in logprobs}
    return StepResult(step, seq_ids, token_ids, decoded, elapsed_s, error, idle_s)


def _check_version(version: int) -> None:
    if version != PLAN_VERSION:
        raise ValueError(
            f"step message has format version {version}, this process speaks {PLAN_VERSION}: update all "
            f"ranks together"
        )


def _sampling_to_wire(sampling: SamplingParams) -> tuple[Any, ...]:
    return tuple(getattr(sampling, name) for name in SamplingParams.__slots__)


def _automaton_to_wire(automaton: TokenAutomaton) -> tuple[Any, ...]:
    return automaton.start, [
        (state.allowed, state.forbidden, state.transitions) for state in automaton.states
    ]


def _automaton_from_wire(wire: tuple[Any, ...]) -> TokenAutomaton:
    start, states = wire
    return TokenAutomaton(tuple(AutomatonState(*state) for state in states), start)


def _pack(message: tuple[Any, ...]) -> bytes:
    import msgpack  # here, since only plans that cross processes need it

    packed: bytes = msgpack.packb(message, use_bin_type=True)
    return packed


def _unpack(data: bytes) -> tuple[Any, ...]:
    import msgpack

    message: tuple[Any, ...] = msgpack.unpackb(data, use_list=False, strict_map_key=False)
    return message
