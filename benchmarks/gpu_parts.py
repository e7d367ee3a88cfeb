"""Measurements of `benchmarks/gpu_check.py`, part by part. Each part returns a result that is
written as JSON, numbers in SI units and the words around them; `gpu_report.py` makes tables of
it."""

import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.decode_batches import (
    WARM_UP_STEPS,
    Batch,
    Decoder,
    decode_batch,
    decode_step_bytes,
    random_caches,
    what_fits,
)
from benchmarks.gpu_attempts import Attempts, Result
from benchmarks.gpu_timing import Timing, copy_bandwidth, fastest_gemm, l2_cache_bytes, timed, warm_up
from benchmarks.random_model import random_model
from kernels.backend import architecture, has_triton, triton_runs_on
from kernels.mxfp4 import choose_layout
from kernels.sampling import LogitBias, Penalties, SamplingBatch, sample
from workers.config import BLOCK_SIZE, Dtype, ModelConfig, ParallelConfig, SchedulerConfig
from workers.kv_cache.memory import DTYPE_BYTES, host_free_bytes
from workers.kv_cache.tensors import TORCH_DTYPES
from workers.model.checkpoint import load_model
from workers.model.gpt_oss import GptOss
from workers.model.make_checkpoint import preset_config
from workers.model.sizes import count_parameters, rank_bytes
from workers.model_config import load_model_config
from workers.parallel.shard import plan_shards
from workers.rank.kernel_table import model_kernels, not_capturable
from workers.rank.memory_profile import largest_batch
from workers.rank.runner import Runner

DTYPE: Dtype = "bfloat16"
PRESETS = ("120b", "20b", "small")
"""Presets, largest first; the first that fits is the default on a GPU."""
TIMED_LAYERS = 8
"""Number of layers whose launches are kept with all that they read and write, for batches above
SMALL_BATCH; of a smaller batch, all layers': together their weights then are more than an L2 cache
holds."""
SMALL_BATCH = 8


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of the measurements.

    Attributes:
        model: a checkpoint's folder; None: random weights of `preset`.
        preset: one of `cantata make-checkpoint`; None: the largest of PRESETS that fits, on a CPU
            `tiny`.
        batch_sizes, contexts: each with each; those for which there is no room are left out.
        steps: number of decode steps that are timed.
        prompts: number of tokens of each prefill that is timed.
    """

    device: torch.device
    model: Path | None
    preset: str | None
    batch_sizes: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int
    prompts: tuple[int, ...]

    @property
    def batches(self) -> list[Batch]:
        return [Batch(size, context) for context in self.contexts for size in self.batch_sizes]

    @property
    def num_steps(self) -> int:
        """Number of steps in a batch's life."""
        return WARM_UP_STEPS + self.steps + 1


def measure_device(options: Options, attempts: Attempts) -> None:
    """Measure the machine and its best rates."""
    device = options.device
    on_gpu = device.type == "cuda"
    about = {
        "name": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "architecture": architecture(device),
        "memory_bytes": torch.cuda.mem_get_info(device)[1] if on_gpu else host_free_bytes(),
        "driver": _driver() if on_gpu else "none",
        "torch": torch.__version__,
        "triton": _triton_version(),
    }
    attempts.begin(about | _card(device))


