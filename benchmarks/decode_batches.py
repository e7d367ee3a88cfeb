"""Batches of equal sequences that decode over a KV cache of random keys and values: no prompt was
computed, so a step of any context can be timed at once. The batches for which a device has room
follow from arithmetic."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_timing import Timing, warm_up
from workers.config import BLOCK_SIZE, Dtype, ModelConfig
from workers.kv_cache.manager import num_blocks_for
from workers.model.gpt_oss import GptOss
from workers.model.sizes import expected_experts_hit, rank_bytes, sequence_kv_bytes
from workers.model.step_batch import StepBatch
from workers.parallel.shard import RankShard
from workers.rank.runner import PendingStep, Runner
from workers.request import SamplingParams
from workers.scheduler.plan import SequenceStart, StepPlan

WARM_UP_STEPS = 5
RUNS = 5
GREEDY = SamplingParams(temperature=0, seed=0)
RESERVE_BYTES = 4 << 30
"""Bytes of a GPU reserved for its context, libraries, graphs, and activations besides logits and
attention's scratch."""
_MOST_SPLITS = 64
_SPLIT_BYTES = 4
_FIRST_BLOCK = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences that decode, and the number of tokens before the first step."""

    size: int
    context: int


def decode_step_bytes(
    model: ModelConfig, shard: RankShard, dtype: Dtype, batch_size: int, context_len: int
) -> float:
    """Return the bytes that a rank must read in a decode step of batch_size sequences of
    context_len tokens; of the embedding only a row each."""
    sizes = rank_bytes(model, shard, dtype)
    missed = 1 - expected_experts_hit(model, batch_size) / model.num_experts
    kv = batch_size * sequence_kv_bytes(model, shard, dtype, context_len)
    return sizes.total - sizes.embedding - sizes.experts * missed + kv


def cache_blocks(model: ModelConfig, batch: Batch, num_steps: int) -> tuple[int, int]:
    """Return (blocks of a full layer, blocks of a sliding one) for `num_steps` more tokens,
    NULL_BLOCK included. In a sliding layer a sequence has its window's blocks, used in turn."""
    full = num_blocks_for(batch.context + num_steps)
    return _FIRST_BLOCK + batch.size * full, _FIRST_BLOCK + batch.size * min(full, _window_blocks(model))


def batches_bytes(model: ModelConfig, batches: Sequence[Batch], num_steps: int, item: int) -> int:
    """Return the bytes that a runner of these batches takes besides the weights and RESERVE_BYTES:
    its KV cache, logits and attention's scratch.

    Args:
        item: bytes of a cached number.
    """
    blocks = _most_blocks(model, batches, num_steps)
    cache = (
        2
        * BLOCK_SIZE
        * model.num_kv_heads
        * model.head_dim
        * item
        * sum(blocks[window is not None] for window in model.layer_windows)
    )
    most = max(batch.size for batch in batches)
    logits = 3 * most * model.vocab_size * 4
    scratch = 2 * most * model.num_heads * _MOST_SPLITS * model.head_dim * _SPLIT_BYTES
    return cache + logits + scratch


def what_fits(
    model: ModelConfig, batches: Sequence[Batch], num_steps: int, item: int, free_bytes: int
) -> list[Batch]:
    """Return the batches for which there is room together, the first ones first.

    Args:
        free_bytes: bytes free besides the weights.
    """
    fits: list[Batch] = []
    for batch in batches:
        if batches_bytes(model, [*fits, batch], num_steps, item) <= free_bytes - RESERVE_BYTES:
            fits.append(batch)
    return fits


def _most_blocks(model: ModelConfig, batches: Sequence[Batch], num_steps: int) -> tuple[int, int]:
    full, sliding = zip(*(cache_blocks(model, batch, num_steps) for batch in batches), strict=True)
    return max(full), max(sliding)


def random_caches(model: GptOss, batches: Sequence[Batch], num_steps: int) -> list[Tensor]:
    """Return a cache for each layer, large enough for any of the batches."""
    most = _most_blocks(model.config, batches, num_steps)
    caches = []
    for window in model.config.layer_windows:
        shape = (2, most[window is not None], BLOCK_SIZE, model.num_kv_heads, model.config.head_dim)
        caches.append(torch.empty(shape, dtype=model.dtype, device=model.device).normal_())
    return caches


