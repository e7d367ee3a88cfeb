"""The life of one rank, from loading its shard to running steps, independent of where its plans
come from."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.backend import architecture
from workers.config import EngineConfig, ModelConfig, longest_context
from workers.errors import ConfigError
from workers.kv_cache.memory import (
    GpuMemory,
    KVCachePlan,
    KVMemory,
    cache_shape,
    check_kv_dtype,
    cpu_kv_memory,
    gpu_kv_memory,
)
from workers.kv_cache.tensors import KV_TORCH_DTYPES, TORCH_DTYPES, allocate_kv_caches
from workers.model.checkpoint import LoadOptions, load_model
from workers.model.gpt_oss import GptOss
from workers.model_config import checkpoint_warnings
from workers.out_of_memory import WHAT_HELPS, is_out_of_memory
from workers.parallel.collectives import Collectives
from workers.parallel.shard import RankShard
from workers.rank.device import check_mxfp8
from workers.rank.kernel_table import describe_device, model_kernels, not_capturable, slow_paths
from workers.rank.logits import check_weights, sequence_logits
from workers.rank.memory_profile import profile_step, warm_up
from workers.rank.pending import PendingStep, UnsampledStep
from workers.rank.recorded.cpu_program import programs_run
from workers.rank.runner import Runner
from workers.scheduler.plan import StepMasks, StepPlan, StepResult

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 3600.0
"""Maximum seconds for the slowest rank to load its weights. A large checkpoint on a slow disk takes
long, and its progress is shown."""

Progress = Callable[[str, int, int], None]
"""Function called with (phase, done, total) during the start; total is 0 for a phase without steps
to count."""
Loader = Callable[..., GptOss]
"""Function that takes the arguments of `load_model` and returns the model."""


@dataclass(frozen=True, slots=True)
class RankLoaded:
    """A rank's report once its weights are loaded."""

    device: str
    weight_bytes: int
    kv_memory: KVMemory
    kernels: dict[str, str]


class LaunchedStep:
    """A plan that was launched.

    Args:
        failed: the result to return if the step fails.
        pending: None if the launch has failed; an UnsampledStep if it awaits masks: then call
            `sample` or `fail` before the next launch, and before `result`.
    """

    def __init__(self, failed: StepResult, pending: PendingStep | UnsampledStep | None = None) -> None:
        self._failed = failed
        self._pending = pending

    @property
    def awaits_masks(self) -> bool:
        """True until `sample` or `fail` is called, for a step that needs masks."""
        return isinstance(self._pending, UnsampledStep)

    def sample(self, masks: StepMasks) -> None:
        """Sample with these masks; a failure is a result with `error`."""
        assert isinstance(self._pending, UnsampledStep)
        try:
            self._pending = self._pending.sample(masks)
        except Exception as error:
            # As in `Rank.launch`.
            logger.exception("step %d failed", self._failed.step)
            self._failed = _result_of_failure(self._failed, error)
            self._pending = None

    def fail(self, sentence: str) -> None:
        """Give up a step whose masks do not come; the sentence becomes its error."""
        self._failed = replace(self._failed, error=sentence)
        self._pending = None

    @property
    def done(self) -> bool:
        """True if `result` returns at once, also for a step that fails."""
        if isinstance(self._pending, UnsampledStep):
            return False
        try:
            return self._pending is None or self._pending.done
        except RuntimeError:  # a kernel failed; `result` reports it
            return True

    def result(self) -> StepResult:
        """Wait for the step and return its result."""
        assert not isinstance(self._pending, UnsampledStep), "the step was not sampled"
        if self._pending is None:
            return self._failed
        try:
            return self._pending.result()
        except Exception as error:
            logger.exception("step %d failed", self._failed.step)
            return _result_of_failure(self._failed, error)


def _result_of_failure(failed: StepResult, error: Exception) -> StepResult:
    if not is_out_of_memory(error):
        return failed
    return replace(failed, error=f"there was no memory for step {failed.step}: {WHAT_HELPS}")


