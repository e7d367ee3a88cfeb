"""A model, not a measurement: how fast gpt-oss decodes under each parallel plan, by bytes,
operations and messages.

    python3 -m benchmarks.parallel_model [--model 120b] [--gpu h100 h200 b200]
        [--plan 1 2 4 8,2] [--batch 1 8 64 256]
                                        [--context 8192] [--output 1024] [--plot
                                        docs/performance/parallel_model.svg]

Requests have prompts of `context` tokens and answers of `output` tokens. Prints, for each GPU and
plan (ranks, or ranks,groups of experts): a rank's weights, the tokens that the KV cache of a
replica holds, and how fast prompts are read; for each batch of sequences: what one rank reads by
kind in a decode step, its operations, the bytes it sends, the step's time, and tokens of answers a
second for each user and for each GPU; and which plan gives most of them per GPU while each user
gets at least a given rate. --plot draws these two against each other for each plan (needs the extra
`bench`).

A step's time is the sum of its parts, each as long as its bytes or its operations take, whichever
is longer, plus collectives, plus the launches. The sizes are those of `workers/model/sizes.py` over
the shards of `workers/parallel/shard.py`. Assumptions:

- All ranks of a replica are in one server. Batches stay full: a sequence that ends is followed by
  another, whose prompt is read in chunks of PROMPT_CHUNK tokens, all of it (no prefix cache), while
  the others wait. All sequences have `context` tokens when they decode.
- Each token's experts are independent and equally likely. A layer lasts as long as the group of
  experts with most to do.
- Kernels reach MEMORY_SHARE of the memory's bandwidth and MATH_SHARE of the bf16 peak (MXFP4 is
  multiplied as bf16); activations between kernels are not counted, nor rows that pad a tile. The
  links reach LINK_SHARE of theirs.
- A layer is KERNELS_PER_LAYER kernels of a CUDA graph, each of which costs KERNEL_S beyond its
  bytes and operations.
- An all-reduce is one-shot (every rank sends everything to all others, one hop) or a ring (2 (n -
  1) hops, 2 (n - 1) / n of the bytes), whichever is faster, in bf16; a collective costs
  COLLECTIVE_S and each further hop HOP_S. Nothing overlaps with it.
- Rank 0 gathers the logits in fp32, and reads them as often as it writes them to sample. The
  engine's own work is hidden behind the GPU's.
"""

import argparse
import bisect
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cluster.commands.gpus import GPUS, Gpu, gpu_kv_cache
from workers.config import Dtype, ModelConfig, ParallelConfig, SchedulerConfig
from workers.errors import ConfigError
from workers.kv_cache.manager import num_blocks_for, sliding_blocks_per_sequence
from workers.kv_cache.memory import DTYPE_BYTES, KVCachePlan
from workers.model.make_checkpoint import preset_config
from workers.model.sizes import expected_experts_hit, rank_bytes, sequence_kv_bytes
from workers.parallel.shard import RankShard, plan_shards

DTYPE: Dtype = "bfloat16"
ITEM_BYTES = DTYPE_BYTES[DTYPE]
LOGIT_BYTES = 4
MAX_RANKS = 8
"""GPUs of a server that reach each other over NVLink."""
MEMORY_SHARE = 0.7
MATH_SHARE = 0.5
LINK_SHARE = 0.8
KERNELS_PER_LAYER = 12
KERNEL_S = 2e-6
COLLECTIVE_S = 6e-6
HOP_S = 1e-6
BATCHES = tuple(sorted({base << shift for base in (2, 3) for shift in range(10)} | {1}))
"""Batch sizes at which the curves are computed: 1, 2, 3, 4, 6, 8, 12, … 1536."""
MAX_BATCH = 1024
PROMPT_CHUNK = 4096
"""Number of tokens of a step that reads a prompt."""
USER_RATES = (20, 40, 80, 160)
"""Tokens a second for each user, below which a plan does not count in the last table."""


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of work in a step: the bytes that the busiest rank reads (of collectives: sends),
    its operations, its time."""

    num_bytes: float
    flops: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a replica.

    Attributes:
        attention: the projections.
        keys: attention itself, over the KV cache.
        experts: those of the busiest group.
        other: embedding rows, norms, gates.
        lm_head: includes the logits on rank 0.
    """

    attention: Part
    keys: Part
    experts: Part
    other: Part
    lm_head: Part
    collectives: Part
    launches_s: float

    @property
    def read(self) -> tuple[Part, ...]:
        return self.attention, self.keys, self.experts, self.other, self.lm_head

    @property
    def read_bytes(self) -> float:
        return sum(part.num_bytes for part in self.read)

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.read)

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.read) + self.collectives.seconds + self.launches_s


