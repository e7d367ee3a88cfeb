"""The CPU kernels against what this machine can do: `python3 -m benchmarks.cpu`.

Every figure is a ratio to something measured in the same process, in turn with it: memory-bound
ones to the read bandwidth of all threads (a sum over memory on huge pages that is larger than the
caches), compute-bound ones to torch's product of square matrices in fp32 or bf16, whichever is
faster on this processor. Each is the best of many runs, since others may use the machine; the load
printed beside says how much they did. All tables take some minutes; `--seconds 0.15 --memory 0.3`
gives rougher figures sooner.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from kernels.cpu import attention, dense, experts, native, roofline, sampling
from kernels.cpu.dense import PackedWeight
from kernels.cpu.memory import zeros
from kernels.cpu.program import Program, ProgramMemory, record
from kernels.cpu.roofline import GEMM_DTYPES, Gemm
from kernels.moe import ExpertWeights
from kernels.mxfp4 import ROWS16, PackedMXFP4
from kernels.sampling import SamplingBatch

HIDDEN = INTERMEDIATE = 2880
"""The hidden and the intermediate size of gpt-oss."""
NUM_EXPERTS = 32
TOP_K = 4
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 64, 8, 64
WINDOW = 128
VOCAB_SIZE = 201_088
BLOCK_SIZE = 16
_LEAST_CALLS = 4
_MOST_OVERTIME = 4
"""Multiple of its seconds that a task may use for its minimum number of calls. A task that uses
them up in its first call ends with it."""
_PROGRESS_S = 2.0


@dataclass(frozen=True, slots=True)
class Task:
    """One measurement.

    Attributes:
        run: called with 0, 1, 2, …: the index of the weights to use, so that they come from memory.
        num_bytes, num_operations: for one call; 0 if not reported.
    """

    name: str
    run: Callable[[int], object]
    num_bytes: float = 0
    num_operations: float = 0


def main() -> None:
    """Parse the flags, measure and print tables."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument(
        "--isa",
        choices=native.ISAS,
        action="append",
        help="instruction set, again for another; default: the best",
    )
    parser.add_argument(
        "--memory",
        type=float,
        default=1.0,
        help="GiB of weights of each kind, more than the caches hold; default: %(default)s",
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure; default: %(default)s")
    parser.add_argument(
        "--only", choices=("matrix-vector", "experts", "dense", "attention", "sampling"), help="one table"
    )
    arguments = parser.parse_args()
    for flag in ("threads", "memory", "seconds"):
        if not getattr(arguments, flag) > 0:
            parser.error(f"--{flag} must be above zero")
    torch.set_num_threads(arguments.threads)
    best = native.isa()
    if best is None:
        parser.error("the CPU kernels are not built: install with a C++ compiler")
    print(
        f"{arguments.threads} threads of {os.cpu_count()}, {cache_text()}, load {os.getloadavg()[0]:.1f}, "
        f"torch {torch.__version__}"
    )
    size = int(arguments.memory * 2**30)
    gemm = roofline.fastest_gemm()
    yardsticks = [bandwidth_task(size), gemm_task(gemm)]
    tables = {
        "matrix-vector": lambda: matrix_vector_tasks(size),
        "experts": lambda: expert_tasks(size),
        "dense": lambda: dense_tasks(size, gemm.dtype),
        "attention": lambda: attention_tasks(size),
        "sampling": lambda: sampling_tasks(VOCAB_SIZE),
    }
    for title, tasks in tables.items():
        if arguments.only not in (None, title):
            continue
        show_progress(f"{title}: making weights")
        made = tasks()
        for isa in arguments.isa or [best]:
            with native.using_isa(isa) as there:
                if there:
                    name = f"{title}, {isa}"
                    results = measure([*yardsticks, *made], arguments.seconds, partial(show_share, name))
                    # Both are torch's best on this machine; on a busy one its threads wait for each
                    # other in nearly every run.
                    product, product_s = results[1]
                    results[1] = (product, min(product_s, product.num_operations / gemm.flops_per_s))
                    show_progress("")
                    print_table(name, results)
                else:
                    print(f"this processor has no {isa}")
        del made


def show_progress(text: str) -> None:
    """Replace the last line on a terminal; on anything else, write a line."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def show_share(name: str, share: float) -> None:
    """Show how much of a table's time is used."""
    show_progress(f"{name}: {share:.0%}")


def measure(
    tasks: Sequence[Task], seconds_each: float, progress: Callable[[float], None] | None = None
) -> list[tuple[Task, float]]:
    """Return the best time of each task, their runs taken in turn.

    Args:
        progress: called every two seconds with the share of the time that is used.
    """
    # One thread's own time is not longer when others have the processor in between.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf")] * len(tasks)
    spent = [0.0] * len(tasks)
    shown = time.perf_counter()
    for call in range(1_000_000):
        waiting = [index for index, used in enumerate(spent) if _goes_on(call, used, seconds_each)]
        if not waiting:
            break
        for index in waiting:
            if progress is not None and time.perf_counter() - shown >= _PROGRESS_S:
                shown = time.perf_counter()
                progress(sum(min(used, seconds_each) for used in spent) / (seconds_each * len(tasks)))
            start = clock()
            tasks[index].run(call)
            elapsed = clock() - start
            spent[index] += elapsed
            if call > 0 or not _goes_on(
                1, elapsed, seconds_each
            ):  # the first run warms up, but the only one counts
                best[index] = min(best[index], elapsed)
    return list(zip(tasks, best, strict=True))


def _goes_on(call: int, used: float, seconds_each: float) -> bool:
    """Return whether a task that has been called `call` times, for `used` seconds, is called
    again."""
    return call == 0 or used < seconds_each or (call < _LEAST_CALLS and used < _MOST_OVERTIME * seconds_each)


def print_table(title: str, results: Sequence[tuple[Task, float]]) -> None:
    """Print the table; the first two results are the yardsticks."""
    (memory, memory_s), (product, product_s), *others = results
    bandwidth, rate = memory.num_bytes / memory_s, product.num_operations / product_s
    print(
        f"\n{title}: read bandwidth {bandwidth / 1e9:.1f} GB/s, {product.name} {rate / 1e9:.0f} GFLOP/s, "
        f"load {os.getloadavg()[0]:.1f}\n"
    )
    print(f"| | ms | GB/s | of bandwidth | GFLOP/s | of {product.name} |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for task, best_s in others:
        speed, operations = task.num_bytes / best_s, task.num_operations / best_s
        read = f"{speed / 1e9:.1f} | {speed / bandwidth:.0%}" if speed else "- | -"
        computed = f"{operations / 1e9:.0f} | {operations / rate:.0%}" if operations else "- | -"
        print(f"| {task.name} | {best_s * 1e3:.2f} | {read} | {computed} |")


def bandwidth_task(size: int) -> Task:
    """Read 16 MiB at a time, as much as a layer or an expert has, of a larger memory."""
    piece = 16 << 20
    pieces = torch.split(zeros((size,), torch.uint8).fill_(1), piece)
    return Task("read", lambda call: native.read_through(pieces[call % len(pieces)]), num_bytes=piece)


def recorded(run: Callable[[int], Tensor], num_calls: int) -> Callable[[int], Tensor]:
    """Return the first `num_calls` calls as programs, in turn: the operation as a decode step runs
    it, without the Python around it. A result is valid until the next call."""
    recordings: list[tuple[Program, Tensor]] = []
    memory = ProgramMemory()
    for call in range(num_calls):
        with torch.inference_mode():
            recordings.append(record(memory, lambda call=call: run(call)))  # type: ignore[misc]

    def replay(
        call: int, inputs: object = run
    ) -> Tensor:  # programs know no more than addresses: `run` keeps what they read
        program, result = recordings[call % num_calls]
        program.run()
        return result

    return replay


def gemm_task(gemm: Gemm) -> Task:
    """Return torch's product of square matrices, of the data type and size that `roofline` found
    the fastest."""
    left, right = (torch.ones(gemm.size, gemm.size, dtype=GEMM_DTYPES[gemm.dtype]) for _ in range(2))
    return Task(
        f"torch {gemm.dtype} GEMM", lambda call: torch.matmul(left, right), num_operations=2 * gemm.size**3
    )


def matrix_vector_tasks(size: int) -> list[Task]:
    """Return the products of one token with dense layers and single experts."""
    tasks = []
    for rows, width in ((5120, HIDDEN), (HIDDEN, 4096), (HIDDEN, 2 * INTERMEDIATE)):
        x = torch.randn(1, width).bfloat16()
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.int8, "int8")):
            weights = dense_weights(rows, width, dtype, size)
            run = recorded(run_dense(x, weights), len(weights))
            tasks.append(Task(f"{name} [{rows}, {width}]", run, weights[0].nbytes, 2 * rows * width))
    for width in (HIDDEN, 2 * INTERMEDIATE):
        layer = ExpertLayer(width, width, size)
        tasks.append(layer.task(f"MXFP4 expert {width} wide, SwiGLU", 1, 1))
    return tasks