class Rank:
    """One rank: `load`, then `allocate`, then `step` (or `launch`) for each plan in order.

    Args:
        shard: this rank's part of the model.
        collectives: communication with the other ranks.
        ranks_on_host: ranks that share this host's memory and, on a CPU, its cores.
        progress: called at the start of each phase, and as tensors are loaded.
        loader: builds the model; called as `load_model`, the default, which reads the checkpoint.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        shard: RankShard,
        collectives: Collectives,
        *,
        device: torch.device,
        ranks_on_host: int = 1,
        progress: Progress | None = None,
        loader: Loader | None = None,
    ) -> None:
        self._config = config
        self._loader = loader
        self._model_config = model
        self._shard = shard
        self._collectives = collectives
        self._device = device
        self._ranks_on_host = ranks_on_host
        self._progress = progress or (lambda phase, done, total: None)
        self._model: GptOss | None = None
        self._runner: Runner | None = None
        self.phases_s: dict[str, float] = {}

    def load(self) -> RankLoaded:
        """Read this rank's weights and return how much memory is left for the KV cache.

        Raises:
            CheckpointError, ConfigError: with one sentence for the user.
        """
        check_kv_dtype(self._config.kv_dtype, architecture(self._device))
        if self._config.moe_activation_dtype == "mxfp8":
            check_mxfp8(
                architecture(self._device), self._config.quantize or self._model_config.experts_format
            )
        if self._loader is None and self._collectives.rank == 0:
            for sentence in checkpoint_warnings(self._config.model_path):
                logger.warning("%s", sentence)
        with self._phase("load weights"):
            self._model = (self._loader or load_model)(
                self._config.model_path,
                self._model_config,
                dtype=TORCH_DTYPES[self._config.dtype],
                device=self._device,
                shard=self._shard,
                collectives=self._collectives,
                options=LoadOptions(
                    quantize=self._config.quantize,
                    cpu_dense_dtype=self._config.cpu_dense_dtype,
                    moe_activation_dtype=self._config.moe_activation_dtype,
                    kv_dtype=KV_TORCH_DTYPES[self._config.kv_dtype],
                    allow_zero_weights=self._config.allow_zero_weights,
                ),
                progress=lambda done, total: self._progress("load weights", done, total),
            )
        kernels = model_kernels(self._model)
        for sentence in slow_paths(kernels, self._device):
            logger.warning("%s", sentence)
        if self._device.type == "cuda" and (blocking := not_capturable(kernels)):
            logger.warning(
                "no CUDA graphs: the kernels for %s read sizes back to the host", " and ".join(blocking)
            )
        table = {operation: str(chosen) for operation, chosen in kernels.items()}
        return RankLoaded(describe_device(self._device), self._model.weight_bytes, self._kv_memory(), table)

    def allocate(self, plan: KVCachePlan) -> None:
        """Allocate the KV cache and run a few tokens through the model. All ranks call this at the
        same time.

        Raises:
            CheckpointError: the weights are broken: the model's output is not finite, or is the
                same for every token.
            ConfigError: less memory is free than when the cache was sized.
        """
        with self._phase("allocate KV cache"):
            kv_caches = allocate_kv_caches(
                cache_shape(self._model_config, self._shard),
                plan,
                dtype=self._config.kv_dtype,
                device=self._device,
            )
        with self._phase("warm up"):
            assert self._model is not None
            self._enter_device()
            check_weights(self._model, self._config)
        runner = Runner(
            self._model,
            kv_caches,
            max_num_seqs=self._config.scheduler.max_num_seqs,
            max_model_len=plan.max_model_len,
        )
        if self._captures_graphs(self._model):
            with self._phase("capture graphs"):
                report = runner.capture_graphs(self._progress)
            logger.info(
                "captured %d CUDA graphs, which keep %.0f MiB",
                report.num_graphs,
                report.memory_bytes / 1024**2,
            )
        if (
            self._device.type == "cpu"
            and self._collectives.size == 1
            and programs_run()
            and not self._config.enforce_eager
        ):
            runner.record_programs()
        self._runner = runner

    def step(self, plan: StepPlan) -> StepResult:
        """Run one plan and return its result; a failure is a result with `error`."""
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> "LaunchedStep":
        """Start one plan, possibly before the result of the previous one was taken. If the plan
        awaits masks, rank 0 does not sample yet (`LaunchedStep.awaits_masks`). A failure is a
        result with `error`."""
        if self._runner is None:
            return LaunchedStep(StepResult(plan.step, error="the executor has shut down"))
        failed = StepResult(
            plan.step, error=f"step {plan.step} failed on rank {self._shard.tp_rank}; its log has the details"
        )
        try:
            self._enter_device()
            return LaunchedStep(failed, self._runner.launch(plan))
        except Exception as error:
            # The outermost frame of the rank: the protocol turns a failure into a result.
            logger.exception("step %d failed", plan.step)
            return LaunchedStep(_result_of_failure(failed, error))

    def logits(
        self, token_ids: Sequence[int], observe: Callable[[str, Tensor], None] | None = None
    ) -> Tensor | None:
        """Return the logits after each token of one sequence, computed in a KV cache of its own, so
        that running sequences are not disturbed. All ranks take part.

        Args:
            observe: as in `GptOss.forward`.
        Returns:
            [len(token_ids), vocab_size] fp32 on rank 0, None on the others.
        """
        assert self._model is not None, "the rank has not loaded"
        self._enter_device()
        return sequence_logits(self._model, self._config, token_ids, observe)

    def close(self) -> None:
        """Release weights and caches."""
        self._runner = None
        self._model = None

    def _enter_device(self) -> None:
        """Make this rank's device the current one of the calling thread. A new thread starts with
        GPU 0; Triton launches on the current device, and events are recorded there."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _captures_graphs(self, model: GptOss) -> bool:
        return (
            self._device.type == "cuda"
            and not self._config.enforce_eager
            and not not_capturable(model_kernels(model))
        )

    def _kv_memory(self) -> KVMemory:
        shape, config = cache_shape(self._model_config, self._shard), self._config
        if self._device.type == "cpu":
            return cpu_kv_memory(
                shape,
                config.cache,
                config.scheduler,
                dtype=config.kv_dtype,
                max_model_len=config.max_model_len,
                ranks_on_host=self._ranks_on_host,
            )
        model, limits = (
            self._model,
            (config.scheduler, longest_context(shape, config.max_model_len), config.kv_dtype),
        )
        assert model is not None
        self._collectives.meet("load weights", LOAD_TIMEOUT_S)
        # Before the profile, since compiled kernels take memory too.
        with self._phase("compile kernels"):
            warm_up(model, *limits)
            self._collectives.meet("compile kernels", LOAD_TIMEOUT_S)  # rank 0 compiles more
        with self._phase("profile memory"):
            taken = profile_step(model, *limits, graphs=self._captures_graphs(model))
        free, total = torch.cuda.mem_get_info(self._device)
        return gpu_kv_memory(
            shape,
            config.cache,
            config.scheduler,
            dtype=config.kv_dtype,
            max_model_len=config.max_model_len,
            gpu=GpuMemory(
                total_bytes=total,
                used_bytes=total - free,
                activation_bytes=taken.activation_bytes,
                graph_bytes=taken.graph_bytes,
            ),
        )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._progress(name, 0, 0)
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                raise ConfigError(f"there was no memory to {name}: {WHAT_HELPS}") from error
            raise
        self.phases_s[name] = time.perf_counter() - started