@dataclass(frozen=True, slots=True)
class Point:
    """One plan at one batch.

    Attributes:
        step: one decode step.
        prompt_s: time to read one sequence's prompt.
        output: tokens of an answer.
    """

    parallel: ParallelConfig
    batch: int
    step: Step
    prompt_s: float
    output: int

    @property
    def user_rate(self) -> float:
        """Tokens a second of one sequence: while it decodes an answer, each other sequence's prompt
        is read once."""
        return 1 / (self.step.seconds + self.batch * self.prompt_s / self.output)

    @property
    def gpu_rate(self) -> float:
        """Tokens a second of all sequences, for each GPU of the replica."""
        return self.batch * self.user_rate / self.parallel.tensor


def model_step(
    model: ModelConfig, parallel: ParallelConfig, gpu: Gpu, *, batch: int, context: int, query_len: int = 1
) -> Step:
    """Return a step with the next query_len tokens of `batch` sequences: one decodes, more are a
    chunk of a prompt.

    Args:
        context: number of tokens of each sequence before them.
    Raises:
        ConfigError: the model does not allow the plan.
    """
    shards = plan_shards(model, parallel)
    shard = max(shards, key=lambda shard: rank_bytes(model, shard, DTYPE).total)
    sizes = rank_bytes(model, shard, DTYPE)
    hidden, layers, tokens = model.hidden_size, model.num_layers, batch * query_len
    num_hit, num_pairs = busiest_experts(
        model, tuple(sorted({(one.experts.start, one.experts.stop) for one in shards})), tokens
    )

    head_rows = shard.heads.length * model.head_dim
    kv_rows = shard.kv_heads.length * model.head_dim
    middle = context + query_len // 2
    keys = sum(middle if window is None else min(middle, window) for window in model.layer_windows)
    kv_read = batch * sequence_kv_bytes(model, shard, DTYPE, context + query_len - 1)
    expert_bytes = sizes.experts * num_hit / shard.experts.length
    logit_bytes = batch * model.vocab_size * LOGIT_BYTES
    return Step(
        attention=_part(gpu, sizes.attention, 4 * tokens * layers * hidden * (head_rows + kv_rows)),
        keys=_part(gpu, kv_read, 4 * tokens * keys * head_rows),
        experts=_part(gpu, expert_bytes, 6 * num_pairs * layers * hidden * shard.intermediate.size),
        other=_part(
            gpu,
            sizes.gate_and_norms + tokens * hidden * ITEM_BYTES,
            2 * tokens * layers * hidden * model.num_experts,
        ),
        lm_head=_part(gpu, sizes.lm_head + 2 * logit_bytes, 2 * batch * hidden * shard.vocab.size),
        collectives=_collectives(model, parallel, gpu, shard, batch, tokens),
        launches_s=layers * KERNELS_PER_LAYER * KERNEL_S,
    )


def all_reduce(num_bytes: float, num_ranks: int, link_bandwidth: float) -> Part:
    """Return the faster of one-shot and ring; bytes are those that one rank sends."""
    if num_ranks == 1:
        return Part(0, 0, 0)
    one_shot, ring = (num_ranks - 1) * num_bytes, 2 * (num_ranks - 1) / num_ranks * num_bytes
    hops_s = (2 * (num_ranks - 1) - 1) * HOP_S
    return min(
        Part(one_shot, 0, COLLECTIVE_S + one_shot / link_bandwidth),
        Part(ring, 0, COLLECTIVE_S + hops_s + ring / link_bandwidth),
        key=lambda part: part.seconds,
    )


