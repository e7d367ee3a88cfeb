"""Check a GPU machine and print a report: the tests of tests/gpu, then decode speed against the memory roofline.

    make gpu-check                                # random weights of the tiny shape, or MODEL=checkpoints/gpt-oss-20b

This was written on machines without a GPU. It has run with `--device cpu`, which proves the script but says nothing of a GPU.

The roofline of a decode step is the time to read its weights and keys once, at the bandwidth that a large copy on the device reaches: all
dense weights, the experts that are hit (E * (1 - (1 - k/E)^B) of them for B tokens whose choices are independent), and the keys and values
of B contexts.
"""

import argparse
import platform
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import torch

from workers.config import BLOCK_SIZE, Dtype, ModelConfig, load_model_config
from workers.executor.kernel_choice import kernel_choices, not_capturable
from workers.executor.rank import usable_device
from workers.executor.runner import PendingStep, Runner
from workers.kv_cache.manager import num_blocks_for
from workers.model.checkpoint import load_model
from workers.model.sizes import expected_experts_hit, rank_bytes, sequence_kv_bytes
from workers.parallel.shard import RankShard
from workers.request import SamplingParams
from workers.scheduler.plan import SequenceStart, StepPlan

WARM_UP_STEPS = 5
PREFILL_TOKENS = 8192
GREEDY = SamplingParams(temperature=0, seed=0)


def decode_step_bytes(model: ModelConfig, shard: RankShard, dtype: Dtype, batch_size: int, context_len: int) -> float:
    """Bytes that a rank must read in a decode step of batch_size sequences of context_len tokens; of the embedding only a row each."""
    sizes = rank_bytes(model, shard, dtype)
    missed = 1 - expected_experts_hit(model, batch_size) / model.num_experts
    kv = batch_size * sequence_kv_bytes(model, shard, dtype, context_len)
    return sizes.total - sizes.embedding - sizes.experts * missed + kv


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second read and written by a copy of `num_bytes`, the best of five."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * num_bytes / best


class Decoder:
    """Batches of equal sequences on one runner. A batch's sequences are dropped when the next one starts."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._step = 0
        self._num_sequences = 0
        self._live: tuple[int, ...] = ()

    def seconds(self, batch_size: int, context_len: int, num_steps: int) -> float:
        """Mean of a decode step, each launched before the result of the one before was taken."""
        seq_ids = self._prefill(batch_size, context_len, num_blocks_for(context_len + WARM_UP_STEPS + num_steps))
        self._decode(seq_ids, context_len, WARM_UP_STEPS)
        started = time.perf_counter()
        self._decode(seq_ids, context_len + WARM_UP_STEPS, num_steps)
        return (time.perf_counter() - started) / num_steps

    def _prefill(self, batch_size: int, context_len: int, num_blocks: int) -> tuple[int, ...]:
        seq_ids = tuple(range(self._num_sequences, self._num_sequences + batch_size))
        self._num_sequences += batch_size
        at_once = max(1, PREFILL_TOKENS // context_len)
        for begin in range(0, batch_size, at_once):
            chunk = seq_ids[begin : begin + at_once]
            starts = tuple(
                SequenceStart(seq_id, tuple((7 * seq_id + at) % 1000 for at in range(context_len)), context_len, GREEDY) for seq_id in chunk
            )
            tables = [tuple(range(1 + (begin + index) * num_blocks, 1 + (begin + index + 1) * num_blocks)) for index in range(len(chunk))]
            blocks = tuple((index, table, table) for index, table in enumerate(tables))
            size = len(chunk)
            drops, self._live = self._live, ()
            self._runner.step(StepPlan(self._step, starts, drops, chunk, (0,) * size, (context_len,) * size, (True,) * size, blocks))
            self._step += 1
        self._live = seq_ids
        return seq_ids

    def _decode(self, seq_ids: tuple[int, ...], context_len: int, num_steps: int) -> None:
        size = len(seq_ids)
        in_flight: deque[PendingStep] = deque()
        for length in range(context_len, context_len + num_steps):
            in_flight.append(self._runner.launch(StepPlan(self._step, (), (), seq_ids, (length,) * size, (1,) * size, (True,) * size)))
            self._step += 1
            if len(in_flight) == 2:
                in_flight.popleft().result()
        while in_flight:
            in_flight.popleft().result()


def report(options: argparse.Namespace, device: torch.device, tests: str) -> None:
    """Print the machine, the kernels and the speed of decode steps."""
    config = load_model_config(options.model)
    on_gpu = device.type == "cuda"
    model = load_model(options.model, config, dtype=torch.bfloat16, device=device)
    kernels = kernel_choices(model)
    bandwidth = copy_bandwidth(device, (1 << 30) if on_gpu else (1 << 27))
    print(f"tests/gpu   {tests}")
    print(f"device      {torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine()}")
    print(f"driver      {_driver() if on_gpu else 'none'}; torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"bandwidth   {bandwidth / 1e9:.0f} GB/s, by a copy")
    print(f"model       {options.model}, {model.weight_bytes / 1e9:.2f} GB of weights; context {options.context}, {options.steps} steps")
    for operation, implementation in kernels.items():
        print(f"kernel      {operation}: {implementation}")
    max_num_seqs, max_len = max(options.batch_sizes), options.context + WARM_UP_STEPS + options.steps + 1
    shape = (2, 1 + max_num_seqs * num_blocks_for(max_len), BLOCK_SIZE, model.num_kv_heads, config.head_dim)
    kv_caches = [torch.zeros(shape, dtype=model.dtype, device=device) for _ in model.layers]
    runner = Runner(model, kv_caches, max_num_seqs=max_num_seqs, max_model_len=max_len)
    blocking = not_capturable(kernels)
    if on_gpu and not blocking:
        graphs = runner.capture_graphs(lambda phase, done, total: None)
        print(f"graphs      {graphs.num_graphs}, {graphs.memory_bytes / 1e6:.0f} MB")
    else:
        print(
            f"graphs      none: {'not on a GPU' if not on_gpu else 'the kernels for ' + ' and '.join(blocking) + ' read back to the host'}"
        )
    decoder = Decoder(runner)
    print("\n batch   ms/step     tok/s   roofline ms   share of roofline")
    for batch_size in options.batch_sizes:
        seconds = decoder.seconds(batch_size, options.context, options.steps)
        middle = options.context + WARM_UP_STEPS + options.steps // 2
        least = decode_step_bytes(config, model.shard, "bfloat16", batch_size, middle) / bandwidth
        print(f"{batch_size:6d} {seconds * 1e3:9.2f} {batch_size / seconds:9.0f} {least * 1e3:13.3f} {least / seconds:19.1%}", flush=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _driver() -> str:
    """As nvidia-smi names it."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown (no nvidia-smi)"
    return said.stdout.split("\n")[0].strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-sizes", default="1,8,64,256", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--context", default=1024, type=int, help="tokens of each sequence before decoding")
    parser.add_argument("--steps", default=50, type=int)
    parser.add_argument("--skip-tests", action="store_true")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu-check: torch finds no CUDA device here, so nothing was checked", file=sys.stderr)
        return 2
    device = usable_device(options.device)
    tests = "skipped by --skip-tests"
    if not options.skip_tests:
        ran = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", "tests/gpu"], check=False)
        tests = "FAILED" if ran.returncode else "passed; skipped ones and why are above"
    report(options, device, tests)
    return int(tests == "FAILED")


if __name__ == "__main__":
    sys.exit(main())