def measure_step(options: Options, attempts: Attempts) -> None:
    """Measure whole decode steps, sampling among it, against the bytes that they must read."""
    found = ChosenModel(options)
    model, config, batches = found.model, found.model.config, found.batches
    kernels = model_kernels(model)
    result = attempts.begin(
        found.about | {"kernels": {operation: str(chosen) for operation, chosen in kernels.items()}},
        lists=("steps",),
    )
    longest = max(batch.context for batch in batches) + options.num_steps
    caches = random_caches(model, batches, options.num_steps)

    result |= _card(options.device)
    bandwidth = result["bandwidth"]
    blocking = not_capturable(kernels)

    def new_runner() -> Runner:
        return Runner(model, caches, max_num_seqs=max(batch.size for batch in batches), max_model_len=longest)

    def new_decoder(first: str) -> Decoder:
        runner = new_runner()

        def capture() -> None:
            graphs = runner.capture_graphs(lambda phase, done, total: None)
            result["graphs"] = f"{graphs.num_graphs}, which keep {graphs.memory_bytes / 1e6:.0f} MB"

        if blocking or options.device.type != "cuda":
            why = (
                f"the kernels for {' and '.join(blocking)} read back to the host"
                if blocking
                else "not on a GPU"
            )
            result["graphs"] = f"none: {why}"
        elif not attempts.run(f"capture graphs, before {first}", capture, again=True):
            result["graphs"] = "none: capturing them failed"
            runner = new_runner()
        return Decoder(runner, config, options.steps, options.device)

    def time(decoder: Decoder, batch: Batch) -> None:
        took = decoder.time(batch)
        middle = batch.context + WARM_UP_STEPS + options.steps // 2
        least = decode_step_bytes(config, model.shard, DTYPE, batch.size, middle)
        row = (
            asdict(batch)
            | asdict(took)
            | {"graphs": result["graphs"], "least_bytes": least, "share": least / bandwidth / took.seconds}
        )
        result["steps"].append(row)

    decoder: Decoder | None = None
    for batch in batches:
        name = _named(batch)
        if attempts.was_tried(name):
            continue
        decoder = decoder or new_decoder(name)
        if not attempts.run(name, partial(time, decoder, batch)):
            # Its sequences are half-way through a step.
            decoder = None


def measure_kernels(options: Options, attempts: Attempts) -> None:
    """Measure each launch of a decode step by itself, replayed layer after layer, against the bytes
    that it reads and writes."""
    if not triton_runs_on(options.device):
        attempts.begin({"skipped": "no Triton kernels run here"})
        return
    found = ChosenModel(options)
    card = _card(options.device)
    result = attempts.begin(found.about | card, lists=("batches",))
    for batch in found.batches:
        rows = next(
            (
                rows
                for rows in result["batches"]
                if _named(Batch(rows["size"], rows["context"])) == _named(batch)
            ),
            None,
        )
        if rows is None:
            rows = asdict(batch) | {"launches": [], "around": []}
            result["batches"].append(rows)
        attempts.run(_named(batch), partial(_launches, found.model, batch, card, rows, attempts), again=True)


@torch.inference_mode()
def _launches(model: GptOss, batch: Batch, card: Result, rows: Result, attempts: Attempts) -> None:
    """Measure the launches into `rows`."""
    from benchmarks.decode_traffic import ByteCounter
    from benchmarks.launch_recorder import RecordedLaunch, recording_launches, split_layers

    num_layers = len(model.layers) if batch.size <= SMALL_BATCH else min(TIMED_LAYERS, len(model.layers))
    config = replace(
        model.config, num_layers=num_layers, layer_windows=model.config.layer_windows[:num_layers]
    )
    part = replace(model, config=config, layers=model.layers[:num_layers])
    caches, inputs = random_caches(part, [batch], 0), decode_batch(part, batch)

    def step() -> None:
        logits = part.compute_logits(part.forward(inputs, caches))
        assert logits is not None
        sample(logits, SamplingBatch())

    step()
    with recording_launches(compute=True) as recorded:
        step()
    before, layers, after = split_layers(recorded)
    rows["layers_timed"] = num_layers

    def time(launches: list[RecordedLaunch], row: Result, num_bytes: float) -> None:
        took = timed([launch.again for launch in launches], model.device)
        share = num_bytes / card["bandwidth"] / took.best_s
        cached = stays_in_cache(num_bytes * len(launches), card["l2_bytes"])
        rows["launches"].append(row | _seconds(took) | {"bytes": num_bytes, "share": share, "in_l2": cached})

    def time_around(launch: RecordedLaunch) -> None:
        rows["around"].append({"name": launch.name} | _seconds(timed([launch.again], model.device)))

    warm_up(model.device)

    for window in sorted(set(config.layer_windows), key=lambda window: window or 0):
        alike = [layer for layer, of in zip(layers, config.layer_windows, strict=True) if of == window]
        count = ByteCounter(part, caches, window, batch.size, batch.context)
        for index, first in enumerate(alike[0]):
            num_bytes = count(first).total_bytes
            occurrence = [launch.name for launch in alike[0][:index]].count(first.name)
            row = {"window": window, "name": first.name, "occurrence": occurrence}
            launches = [layer[index] for layer in alike]
            name = f"{_named(batch)}, window {window}, {first.name} {occurrence}"
            attempts.run(name, partial(time, launches, row, num_bytes))
    for index, launch in enumerate((*before, *after)):
        name = f"{_named(batch)}, around the layers, {launch.name} {index}"
        attempts.run(name, partial(time_around, launch))


