"""Check a GPU machine and print a report: the tests of tests/gpu, then decode speed against the memory roofline.

    make gpu-check                                # random weights of the tiny shape, or MODEL=checkpoints/gpt-oss-20b

This was written on machines without a GPU. It has run with `--device cpu`, which proves the script but says nothing of a GPU.

The roofline of a decode step is the time to read its weights and keys once: all dense weights, the experts that are hit (E * (1 - (1 - k/E)^B)
of them for B tokens, if choices were independent), and the keys and values of B contexts, at the bandwidth that a large copy on the device reaches.
"""

import argparse
import contextlib
import platform
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import torch

from kernels.mxfp4 import PackedMXFP4
from workers.config import BLOCK_SIZE, ModelConfig, load_model_config
from workers.executor.cuda_graph import not_capturable
from workers.executor.rank import kernel_names, usable_device
from workers.executor.runner import PendingStep, Runner
from workers.kv_cache.manager import num_blocks_for
from workers.model.checkpoint import load_model
from workers.model.gpt_oss import GptOss
from workers.request import SamplingParams
from workers.scheduler.plan import SequenceStart, StepPlan

WARM_UP_STEPS = 5
PREFILL_TOKENS = 8192


def decode_step_bytes(model: ModelConfig, dense_bytes: int, expert_bytes: int, batch_size: int, context_len: int, itemsize: int) -> float:
    """Bytes that a decode step must read.

    Args:
        dense_bytes: of all weights but the experts and the embedding, of which only a row a token is read.
        expert_bytes: of all experts of all layers.
        itemsize: bytes of a cached key or value element.
    """
    missed: float = (1 - model.num_experts_per_token / model.num_experts) ** batch_size
    keys = sum(min(context_len, window or context_len) for window in model.layer_windows)
    kv_bytes = 2 * keys * model.num_kv_heads * model.head_dim * itemsize
    return dense_bytes + expert_bytes * (1 - missed) + batch_size * kv_bytes


def weight_split(model: GptOss) -> tuple[int, int]:
    """(dense bytes without the embedding, bytes of all experts)."""
    expert_bytes = 0
    for layer in model.layers:
        for weights in (layer.experts.gate_up, layer.experts.down):
            expert_bytes += weights.num_bytes if isinstance(weights, PackedMXFP4) else weights.nbytes
    return model.weight_bytes - expert_bytes - model.embedding.nbytes, expert_bytes


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


def decode_seconds(runner: Runner, batch_size: int, context_len: int, num_steps: int, first_step: int) -> tuple[float, int]:
    """(mean seconds of a decode step launched ahead of its result, the next step's number). Sequences come and go within the call."""
    blocks_each = num_blocks_for(context_len + num_steps + WARM_UP_STEPS + 1)
    greedy = SamplingParams(temperature=0, seed=0)
    step, at_once = first_step, max(1, PREFILL_TOKENS // context_len)
    seq_ids = tuple(range(first_step * 10_000, first_step * 10_000 + batch_size))
    for begin in range(0, batch_size, at_once):
        chunk = seq_ids[begin : begin + at_once]
        starts = tuple(
            SequenceStart(seq_id, tuple((7 * seq_id + at) % 1000 for at in range(context_len)), context_len, greedy) for seq_id in chunk
        )
        new_blocks = []
        for index in range(len(chunk)):
            first = 1 + (begin + index) * blocks_each
            new_blocks.append((index, tuple(range(first, first + blocks_each)), tuple(range(first, first + blocks_each))))
        size = len(chunk)
        runner.step(StepPlan(step, starts, (), chunk, (0,) * size, (context_len,) * size, (True,) * size, tuple(new_blocks)))
        step += 1
    in_flight: deque[PendingStep] = deque()
    started = time.perf_counter()
    for number in range(WARM_UP_STEPS + num_steps):
        if number == WARM_UP_STEPS:
            while in_flight:
                in_flight.popleft().result()
            started = time.perf_counter()
        plan = StepPlan(step, (), (), seq_ids, (context_len + number,) * batch_size, (1,) * batch_size, (True,) * batch_size)
        in_flight.append(runner.launch(plan))
        step += 1
        if len(in_flight) == 2:
            in_flight.popleft().result()
    while in_flight:
        in_flight.popleft().result()
    seconds = (time.perf_counter() - started) / num_steps
    # One token of a new sequence carries the drops.
    last = SequenceStart(seq_ids[-1] + 1, (1,), 1, greedy)
    runner.step(StepPlan(step, (last,), seq_ids, (last.seq_id,), (0,), (1,), (True,), ((0, (1,), (1,)),)))
    _DROPS.append(last.seq_id)
    return seconds, step + 1


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
        tests = "passed" if subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"], check=False).returncode == 0 else "FAILED"
    report(options, device, tests)
    return int(tests == "FAILED")
