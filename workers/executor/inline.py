"""InlineExecutor: one rank, in the engine's own process and thread."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from torch import Tensor

from workers.config import EngineConfig, ModelConfig
from workers.errors import RankCrashed
from workers.executor.base import ExecutorInfo
from workers.kv_cache.memory import plan_kv_cache
from workers.parallel.collectives import Alone
from workers.parallel.shard import plan_shards
from workers.rank.device import check_memory, prepare_device
from workers.rank.rank import LaunchedStep, Loader, Progress, Rank
from workers.scheduler.masks import MasksFailed, wait_for_masks
from workers.scheduler.plan import StepMasks, StepPlan, StepResult


class InlineExecutor:
    """Runs plans in the caller's thread. On a GPU their results come later, so that the next plan
    can be made meanwhile.

    Args:
        config: its parallel plan has one rank.
        progress: called with each phase as it starts, and with the tensors loaded.
        loader: as in `Rank`; it then provides the memory for the weights itself.
    Attributes:
        crash: always None, since a crash ends this process.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        *,
        progress: Progress | None = None,
        loader: Loader | None = None,
    ) -> None:
        assert config.parallel.tensor == 1, "several ranks need their own processes"
        self._config = config
        self._model = model
        self._progress = progress
        self._loader = loader
        self.crash: RankCrashed | None = None
        self._rank: Rank | None = None
        # Waits for the GPU, one step after the other; its thread starts with the first step that is
        # not finished at once.
        self._waiter = ThreadPoolExecutor(1, "cantata-gpu-steps")
        self._on_gpu = not config.device.startswith("cpu")
        # The sampling of the last step, while it waits for masks on the waiter's thread.
        self._sampling: Future[None] | None = None

    def start(self) -> ExecutorInfo:
        """Load the model, allocate the KV cache, run one token through both.

        Raises:
            CheckpointError, ConfigError: one sentence for the user.
        """
        (shard,) = plan_shards(self._model, self._config.parallel)
        device = prepare_device(self._config)
        if self._loader is None:
            check_memory(self._config, self._model, shard, device)
        rank = Rank(
            self._config,
            self._model,
            shard,
            Alone(),
            device=device,
            progress=self._progress,
            loader=self._loader,
        )
        loaded = rank.load()
        plan = plan_kv_cache(self._config, self._model, shard, [loaded.kv_memory])
        rank.allocate(plan)
        self._rank = rank
        return ExecutorInfo(
            device=loaded.device,
            dtype=self._config.dtype,
            num_ranks=1,
            max_model_len=plan.max_model_len,
            num_full_blocks=plan.num_full_blocks,
            num_sliding_blocks=plan.num_sliding_blocks,
            kv_cache_bytes=plan.total_bytes,
            weight_bytes=loaded.weight_bytes,
            kernels=loaded.kernels,
            phases_s=dict(rank.phases_s),
        )

    def execute(self, plan: StepPlan, masks: "Future[StepMasks] | None" = None) -> "Future[StepResult]":
        """Run a plan. On a CPU it has run when this returns; on a GPU its kernels are queued, or
        those of its forward pass if it awaits masks."""
        future: Future[StepResult] = Future()
        if self._rank is None:
            future.set_result(StepResult(plan.step, error="the executor has shut down"))
            return future
        if self._sampling is not None:
            # The forward pass reads the tokens of the step before. Its masks do not depend on this
            # thread: the result of the step before that one has been taken.
            wait([self._sampling])
            self._sampling = None
        launched = self._rank.launch(plan)
        if launched.awaits_masks:
            assert masks is not None, "a plan that awaits masks came without"
            if not self._on_gpu:
                self._sample(launched, plan.step, masks)
            else:
                # The masks may need the result of the step before, which this thread takes.
                self._sampling = self._waiter.submit(self._sample, launched, plan.step, masks)
                return self._waiter.submit(launched.result)
        if not launched.done:
            return self._waiter.submit(launched.result)
        future.set_result(launched.result())
        return future

    def _sample(self, launched: LaunchedStep, step: int, masks: "Future[StepMasks]") -> None:
        try:
            launched.sample(wait_for_masks(step, masks, self._config.parallel.step_timeout_s))
        except MasksFailed as error:
            launched.fail(str(error))

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Compute the logits of one sequence (see Executor)."""
        assert self._rank is not None, "the executor has not started"
        logits = self._rank.logits(token_ids)
        assert logits is not None
        return logits

    def on_failure(self, callback: Callable[[str], None]) -> None:
        """Ignore the callback (see Executor): nothing runs between plans that could fail."""

    def shutdown(self) -> None:
        """Release weights and caches."""
        self._waiter.shutdown()
        if self._rank is not None:
            self._rank.close()
            self._rank = None
