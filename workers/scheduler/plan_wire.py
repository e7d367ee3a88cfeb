"""StepPlan and StepResult between processes: msgpack of positional arrays, with one version number
in front."""

from typing import Any

import numpy as np

from workers.constraint.automaton import ConstraintLimits
from workers.request import SamplingParams, TokenLogprobs
from workers.scheduler.plan import SequenceStart, StepMasks, StepPlan, StepResult

PLAN_VERSION = 7


def encode_plan(plan: StepPlan) -> bytes:
    """Return a plan as msgpack: positional arrays, with one version number in front."""
    starts = [
        (
            start.seq_id,
            start.token_ids,
            start.num_prompt_tokens,
            _sampling_to_wire(start.sampling),
            start.stop_token_ids,
            start.constraint,
            (start.constraint_limits.max_counted_tokens, start.constraint_limits.max_length),
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
            plan.automata,
            plan.dropped_automata,
            plan.drafts,
            plan.prompt_logprobs,
            plan.awaits_masks,
        )
    )


def decode_plan(data: bytes) -> StepPlan:
    """Return the plan that `encode_plan` encoded.

    Raises:
        ValueError: the data has another version of the plan format.
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
            constraint=constraint,
            constraint_limits=ConstraintLimits(*limits),
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
            limits,
            full_blocks,
            sliding_blocks,
        ) in starts
    )
    return StepPlan(step, decoded, *rest)


def encode_masks(masks: StepMasks) -> bytes:
    """Return masks as msgpack."""
    return _pack((PLAN_VERSION, masks.step, masks.rows.tobytes(), masks.bits.shape, masks.bits.tobytes()))


def decode_masks(data: bytes) -> StepMasks:
    """Return the masks that `encode_masks` encoded.

    Raises:
        ValueError: the data has another version of the plan format.
    """
    version, step, rows, shape, bits = _unpack(data)
    _check_version(version)
    return StepMasks(
        step, np.frombuffer(rows, dtype=np.int64), np.frombuffer(bits, dtype=np.uint8).reshape(shape)
    )


def encode_result(result: StepResult) -> bytes:
    """Return a result as msgpack."""
    return _pack(
        (
            PLAN_VERSION,
            result.step,
            result.seq_ids,
            result.token_ids,
            _logprobs_to_wire(result.logprobs),
            result.elapsed_s,
            result.error,
            result.idle_s,
            result.num_tokens,
            _logprobs_to_wire(result.prompt_logprobs),
        )
    )


def decode_result(data: bytes) -> StepResult:
    """Return the result that `encode_result` encoded.

    Raises:
        ValueError: the data has another version of the plan format.
    """
    version, *fields = _unpack(data)
    _check_version(version)
    step, seq_ids, token_ids, logprobs, elapsed_s, error, idle_s, num_tokens, prompt_logprobs = fields
    return StepResult(
        step,
        seq_ids,
        token_ids,
        _logprobs_from_wire(logprobs),
        elapsed_s,
        error,
        idle_s,
        num_tokens,
        _logprobs_from_wire(prompt_logprobs),
    )


def _logprobs_to_wire(logprobs: dict[int, tuple[TokenLogprobs, ...]]) -> list[tuple[Any, ...]]:
    return [
        (seq_id, [(entry.logprob, entry.top) for entry in entries]) for seq_id, entries in logprobs.items()
    ]


def _logprobs_from_wire(wire: tuple[Any, ...]) -> dict[int, tuple[TokenLogprobs, ...]]:
    return {seq_id: tuple(TokenLogprobs(*entry) for entry in entries) for seq_id, entries in wire}


def _check_version(version: int) -> None:
    if version != PLAN_VERSION:
        raise ValueError(
            f"step message has format version {version}, this process speaks {PLAN_VERSION}: update all "
            f"ranks together"
        )


def _sampling_to_wire(sampling: SamplingParams) -> tuple[Any, ...]:
    return tuple(getattr(sampling, name) for name in SamplingParams.__slots__)


def _pack(message: tuple[Any, ...]) -> bytes:
    import msgpack  # imported here, since only plans that cross processes need it

    packed: bytes = msgpack.packb(message, use_bin_type=True)
    return packed


def _unpack(data: bytes) -> tuple[Any, ...]:
    import msgpack

    message: tuple[Any, ...] = msgpack.unpackb(data, use_list=False, strict_map_key=False)
    return message
