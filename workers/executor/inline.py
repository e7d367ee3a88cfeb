"""InlineExecutor: one rank, in the engine's own process and thread."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels.cpu import linear as cpu_linear
from kernels.cpu import native
from kernels.mxfp4 import ROWS16, PackedMXFP4
from workers.config import BLOCK_SIZE, EngineConfig, ModelConfig
from workers.errors import ConfigError
from workers.executor.base import ExecutorInfo
from workers.executor.runner import Runner
from workers.kv_cache.tensors import TORCH_DTYPES, allocate_kv_caches, plan_kv_cache
from workers.model.checkpoint import load_model
from workers.model.gpt_oss import GptOss
from workers.model.step_batch import StepBatch
from workers.scheduler.plan import StepPlan, StepResult

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, total) while starting; total is 0 where a phase has no steps to count."""


class InlineExecutor:
    """Runs each plan before `execute` returns, so that at most one is in flight.

    Args:
        max_model_len: context limit in tokens, resolved.
        progress: hears of each phase as it starts, and of tensors loaded.
    """

    def __init__(self, config: EngineConfig, model: ModelConfig, max_model_len: int, *, progress: Progress | None = None) -> None:
        self._config = config
        self._model_config = model
        self._max_model_len = max_model_len
        self._progress = progress or (lambda phase, done, total: None)
        self._phases_s: dict[str, float] = {}
        self._model: GptOss | None = None
        self._runner: Runner | None = None

    def start(self) -> ExecutorInfo:
        """Load the model, allocate the KV cache, run one token through both.

        Raises:
            CheckpointError, ConfigError: one sentence for the user.
        """
        config = self._config
        dtype, device = TORCH_DTYPES[config.dtype], _device(config.device)
        with self._phase("load weights"):
            model = load_model(
                config.model_path,
                self._model_config,
                dtype=dtype,
                device=device,
                progress=lambda done, total: self._progress("load weights", done, total),
            )
        with self._phase("allocate KV cache"):
            plan = plan_kv_cache(
                self._model_config, config.cache, config.scheduler, dtype=config.dtype, device=device, max_model_len=self._max_model_len
            )
            kv_caches = allocate_kv_caches(self._model_config, plan, dtype=config.dtype, device=device)
        with self._phase("warm up"):
            self._model = model
            self.logits([0])
        self._runner = Runner(model, kv_caches, max_num_seqs=config.scheduler.max_num_seqs, max_model_len=self._max_model_len)
        return ExecutorInfo(
            device=str(device),
            dtype=config.dtype,
            num_ranks=1,
            num_full_blocks=plan.num_full_blocks,
            num_sliding_blocks=plan.num_sliding_blocks,
            kv_cache_bytes=plan.total_bytes,
            weight_bytes=model.weight_bytes,
            kernels=_kernel_names(model),
            phases_s=dict(self._phases_s),
        )

    def execute(self, plan: StepPlan) -> "Future[StepResult]":
        """Run the plan now; the future is done when it is returned."""
        future: Future[StepResult] = Future()
        future.set_result(self._run(plan))
        return future

    def shutdown(self) -> None:
        """Let go of weights and caches."""
        self._runner = None
        self._model = None

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits after each token of one sequence, in a KV cache of its own: steps in between are not disturbed.

        Returns:
            [len(token_ids), vocab_size] fp32.
        """
        model = self._model
        assert model is not None, "the executor has not started"
        num_blocks = -(-len(token_ids) // BLOCK_SIZE)
        shape = (2, num_blocks, BLOCK_SIZE, model.config.num_kv_heads, model.config.head_dim)
        kv_caches = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in model.layers]
        chunk = self._config.scheduler.max_num_batched_tokens
        rows = [
            model.compute_logits(model.forward(_chunk_batch(token_ids, start, min(start + chunk, len(token_ids)), model.device), kv_caches))
            for start in range(0, len(token_ids), chunk)
        ]
        return torch.cat(rows)

    def _run(self, plan: StepPlan) -> StepResult:
        if self._runner is None:
            return StepResult(plan.step, error="the executor has shut down")
        try:
            return self._runner.step(plan)
        except Exception:
            # The edge of the rank: the protocol turns a failure into a result.
            logger.exception("step %d failed", plan.step)
            return StepResult(plan.step, error=f"step {plan.step} failed on rank 0; its log has the details")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._progress(name, 0, 0)
        started = time.perf_counter()
        yield
        self._phases_s[name] = time.perf_counter() - started


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _kernel_names(model: GptOss) -> dict[str, str]:
    """Operation → what runs it."""
    projection = model.layers[0].experts.gate_up
    packed = isinstance(projection, PackedMXFP4)
    cpp = f"C++ {native.isa()}"
    if packed and projection.layout == ROWS16:
        experts = f"{cpp}, MXFP4 layout {projection.layout}"
    else:
        experts = f"torch reference, MXFP4 layout {projection.layout}" if packed else "torch reference, dense"
    linear = cpp if cpu_linear.can_run(model.embedding) else "torch"
    return {
        "attention": "torch reference",
        "experts": experts,
        "linear": linear,
        "pointwise": "torch reference",
        "sampling": "torch reference",
    }


def _chunk_batch(token_ids: Sequence[int], start: int, end: int, device: torch.device) -> StepBatch:
    """Tokens start..end of a sequence whose block i lies in slot block i."""
    positions = torch.arange(start, end, device=device)
    blocks = torch.arange(-(-end // BLOCK_SIZE), dtype=torch.int32, device=device)[None]
    return StepBatch(
        token_ids=torch.tensor(token_ids[start:end], dtype=torch.int64, device=device),
        positions=positions,
        slot_mapping_full=positions,
        slot_mapping_sliding=positions,
        block_table_full=blocks,
        block_table_sliding=blocks,
        context_lens=torch.tensor([end], dtype=torch.int32, device=device),
        cu_seqlens_q=torch.tensor([0, end - start], dtype=torch.int32, device=device),
        sample_indices=torch.arange(end - start, device=device),
    )