def _named(batch: Batch) -> str:
    return f"{batch.size} x {batch.context}"


def stays_in_cache(num_bytes: float, l2_bytes: int) -> bool:
    """Return whether launches that read and write this many bytes in turn may find some of them in
    the second-level cache again: then their time is not that of memory, and their share of its
    bandwidth can be above 100 %."""
    return num_bytes < 2 * l2_bytes


def _seconds(took: Timing) -> Result:
    return {"seconds": took.best_s, "median_s": took.median_s}


def measure_prefill(options: Options, attempts: Attempts) -> None:
    """Measure one step of prompts of one sequence, against the products that it needs."""
    found = ChosenModel(options)
    model, config = found.model, found.model.config
    card = _card(options.device)
    result = attempts.begin(found.about | card, lists=("prompts",))

    def time(num_tokens: int) -> None:
        batch = largest_batch(SchedulerConfig(1, num_tokens), num_tokens, options.device)
        batch.token_ids.remainder_(config.vocab_size)
        blocks = torch.arange(1, 2 + num_tokens // BLOCK_SIZE, dtype=torch.int32, device=options.device)[None]
        slots = batch.positions + BLOCK_SIZE
        batch = replace(
            batch,
            block_table_full=blocks,
            block_table_sliding=blocks,
            slot_mapping_full=slots,
            slot_mapping_sliding=slots,
        )
        shape = (2, 2 + num_tokens // BLOCK_SIZE, BLOCK_SIZE, model.num_kv_heads, config.head_dim)
        # All layers share a cache: none of them reads what another wrote, since each writes all of
        # it first.
        caches = [torch.zeros(shape, dtype=model.dtype, device=options.device)] * len(model.layers)

        @torch.inference_mode()
        def prefill() -> Tensor | None:
            return model.compute_logits(model.forward(batch, caches)[batch.sample_indices])

        warm_up(options.device)
        took = timed([prefill], options.device, graph=False)
        flops = prefill_flops(config, num_tokens)
        share = flops / card["gemm"]["flops_per_s"] / took.best_s
        result["prompts"].append({"tokens": num_tokens, "flops": flops, "share": share} | _seconds(took))

    for num_tokens in options.prompts:
        attempts.run(f"{num_tokens} tokens", partial(time, num_tokens))


def prefill_flops(config: ModelConfig, num_tokens: int) -> float:
    """Return the operations of the matrix products of one prompt: the weights that a token uses,
    the keys that it sees, and the logits of the last token."""
    active = count_parameters(config)[1] - config.vocab_size * config.hidden_size
    keys = sum(_keys_seen(num_tokens, window) for window in config.layer_windows)
    return (
        2 * active * num_tokens
        + 2 * config.vocab_size * config.hidden_size
        + 4 * config.num_heads * config.head_dim * keys
    )


def _keys_seen(num_tokens: int, window: int | None) -> int:
    """Return the number of keys seen by all queries of a prompt together."""
    seen = num_tokens if window is None else min(window, num_tokens)
    return seen * (seen + 1) // 2 + (num_tokens - seen) * seen


def measure_sampling(options: Options, attempts: Attempts) -> None:
    """Measure each way to sample, against one pass over the logits."""
    vocab = (
        load_model_config(options.model)
        if options.model
        else preset_config(options.preset or ("small" if options.device.type == "cuda" else "tiny"))
    ).vocab_size
    card = _card(options.device)
    result = attempts.begin({"vocab": vocab} | card, lists=("ways",))

    def time(logits: Tensor, name: str, batch: SamplingBatch) -> None:
        took = timed([lambda: sample(logits, batch)], options.device)
        passes = took.best_s / (logits.nbytes / card["bandwidth"])
        row = {
            "rows": len(logits),
            "way": name,
            "passes": passes,
            "in_l2": stays_in_cache(logits.nbytes, card["l2_bytes"]),
        }
        result["ways"].append(row | _seconds(took))

    for rows in options.batch_sizes:
        logits = torch.randn(rows, vocab, device=options.device) * 2
        warm_up(options.device)
        for name, batch in sampling_ways(rows, vocab, options.device).items():
            attempts.run(f"{name}, {rows} rows", partial(time, logits, name, batch))


def sampling_ways(rows: int, vocab: int, device: torch.device) -> dict[str, SamplingBatch]:
    """Return the ways to sample, each the same for all rows."""
    index = torch.arange(rows, device=device)
    ones, counts = torch.ones(rows, device=device), torch.ones(rows, dtype=torch.int32, device=device)
    tokens = index * 31 % vocab
    random = SamplingBatch(ones, index, index)
    return {
        "greedy": SamplingBatch(),
        "temperature": random,
        "top-p 0.9": replace(random, top_p=ones * 0.9),
        "top-k 40": replace(random, top_k=torch.full_like(index, 40)),
        "top-k 40, top-p 0.9": replace(random, top_k=torch.full_like(index, 40), top_p=ones * 0.9),
        "greedy, 5 log probabilities": SamplingBatch(logprob_rows=index, num_top_logprobs=5),
        "greedy, bias and penalties": SamplingBatch(
            logit_bias=LogitBias(index, tokens, ones),
            penalties=Penalties(index, tokens, counts, ones, ones, ones * 1.1),
        ),
    }


PARTS: dict[str, Callable[[Options, Attempts], None]] = {
    "device": measure_device,
    "step": measure_step,
    "kernels": measure_kernels,
    "prefill": measure_prefill,
    "sampling": measure_sampling,
}


class ChosenModel:
    """The model that is measured, and the batches that there is room for beside it.

    Args:
        branch_exponent: exponent of random weights, see `random_model`.
    """

    def __init__(self, options: Options, *, branch_exponent: int = 0) -> None:
        device = options.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_free_bytes()
        config, name = self._choose(options, free)
        left = free - _weight_bytes(config)
        self.batches = what_fits(config, options.batches, options.num_steps, DTYPE_BYTES[DTYPE], left)
        if not self.batches:
            raise SystemExit(
                f"--batch-sizes, --contexts: beside {name} {left / 2**30:.1f} GiB are free, too little for "
                f"any of " + ", ".join(f"{batch.size} x {batch.context}" for batch in options.batches)
            )
        if options.model is None:
            self.model = random_model(config, device, choose_layout(device), branch_exponent=branch_exponent)
        else:
            self.model = load_model(options.model, config, dtype=TORCH_DTYPES[DTYPE], device=device)
        self.about: Result = {
            "model": name,
            "weight_bytes": self.model.weight_bytes,
            "left_out": [asdict(batch) for batch in options.batches if batch not in self.batches],
        }

    def _choose(self, options: Options, free: int) -> tuple[ModelConfig, str]:
        if options.model is not None:
            return load_model_config(options.model), str(options.model)
        names = (
            [options.preset] if options.preset else [*PRESETS] if options.device.type == "cuda" else ["tiny"]
        )
        item = DTYPE_BYTES[DTYPE]
        for name in names:
            config = preset_config(name)
            if what_fits(config, options.batches, options.num_steps, item, free - _weight_bytes(config)):
                return config, f"{name}, random weights"
        raise SystemExit(
            f"{', '.join(names)}: none of these fits into {free / 2**30:.1f} GiB with a batch of the given "
            f"sizes"
        )


def _weight_bytes(config: ModelConfig) -> int:
    (shard,) = plan_shards(config, ParallelConfig())
    return rank_bytes(config, shard, DTYPE).total


def _card(device: torch.device) -> Result:
    """Return the best rates that this device reaches, shown beside the results of a table."""
    return {
        "bandwidth": _bandwidth(device),
        "gemm": asdict(fastest_gemm(device)),
        "l2_bytes": l2_cache_bytes(device),
    }


def _bandwidth(device: torch.device) -> float:
    return copy_bandwidth(device, (1 << 30) if device.type == "cuda" else (1 << 27))


def _triton_version() -> str:
    if not has_triton():
        return "none"
    import triton

    return str(triton.__version__)


def _driver() -> str:
    """Return the driver's version as nvidia-smi reports it."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown (no nvidia-smi)"
    return said.stdout.split("\n")[0].strip() or "unknown"
