"""Runs the parts of `benchmarks/gpu_check.py` on a GPU that is absent: each makes its launches, and
times nothing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

from benchmarks import gpu_llm, gpu_parts, gpu_probe
from benchmarks.absent_gpu import META, meta_as
from benchmarks.decode_batches import random_caches
from benchmarks.gpu_attempts import FAILURES, Attempts
from benchmarks.gpu_parts import ChosenModel, Options
from benchmarks.gpu_timing import Timing, Work
from kernels.cpu.roofline import Gemm
from workers.config import ModelConfig
from workers.model.make_checkpoint import preset_config
from workers.rank.runner import Runner

MEMORY_BYTES = 79 << 30
"""Free memory of an H100, in bytes."""
LAYERS = 2
"""Layers kept of a preset: one of each window; the others launch the same kernels."""
PARTS: tuple[Callable[[Options, Attempts], None], ...] = (
    gpu_probe.decode_ways,
    gpu_parts.measure_step,
    gpu_parts.measure_kernels,
    gpu_parts.measure_prefill,
    gpu_parts.measure_sampling,
    gpu_llm.start_engine,
)


def launch_parts(target: str, options: Options) -> list[str]:
    """Run the parts; return the failures, a line each.

    Args:
        options: settings with a preset, and META for the device.
    """
    failures = []
    with _parts_on_meta(target):
        for part in (*PARTS, _graphs):
            attempts = Attempts(META)
            part(options, attempts)
            failures += [
                f"{part.__name__}: {failure['what']}: {failure['error']}"
                for failure in attempts.result.get(FAILURES, ())
            ]
    return failures


def _graphs(options: Options, attempts: Attempts) -> None:
    """Capture the graphs of the steps, which `measure_step` captures where the device is a GPU by
    its type."""
    found = ChosenModel(options)
    sizes, contexts = ([getattr(batch, name) for batch in found.batches] for name in ("size", "context"))
    caches = random_caches(found.model, found.batches, options.num_steps)

    def capture() -> None:
        runner = Runner(
            found.model, caches, max_num_seqs=max(sizes), max_model_len=max(contexts) + options.num_steps
        )
        runner.capture_graphs(lambda phase, done, total: None)

    attempts.run("capture graphs", capture)


@contextmanager
def _parts_on_meta(target: str) -> Iterator[None]:
    def once(works: Sequence[Work], *args: object, **options: object) -> Timing:
        for work in works:
            work()
        return Timing(1.0, 1.0)

    def short_preset(name: str) -> ModelConfig:
        config = preset_config(name)
        return replace(config, num_layers=LAYERS, layer_windows=config.layer_windows[:LAYERS])

    with ExitStack() as stack:
        stack.enter_context(meta_as(target))
        for name, replacement in {
            "preset_config": short_preset,
            "timed": once,
            "_bandwidth": lambda device: 1e12,
            "fastest_gemm": lambda device: Gemm("bf16", 8192, 1e15),
            "host_free_bytes": lambda: MEMORY_BYTES,
        }.items():
            stack.enter_context(mock.patch.object(gpu_parts, name, replacement))
        yield