def block_tables(
    model: ModelConfig, batch: Batch, num_steps: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return (full, sliding) block ids of each sequence."""
    length, window = num_blocks_for(batch.context + num_steps), _window_blocks(model)
    ring = min(length, window)
    full = [
        tuple(range(_FIRST_BLOCK + seq * length, _FIRST_BLOCK + (seq + 1) * length))
        for seq in range(batch.size)
    ]
    sliding = [
        tuple(_FIRST_BLOCK + seq * ring + block % ring for block in range(length))
        for seq in range(batch.size)
    ]
    return full, sliding


def decode_batch(model: GptOss, batch: Batch) -> StepBatch:
    """Return the model's input in which each sequence computes its token at position context -
    1."""
    full, sliding = (torch.tensor(table, dtype=torch.int32) for table in block_tables(model.config, batch, 0))
    at, block = batch.context - 1, (batch.context - 1) // BLOCK_SIZE
    slots = [
        (table[:, block].long() * BLOCK_SIZE + at % BLOCK_SIZE).to(model.device) for table in (full, sliding)
    ]
    token_ids = torch.arange(batch.size, dtype=torch.int64) * 7919 % model.config.vocab_size
    return StepBatch(
        token_ids=token_ids.to(model.device),
        positions=torch.full((batch.size,), at, dtype=torch.int64, device=model.device),
        slot_mapping_full=slots[0],
        slot_mapping_sliding=slots[1],
        block_table_full=full.to(model.device),
        block_table_sliding=sliding.to(model.device),
        context_lens=torch.full((batch.size,), batch.context, dtype=torch.int32, device=model.device),
        cu_seqlens_q=torch.arange(batch.size + 1, dtype=torch.int32, device=model.device),
        sample_indices=torch.arange(batch.size, device=model.device),
        max_query_len=1,
    )


@dataclass(frozen=True, slots=True)
class StepTime:
    """Times of the decode steps of a run, as means unless stated.

    Attributes:
        seconds: time from step to step, in the best run.
        launch_s: time of the host to launch a step, in the best run by that.
        median_s: time from step to step, in the median run.
    """

    seconds: float
    launch_s: float
    median_s: float


class Decoder:
    """A timer of batches on one runner. A batch's sequences are dropped when the next one starts.

    Args:
        num_steps: number of steps that are timed, in RUNS runs; WARM_UP_STEPS come before.
        device: the device whose clocks are brought up before a batch is timed.
    """

    def __init__(self, runner: Runner, model: ModelConfig, num_steps: int, device: torch.device) -> None:
        self._runner = runner
        self._device = device
        self._model = model
        self._num_steps = num_steps
        self._step = 0
        self._num_sequences = 0
        self._live: tuple[int, ...] = ()

    def time(self, batch: Batch) -> StepTime:
        """Return the time of a decode step, each launched before the previous result was taken."""
        self._start(batch)
        warm_up(self._device)
        self._decode(batch.context, WARM_UP_STEPS)
        context, step_s, launch_s = batch.context + WARM_UP_STEPS, [], []
        for run in range(num_runs := min(RUNS, self._num_steps)):
            num_steps = (self._num_steps + run) // num_runs
            started = time.perf_counter()
            launch_s.append(self._decode(context, num_steps) / num_steps)
            step_s.append((time.perf_counter() - started) / num_steps)
            context += num_steps
        steps = Timing.of(step_s)
        return StepTime(steps.best_s, min(launch_s), steps.median_s)

    def _start(self, batch: Batch) -> None:
        """Run the first step: all but the last token of each sequence count as computed."""
        seq_ids = tuple(range(self._num_sequences, self._num_sequences + batch.size))
        self._num_sequences += batch.size
        vocab, length, size = self._model.vocab_size, batch.context, batch.size
        starts = tuple(
            SequenceStart(seq_id, tuple((7919 * seq_id + at) % vocab for at in range(length)), length, GREEDY)
            for seq_id in seq_ids
        )
        tables = zip(*block_tables(self._model, batch, WARM_UP_STEPS + self._num_steps + 1), strict=True)
        blocks = tuple((index, *pair) for index, pair in enumerate(tables))
        drops, self._live = self._live, seq_ids
        self._runner.step(
            StepPlan(
                self._step, starts, drops, seq_ids, (length - 1,) * size, (1,) * size, (True,) * size, blocks
            )
        )
        self._step += 1

    def _decode(self, context: int, num_steps: int) -> float:
        """Run the steps; return the seconds that launching took."""
        seq_ids, size = self._live, len(self._live)
        in_flight: deque[PendingStep] = deque()
        launch_s = 0.0
        for length in range(context, context + num_steps):
            plan = StepPlan(self._step, (), (), seq_ids, (length,) * size, (1,) * size, (True,) * size)
            started = time.perf_counter()
            in_flight.append(self._runner.launch(plan))
            launch_s += time.perf_counter() - started
            self._step += 1
            if len(in_flight) == 2:
                in_flight.popleft().result()
        while in_flight:
            in_flight.popleft().result()
        return launch_s


def _window_blocks(model: ModelConfig) -> int:
    """Return the blocks of a window that begins inside a block, and of the block that is written
    next."""
    return num_blocks_for(model.sliding_window or BLOCK_SIZE) + 2