@cache
def busiest_experts(
    model: ModelConfig, groups: tuple[tuple[int, int], ...], num_tokens: int
) -> tuple[float, float]:
    """Return the expected number of experts that are hit, and of (token, expert) pairs, in that
    group of a layer which has most of them.

    Args:
        groups: start and stop of each group's experts. One group is computed, several are drawn at
            random with a fixed seed.
    """
    if len(groups) == 1:
        return expected_experts_hit(model, num_tokens), num_tokens * model.num_experts_per_token
    num_draws = max(8, 4096 // num_tokens)
    scores = np.random.default_rng(0).random((num_draws * num_tokens, model.num_experts), dtype=np.float32)
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(
        chosen,
        np.argpartition(scores, model.num_experts_per_token, axis=1)[:, : model.num_experts_per_token],
        True,
        axis=1,
    )
    pairs = chosen.reshape(num_draws, num_tokens, -1).sum(axis=1)
    starts = [start for start, _ in groups]
    hit, load = (
        np.add.reduceat(counts, starts, axis=1).max(axis=1).mean()
        for counts in ((pairs > 0).astype(int), pairs)
    )
    return float(hit), float(load)


def kv_capacity(model: ModelConfig, parallel: ParallelConfig, gpu: Gpu) -> int:
    """Return the tokens that the KV cache of a replica holds with an engine's default settings; 0
    if its weights leave no room for a full context."""
    plan = _kv_cache(model, parallel, gpu, SchedulerConfig().max_num_seqs)
    return 0 if plan is None else plan.kv_capacity_tokens


def most_sequences(model: ModelConfig, parallel: ParallelConfig, gpu: Gpu, context: int) -> int:
    """Return the number of sequences of `context` tokens that a replica holds at once, up to
    MAX_BATCH."""
    return bisect.bisect_left(
        range(1, MAX_BATCH + 1), True, key=lambda batch: not _fits(model, parallel, gpu, batch, context)
    )


def prompt_seconds(model: ModelConfig, parallel: ParallelConfig, gpu: Gpu, length: int) -> float:
    """Return the time to read a prompt in chunks, each as long as one in the middle takes."""
    chunk = min(length, PROMPT_CHUNK)
    step = model_step(model, parallel, gpu, batch=1, context=(length - chunk) // 2, query_len=chunk)
    return step.seconds * length / chunk


def points(
    model: ModelConfig,
    parallel: ParallelConfig,
    gpu: Gpu,
    batches: Sequence[int],
    *,
    context: int,
    output: int,
) -> list[Point]:
    """Return the plan at each of the batches whose sequences fit."""
    most = most_sequences(model, parallel, gpu, context + output)
    prompt_s = prompt_seconds(model, parallel, gpu, context)
    return [
        Point(
            parallel, batch, model_step(model, parallel, gpu, batch=batch, context=context), prompt_s, output
        )
        for batch in batches
        if batch <= most
    ]


def best(points: Sequence[Point], user_rate: float) -> Point | None:
    """Return the point with most tokens per GPU among those that give each user at least
    `user_rate`."""
    return max(
        (point for point in points if point.user_rate >= user_rate),
        key=lambda point: point.gpu_rate,
        default=None,
    )


def _kv_cache(
    model: ModelConfig, parallel: ParallelConfig, gpu: Gpu, max_num_seqs: int
) -> KVCachePlan | None:
    """Return the KV cache of each rank, as an engine would size it; None: not one full context
    fits."""
    shards = plan_shards(model, parallel)
    weights = max(rank_bytes(model, shard, DTYPE).total for shard in shards)
    scheduler = SchedulerConfig(max_num_seqs=max_num_seqs)
    try:
        return gpu_kv_cache(
            gpu, model, shards[0], scheduler, weight_bytes=weights, max_model_len=model.max_context_len
        )
    except ConfigError:
        return None


def _fits(model: ModelConfig, parallel: ParallelConfig, gpu: Gpu, batch: int, context: int) -> bool:
    """Return whether an engine's KV cache holds that batch."""
    plan = _kv_cache(model, parallel, gpu, batch)
    if plan is None:
        return False
    full = plan.num_full_blocks - 1 if plan.num_full_blocks else math.inf
    window = model.sliding_window
    sliding = (
        math.inf
        if window is None
        else (plan.num_sliding_blocks - 1) // sliding_blocks_per_sequence(window, context)
    )
    return batch * num_blocks_for(context) <= full and batch <= sliding


def _part(gpu: Gpu, num_bytes: float, flops: float) -> Part:
    seconds = max(num_bytes / (gpu.memory_bandwidth * MEMORY_SHARE), flops / (gpu.bf16_flops * MATH_SHARE))
    return Part(num_bytes, flops, seconds)


def _collectives(
    model: ModelConfig, parallel: ParallelConfig, gpu: Gpu, shard: RankShard, batch: int, tokens: int
) -> Part:
    """Return two all-reduces a layer, one of the embedding; logits to rank 0; sampled ids from
    it."""
    if parallel.tensor == 1:
        return Part(0, 0, 0)
    link = gpu.link_bandwidth * LINK_SHARE
    reduced = all_reduce(tokens * model.hidden_size * ITEM_BYTES, parallel.tensor, link)
    count = 2 * model.num_layers + 1
    logits = batch * shard.vocab.size * LOGIT_BYTES
    gathered_s = COLLECTIVE_S + (parallel.tensor - 1) * logits / link
    return Part(count * reduced.num_bytes + logits, 0, count * reduced.seconds + gathered_s + COLLECTIVE_S)


def plan_name(parallel: ParallelConfig) -> str:
    """Return a name such as TP4 or TP4 EP2."""
    expert = parallel.expert_size
    return f"TP{parallel.tensor}" if expert == parallel.tensor else f"TP{parallel.tensor} EP{expert}"


def report(
    model: ModelConfig,
    name: str,
    plans: Sequence[ParallelConfig],
    batches: Sequence[int],
    *,
    context: int,
    output: int,
) -> Iterator[str]:
    """Yield the tables of one GPU, as lines of Markdown."""
    gpu = GPUS[name]
    yield f"\n{name.upper()}, prompts of {context} tokens, answers of {output}\n"
    yield (
        f"| plan | weights of a rank | KV tokens of a replica | sequences of {context + output} | "
        f"prompt tok/s per GPU |"
    )
    yield "| --- | ---: | ---: | ---: | ---: |"
    for parallel in plans:
        weights = max(rank_bytes(model, shard, DTYPE).total for shard in plan_shards(model, parallel))
        capacity, most = (
            kv_capacity(model, parallel, gpu),
            most_sequences(model, parallel, gpu, context + output),
        )
        rate = context / prompt_seconds(model, parallel, gpu, context) / parallel.tensor
        yield f"| {plan_name(parallel)} | {weights / 1e9:.2f} GB | {capacity:,} | {most:,} | {rate:,.0f} |"
    yield "\nA decode step: GB that a rank reads, milliseconds\n"
    columns = (
        "attention | KV | experts | other | lm_head | GFLOP | sent | collectives | step | tok/s per "
        "user | tok/s per GPU"
    )
    yield f"| plan | batch | {columns} |\n| --- |" + " ---: |" * (columns.count("|") + 2)
    for parallel in plans:
        for point in points(model, parallel, gpu, batches, context=context, output=output):
            step = point.step
            read = " | ".join(f"{part.num_bytes / 1e9:.2f}" for part in step.read)
            yield (
                f"| {plan_name(parallel)} | {point.batch} | {read} | {step.flops / 1e9:,.0f} | "
                f"{step.collectives.num_bytes / 1e6:.1f} MB | "
                f"{step.collectives.seconds * 1e3:.2f} | {step.seconds * 1e3:.2f} | {point.user_rate:.0f} | "
                f"{point.gpu_rate:,.0f} |"
            )
    every = [
        point
        for parallel in plans
        for point in points(model, parallel, gpu, BATCHES, context=context, output=output)
    ]
    yield (
        "\n| each user at least | plan | batch | tok/s per user | tok/s per GPU |\n| ---: | --- | "
        "---: | ---: | ---: |"
    )
    for rate in USER_RATES:
        winner = best(every, rate)
        if winner is None:
            yield f"| {rate} | none | | | |"
        else:
            yield (
                f"| {rate} | {plan_name(winner.parallel)} | {winner.batch} | {winner.user_rate:.0f} "
                f"| {winner.gpu_rate:,.0f} |"
            )


def draw(
    file: Path,
    model: ModelConfig,
    title: str,
    names: Sequence[str],
    plans: Sequence[ParallelConfig],
    *,
    context: int,
    output: int,
) -> None:
    """Draw a panel for each GPU, a curve for each plan."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "cantata", "svg.fonttype": "none", "font.size": 9, "path.simplify": True}
    )
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    ticks = FixedLocator([digit * 10**power for power in range(1, 6) for digit in (1, 2, 5)])
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(3.6 * len(names), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, name in zip(panels[0], names, strict=True):
        for parallel, marker in zip(plans, itertools.cycle("osD^vP*X")):
            found = points(model, parallel, GPUS[name], BATCHES, context=context, output=output)
            if not found:
                continue
            rates = [point.user_rate for point in found], [point.gpu_rate for point in found]
            panel.plot(
                *rates,
                marker=marker,
                markersize=3,
                linewidth=1,
                label=f"{plan_name(parallel)}, to {found[-1].batch}",
            )
        panel.set(xscale="log", yscale="log", title=name.upper(), xlabel="tokens/s per user")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(ticks)
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        panel.grid(linewidth=0.3)
        panel.legend(fontsize=7, title="plan, largest batch", title_fontsize=7, loc="lower left")
    panels[0][0].set_ylabel("tokens/s per GPU")
    figure.suptitle(
        f"{title}, prompts of {context} tokens, answers of {output}: a model, not a measurement", fontsize=10
    )
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


def parse_plan(text: str) -> ParallelConfig:
    """Parse `8` or `8,2`.

    Raises:
        argparse.ArgumentTypeError: it is no plan.
    """
    try:
        tensor, _, expert = text.partition(",")
        return ParallelConfig(int(tensor), int(expert) if expert else None)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no plan: give ranks, or ranks,groups of experts"
        ) from error
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the flags and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("120b", "20b"), default="120b")
    parser.add_argument("--gpu", choices=tuple(GPUS), nargs="+", default=["h100", "h200", "b200"])
    parser.add_argument(
        "--plan", type=parse_plan, nargs="+", default=[ParallelConfig(size) for size in (1, 2, 4, 8)]
    )
    parser.add_argument(
        "--batch", type=_positive, nargs="+", default=[1, 8, 64, 256], help="sequences of a replica"
    )
    parser.add_argument("--context", type=_positive, default=8192, help="tokens of a prompt")
    parser.add_argument("--output", type=_positive, default=1024, help="tokens of an answer")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves; .svg or .png")
    options = parser.parse_args(arguments)
    model = preset_config(options.model)
    lengths = {"context": options.context, "output": options.output}
    try:
        if options.context + options.output > model.max_context_len:
            raise ConfigError(
                f"--context and --output together are at most {model.max_context_len}, got "
                f"{options.context + options.output}"
            )
        for parallel in options.plan:
            if parallel.tensor > MAX_RANKS:
                raise ConfigError(
                    f"tensor={parallel.tensor} is more than one server of {MAX_RANKS} GPUs, beyond which "
                    f"this does not go"
                )
            plan_shards(model, parallel)
        print(f"A model, not a measurement: gpt-oss-{options.model}")
        for name in options.gpu:
            print("\n".join(report(model, name, options.plan, options.batch, **lengths)))
        if options.plot is not None:
            draw(options.plot, model, f"gpt-oss-{options.model}", options.gpu, options.plan, **lengths)
    except ConfigError as error:
        print(f"parallel_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
