"""What a step costs the engine apart from the model: scheduling, the plan on the wire, and taking
in the result.

Sequences decode with prompts of different lengths, so that blocks fill up at different steps; the
executor answers at once with a token that ends nothing. Times are of the processor, so that other
programs on the machine count little. Run from the repository root: `python3 -m benchmarks.scheduler
[--json FILE]`.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from workers.config import SchedulerConfig
from workers.engine.collector import spare_collections
from workers.kv_cache.manager import KVCacheManager
from workers.request import EngineRequest, SamplingParams
from workers.scheduler.plan import StepPlan, StepResult
from workers.scheduler.plan_wire import decode_plan, decode_result, encode_plan, encode_result
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.sequence import Sequence

NUM_SEQS = (1, 64, 256, 1024)
WINDOW = 128
MAX_MODEL_LEN = 8192
NUM_PROMPT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class StepCost:
    """Milliseconds per step of `num_seqs` decoding sequences: medians, and the 99th percentile of
    the total."""

    num_seqs: int
    schedule_ms: float
    encode_plan_ms: float
    decode_plan_ms: float
    result_ms: float
    update_ms: float
    engine_ms: float
    engine_p99_ms: float
    plan_bytes: int


def null_result(plan: StepPlan) -> StepResult:
    """Return the result of an executor without a model."""
    seq_ids = tuple(seq_id for seq_id, samples in zip(plan.seq_ids, plan.samples, strict=True) if samples)
    return StepResult(plan.step, seq_ids, (7,) * len(seq_ids))


def build(
    num_seqs: int,
    *,
    sampling: SamplingParams | None = None,
    execute: Callable[[StepPlan], StepResult] = null_result,
) -> Scheduler:
    """Return a scheduler whose sequences have all computed their prompts.

    Args:
        sampling: parameters of all sequences; each has a seed of its own and no limit.
        execute: runs the plans.
    """
    blocks_per_sequence = (2 * NUM_PROMPT_TOKENS) // 16 + 64
    kv = KVCacheManager(
        num_full_blocks=1 + max(num_seqs * blocks_per_sequence, MAX_MODEL_LEN // 16),
        num_sliding_blocks=1 + num_seqs * 20 + 1024,
        window=WINDOW,
    )
    scheduler = Scheduler(SchedulerConfig(num_seqs, 16384), kv, max_model_len=MAX_MODEL_LEN)
    for seq_id in range(num_seqs):
        first = 10_000 + seq_id * 7
        prompt = tuple(range(first, first + NUM_PROMPT_TOKENS + seq_id % 61))
        own = replace(sampling or SamplingParams(), max_tokens=None, seed=seq_id)
        scheduler.add(Sequence(seq_id, EngineRequest(f"request-{seq_id}", prompt, own), (2,)))
    while True:
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.update(execute(plan))
        if len(plan.seq_ids) == num_seqs and all(plan.samples):
            return scheduler


def measure(num_seqs: int, num_steps: int) -> StepCost:
    """Time `num_steps` decode steps."""
    scheduler = build(num_seqs)
    rows: list[tuple[float, ...]] = []
    num_bytes = 0
    for _ in range(num_steps):
        marks = [time.process_time()]
        plan = scheduler.schedule()
        marks.append(time.process_time())
        assert plan is not None
        data = encode_plan(plan)
        marks.append(time.process_time())
        received = decode_plan(data)
        marks.append(time.process_time())
        answer = encode_result(null_result(received))
        marks.append(time.process_time())
        result = decode_result(answer)
        marks.append(time.process_time())
        updates = scheduler.update(result)
        marks.append(time.process_time())
        assert len(updates) == num_seqs
        num_bytes = max(num_bytes, len(data))
        rows.append(tuple(1e3 * (after - before) for before, after in itertools.pairwise(marks)))
    schedule, encode, decode, _answer, result_ms, update = (
        statistics.median(column) for column in zip(*rows, strict=True)
    )
    totals = sorted(row[0] + row[1] + row[4] + row[5] for row in rows)
    return StepCost(
        num_seqs,
        schedule,
        encode,
        decode,
        result_ms,
        update,
        statistics.median(totals),
        totals[int(0.99 * (len(totals) - 1))],
        num_bytes,
    )


def table(costs: list[StepCost]) -> str:
    """Return Markdown; the last column compares the engine's cost per sequence with that of 64."""
    lines = [
        "| running | schedule ms | encode plan ms | decode result ms | update ms | engine total ms | p99 ms "
        "| rank: decode plan ms | largest plan, bytes | total per sequence, 64 = 1 |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    base = next((cost.engine_ms / cost.num_seqs for cost in costs if cost.num_seqs == 64), None)
    for cost in costs:
        ratio = "–" if base is None else f"{cost.engine_ms / cost.num_seqs / base:.2f}"
        lines.append(
            f"| {cost.num_seqs} | {cost.schedule_ms:.3f} | {cost.encode_plan_ms:.3f} | {cost.result_ms:.3f} "
            f"| {cost.update_ms:.3f} "
            f"| {cost.engine_ms:.3f} | {cost.engine_p99_ms:.3f} | {cost.decode_plan_ms:.3f} | "
            f"{cost.plan_bytes} | {ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table; with --json also write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--num-seqs", type=int, nargs="+", default=NUM_SEQS, help="running sequences to measure"
    )
    parser.add_argument("--steps", type=int, default=400, help="steps measured for each")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    arguments = parser.parse_args()
    spare_collections()  # as the engine's process does
    costs = [measure(num_seqs, arguments.steps) for num_seqs in arguments.num_seqs]
    print(table(costs))
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({"steps": arguments.steps, "costs": [asdict(cost) for cost in costs]}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