def expert_tasks(size: int) -> list[Task]:
    """Return the tasks of a layer of the 20b: 32 experts, 4 for each token."""
    layer = ExpertLayer(HIDDEN, INTERMEDIATE, size)
    return [
        layer.task(f"experts, {counted(num_tokens)}", num_tokens, TOP_K)
        for num_tokens in (1, 4, 16, 64, 512, 2048)
    ]


def dense_tasks(size: int, torch_dtype: str) -> list[Task]:
    """Return dense layers at batch sizes, ours and torch's, the latter in a data type of
    GEMM_DTYPES."""
    tasks = []
    rows, width, plain_dtype = 5120, HIDDEN, GEMM_DTYPES[torch_dtype]
    plain = [
        torch.randn(rows, width).to(plain_dtype)
        for _ in range(max(2, size // (plain_dtype.itemsize * rows * width) // 2))
    ]
    weights = {
        name: dense_weights(rows, width, dtype, size)
        for name, dtype in (("bf16", torch.bfloat16), ("int8", torch.int8))
    }
    for num_tokens in (1, 2, 4, 8, 16, 32, 64, 512):
        x = torch.randn(num_tokens, width).bfloat16()
        plain_x = x.to(plain_dtype)
        operations = 2 * num_tokens * rows * width
        for name, packed in weights.items():
            tasks.append(
                Task(
                    f"{name} [{rows}, {width}], {counted(num_tokens)}",
                    run_dense(x, packed),
                    packed[0].nbytes,
                    operations,
                )
            )
        tasks.append(
            Task(
                f"torch {torch_dtype} [{rows}, {width}], {counted(num_tokens)}",
                lambda call, x=plain_x: functional.linear(x, plain[call % len(plain)]),  # type: ignore[misc]
                plain[0].nbytes,
                operations,
            )
        )
    return tasks


def counted(num_tokens: int) -> str:
    """Return "1 token", "2 tokens"."""
    return f"{num_tokens} token{'s' * (num_tokens != 1)}"


def attention_tasks(size: int) -> list[Task]:
    """Return attention of prompts, of chunks after a context, and of decodes of one and of many
    sequences."""
    caches = attention_caches(size)
    tasks = []
    for num_seqs, query_len, context_len, window in (
        (1, 512, 512, None),
        (1, 2048, 2048, None),
        (1, 512, 8192, None),
        (1, 512, 512, WINDOW),
        (1, 2048, 2048, WINDOW),
        (1, 1, 1024, None),
        (1, 1, 8192, None),
        (1, 1, 8192, WINDOW),
        (16, 1, 1024, None),
        (16, 1, 8192, None),
    ):
        tasks.append(attention_task(caches, num_seqs, query_len, context_len, window))
    return tasks


def sampling_tasks(vocab_size: int) -> list[Task]:
    """Return the sampling of tokens from 1 and from 16 rows of logits: flat ones, and peaked ones,
    where about a hundred tokens have nearly all of the weight."""
    tasks = []
    for num_rows, (kind, raised) in itertools.product((1, 16), (("flat", 0.0), ("peaked", 14.0))):
        logits = [
            2 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(call))
            for call in range(4)
        ]
        for rows in logits:
            rows[:, :: max(1, vocab_size // 100)] += raised
        seeded = {"seeds": torch.arange(num_rows), "output_positions": torch.arange(num_rows)}
        warm = {"temperature": torch.ones(num_rows), **seeded}
        batches = {
            "greedy": SamplingBatch(),
            "temperature 1": SamplingBatch(**warm),
            "temperature 1, top_p 0.95": SamplingBatch(**warm, top_p=torch.full((num_rows,), 0.95)),
            "temperature 1, top_k 50": SamplingBatch(**warm, top_k=torch.full((num_rows,), 50)),
        }
        for name, batch in batches.items():
            run = run_sampling(logits, batch)
            tasks.append(
                Task(f"{num_rows} row{'s' * (num_rows != 1)}, {kind}, {name}", run, logits[0].nbytes)
            )
    return tasks


def run_sampling(logits: Sequence[Tensor], batch: SamplingBatch) -> Callable[[int], Tensor]:
    """Sample in each call from the next logits; return the tokens."""
    return lambda call: sampling.sample(logits[call % len(logits)], batch).token_ids


def attention_caches(size: int) -> Tensor:
    """Return [num_layers, 2, num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM] bf16, `size` bytes or
    more: a layer holds 16 sequences of 8192."""
    num_blocks = 16 * 8192 // BLOCK_SIZE
    shape = (2, num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    layers = zeros((-(-size // (2 * prod(shape))), *shape), torch.bfloat16)
    layers.view(-1, prod(shape[2:])).copy_(torch.randn(prod(shape[2:])))
    return layers


def attention_task(
    layers: Tensor, num_seqs: int, query_len: int, context_len: int, window: int | None
) -> Task:
    """Return attention of the last `query_len` tokens of each of `num_seqs` sequences, which are
    others with every call; blocks are in no order."""
    num_blocks, blocks_per_seq = layers.shape[2], -(-context_len // BLOCK_SIZE)
    generator = torch.Generator().manual_seed(context_len)
    free = torch.randperm(num_blocks, generator=generator).to(torch.int32)
    tables = [
        table.view(num_seqs, blocks_per_seq)
        for table in free.split(num_seqs * blocks_per_seq)
        if len(table) == num_seqs * blocks_per_seq
    ]
    q = torch.randn(num_seqs * query_len, NUM_HEADS, HEAD_DIM, generator=generator).bfloat16()
    context_lens = torch.full((num_seqs,), context_len, dtype=torch.int32)
    cu_seqlens_q = torch.arange(num_seqs + 1, dtype=torch.int32) * query_len
    sinks = torch.zeros(NUM_HEADS)

    def run(call: int) -> Tensor:
        layer, table = layers[call % len(layers)], tables[call // len(layers) % len(tables)]
        return attention.paged_attention(
            q, layer, table, context_lens, cu_seqlens_q, sinks, scale=HEAD_DIM**-0.5, window=window
        )

    seen = [
        min(position + 1, window or context_len) for position in range(context_len - query_len, context_len)
    ]
    read = min(context_len, query_len + (window or context_len) - 1)
    name = f"{num_seqs} x {query_len} of {context_len} tokens, " + (
        f"window {window}" if window else "all keys"
    )
    num_bytes = num_seqs * read * 2 * NUM_KV_HEADS * HEAD_DIM * layers.itemsize
    return Task(
        name, run, num_bytes if query_len == 1 else 0, 4 * num_seqs * sum(seen) * NUM_HEADS * HEAD_DIM
    )


def run_dense(x: Tensor, weights: Sequence[PackedWeight]) -> Callable[[int], Tensor]:
    """Run each call with the next weight."""
    return lambda call: dense.linear(x, weights[call % len(weights)], None)


def dense_weights(rows: int, width: int, dtype: torch.dtype, size: int) -> list[PackedWeight]:
    """Return weights of one shape, `size` bytes together: any bytes are int8 weights, and small
    ones bf16 weights."""
    made = []
    for _ in range(max(2, size // (rows * width * dtype.itemsize))):
        packed = dense.allocate(rows, width, dtype)
        packed.values.copy_(torch.randint(-127, 128, packed.values.shape, dtype=torch.int8))
        if packed.scales is not None:
            packed.scales.fill_(0.01)
        made.append(packed)
    return made


class ExpertLayer:
    """A layer of random experts that fill `size` bytes, used in turn.

    Args:
        hidden, intermediate: sizes of an expert.
    """

    def __init__(self, hidden: int, intermediate: int, size: int) -> None:
        self.expert_bytes = 3 * hidden * intermediate * 17 // 32
        self.num_sets = max(1, size // (self.expert_bytes * NUM_EXPERTS))
        self.num_experts = self.num_sets * NUM_EXPERTS
        self.hidden, self.intermediate = hidden, intermediate
        self.weights = ExpertWeights(
            self._random(2 * intermediate, hidden),
            torch.zeros(self.num_experts, 2 * intermediate, dtype=torch.bfloat16),
            self._random(hidden, intermediate),
            torch.zeros(self.num_experts, hidden, dtype=torch.bfloat16),
            swiglu_limit=7.0,
            swiglu_alpha=1.702,
            num_experts=self.num_experts,
        )

    def _random(self, rows: int, width: int) -> PackedMXFP4:
        blocks = zeros((self.num_experts, rows // 16, width // 8, 64), torch.uint8)
        scales = zeros((self.num_experts, rows // 16, width // 32, 16), torch.uint8)
        for expert in range(self.num_experts):
            blocks[expert].random_(0, 256)
            scales[expert].random_(116, 122)
        return PackedMXFP4(ROWS16, blocks, scales, (self.num_experts, rows, width))

    def task(self, name: str, num_tokens: int, top_k: int) -> Task:
        """Return the task of tokens that choose among 32 experts at random, other experts with
        every call."""
        generator = torch.Generator().manual_seed(num_tokens)
        x = torch.randn(num_tokens, self.hidden, generator=generator).bfloat16()
        choices = []
        for _ in range(16):
            ids = (
                torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
                .argsort(dim=1)[:, :top_k]
                .to(torch.int32)
            )
            choices += [ids + NUM_EXPERTS * number for number in range(self.num_sets)]
        weights = torch.full((num_tokens, top_k), 1 / top_k)
        num_hit = sum(len(ids.unique()) for ids in choices) / len(choices)

        def run(call: int) -> Tensor:
            return experts.fused_experts(x, choices[call % len(choices)], weights, self.weights)

        operations = 2 * num_tokens * top_k * 3 * self.hidden * self.intermediate
        return Task(name, recorded(run, len(choices)), num_hit * self.expert_bytes, operations)


def cache_text() -> str:
    """Return the size of the last-level cache, as Linux reports it."""
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size", encoding="ascii") as file:
            return f"last-level cache {file.read().strip()}"
    except OSError:
        return "last-level cache unknown"


if __name__ == "__main__":
    main()
