"""Rank: one rank's life, from loading its shard to running steps, whoever sends it the plans."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.backend import architecture
from kernels.cpu import native
from workers.config import BLOCK_SIZE, EngineConfig, ModelConfig, longest_context
from workers.errors import CheckpointError, ConfigError
from workers.exit_codes import TAKE_ANOTHER_ISA
from workers.kv_cache.tensors import (
    KV_TORCH_DTYPES,
    TORCH_DTYPES,
    KVCachePlan,
    KVMemory,
    allocate_kv_caches,
    check_kv_dtype,
    cpu_kv_memory,
    gpu_kv_memory,
    host_free_bytes,
    shorter_context,
    split_memory,
)
from workers.model.checkpoint import load_model
from workers.model.gpt_oss import GptOss
from workers.model.sizes import rank_bytes
from workers.model.step_batch import StepBatch
from workers.parallel.collectives import Collectives
from workers.parallel.shard import RankShard
from workers.rank.kernel_table import describe_device, kernel_choices, not_capturable, slow_paths
from workers.rank.memory_profile import profile_step, warm_up
from workers.rank.recorded.cpu_program import programs_run
from workers.rank.runner import PendingStep, Runner
from workers.scheduler.plan import StepPlan, StepResult

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 3600.0
"""For the slowest rank to load its weights: a large checkpoint on a slow disk takes long, and shows
how far it is."""

_NUM_CHECK_TOKENS = 16
"""Cheap beside loading, and enough to reach many experts."""

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, total) while starting; total is 0 where a phase has no steps to
count."""
Loader = Callable[..., GptOss]
"""A function that takes `load_model`'s arguments."""


@dataclass(frozen=True, slots=True)
class RankLoaded:
    """What a rank says when its weights are there."""

    device: str
    weight_bytes: int
    kv_memory: KVMemory
    kernels: dict[str, str]


class LaunchedStep:
    """A plan on its way.

    Args:
        failed: the result if it fails.
        pending: None: it has failed.
    """

    def __init__(self, failed: StepResult, pending: PendingStep | None = None) -> None:
        self._failed = failed
        self._pending = pending

    @property
    def done(self) -> bool:
        """Whether `result` returns at once; also of a step that fails."""
        try:
            return self._pending is None or self._pending.done
        except RuntimeError:  # a kernel failed; `result` says so
            return True

    def result(self) -> StepResult:
        """Wait for it."""
        if self._pending is None:
            return self._failed
        try:
            return self._pending.result()
        except Exception:
            logger.exception("step %d failed", self._failed.step)
            return self._failed


class Rank:
    """One rank: `load`, then `allocate`, then `step` (or `launch`) for each plan in order.

    Args:
        shard: this rank's part of the model.
        collectives: the other ranks.
        ranks_on_host: ranks that share this host's memory and, on a CPU, its cores.
        progress: hears of each phase as it starts, and of tensors loaded.
        loader: makes the model; called as `load_model`, which reads the checkpoint and is the
            default.
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
        """Read this rank's weights and see how much memory is left for the KV cache.

        Raises:
            CheckpointError, ConfigError: one sentence for the user.
        """
        check_kv_dtype(self._config.kv_dtype, architecture(self._device))
        mxfp8_activations = self._config.moe_activation_dtype == "mxfp8"
        if mxfp8_activations:
            _check_mxfp8(
                architecture(self._device), self._config.quantize or self._model_config.experts_format
            )
        with self._phase("load weights"):
            self._model = (self._loader or load_model)(
                self._config.model_path,
                self._model_config,
                dtype=TORCH_DTYPES[self._config.dtype],
                device=self._device,
                shard=self._shard,
                collectives=self._collectives,
                quantize=self._config.quantize,
                cpu_dense_dtype=self._config.cpu_dense_dtype,
                mxfp8_activations=mxfp8_activations,
                allow_zero_weights=self._config.allow_zero_weights,
                progress=lambda done, total: self._progress("load weights", done, total),
            )
        choices = kernel_choices(self._model, self._config.kv_dtype)
        for sentence in slow_paths(choices, self._device):
            logger.warning("%s", sentence)
        if self._device.type == "cuda" and (blocking := not_capturable(choices)):
            logger.warning(
                "no CUDA graphs: the kernels for %s read sizes back to the host", " and ".join(blocking)
            )
        kernels = {operation: str(choice) for operation, choice in choices.items()}
        return RankLoaded(describe_device(self._device), self._model.weight_bytes, self._kv_memory(), kernels)

    def allocate(self, plan: KVCachePlan) -> None:
        """Allocate the KV cache and run a few tokens through the model. All ranks do this at the
        same time.

        Raises:
            CheckpointError: the weights are broken: what the model computes is not finite, or the
                same for every token.
            ConfigError: there is less memory than there was.
        """
        with self._phase("allocate KV cache"):
            kv_caches = allocate_kv_caches(
                cache_shape(self._model_config, self._shard),
                plan,
                dtype=self._config.kv_dtype,
                device=self._device,
            )
        with self._phase("warm up"):
            self._check_weights()
        assert self._model is not None
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
        """Run one plan; a failure is a result with `error`."""
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> "LaunchedStep":
        """Start one plan, before the result of the last one is taken if that is still to come; a
        failure is a result with `error`."""
        if self._runner is None:
            return LaunchedStep(StepResult(plan.step, error="the executor has shut down"))
        failed = StepResult(
            plan.step, error=f"step {plan.step} failed on rank {self._shard.tp_rank}; its log has the details"
        )
        try:
            self._enter_device()
            return LaunchedStep(failed, self._runner.launch(plan))
        except Exception:
            # The edge of the rank: the protocol turns a failure into a result.
            logger.exception("step %d failed", plan.step)
            return LaunchedStep(failed)

    def logits(
        self, token_ids: Sequence[int], observe: Callable[[str, Tensor], None] | None = None
    ) -> Tensor | None:
        """Logits after each token of one sequence, in a KV cache of its own: steps in between are
        not disturbed. All ranks take part.

        Args:
            observe: as of `GptOss.forward`.
        Returns:
            [len(token_ids), vocab_size] fp32 on rank 0, None on the others.
        """
        model = self._model
        assert model is not None, "the rank has not loaded"
        self._enter_device()
        num_blocks = -(-len(token_ids) // BLOCK_SIZE)
        shape = (2, num_blocks, BLOCK_SIZE, model.num_kv_heads, model.config.head_dim)
        dtype = KV_TORCH_DTYPES[self._config.kv_dtype]
        kv_caches = [torch.zeros(shape, dtype=dtype, device=model.device) for _ in model.layers]
        chunk = self._config.scheduler.max_num_batched_tokens
        rows = [
            model.compute_logits(
                model.forward(
                    _chunk_batch(token_ids, start, min(start + chunk, len(token_ids)), model.device),
                    kv_caches,
                    observe,
                )
            )
            for start in range(0, len(token_ids), chunk)
        ]
        parts = [part for part in rows if part is not None]
        return torch.cat(parts) if parts else None

    def close(self) -> None:
        """Let go of weights and caches."""
        self._runner = None
        self._model = None

    def _check_weights(self) -> None:
        """Run a few tokens from all over the vocabulary: NaN in a matrix, or values that overflow,
        would otherwise be served as token 0."""
        size = self._model_config.vocab_size
        not_finite: list[str] = []

        def observe(what: str, values: Tensor) -> None:
            if not not_finite and not torch.isfinite(values).all():
                not_finite.append(what)

        logits = self.logits(
            [index * size // _NUM_CHECK_TOKENS for index in range(_NUM_CHECK_TOKENS)], observe
        )
        if logits is not None:
            observe("lm_head", logits)
        broken = f"the weights in {self._config.model_path} are broken: what"
        if not_finite:
            raise CheckpointError(f"{broken} {not_finite[0]} computes is not finite")
        if logits is not None and bool((logits.amax(1) == logits.amin(1)).any()):
            raise CheckpointError(
                f"{broken} the model computes is the same for every token of the vocabulary"
            )

    def _enter_device(self) -> None:
        """Each thread has a current device of its own, at first GPU 0; Triton launches there, and
        events are recorded there."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _captures_graphs(self, model: GptOss) -> bool:
        return (
            self._device.type == "cuda"
            and not self._config.enforce_eager
            and not not_capturable(kernel_choices(model, self._config.kv_dtype))
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
        # Before the profile, since compiled kernels take memory, too.
        with self._phase("compile kernels"):
            warm_up(model, *limits)
            self._collectives.meet("compile kernels", LOAD_TIMEOUT_S)  # rank 0 has more of them
        with self._phase("profile memory"):
            taken = profile_step(model, *limits, graphs=self._captures_graphs(model))
        free, total = torch.cuda.mem_get_info(self._device)
        return gpu_kv_memory(
            shape,
            config.cache,
            config.scheduler,
            dtype=config.kv_dtype,
            max_model_len=config.max_model_len,
            total_bytes=total,
            used_bytes=total - free,
            activation_bytes=taken.activation_bytes,
            graph_bytes=taken.graph_bytes,
        )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._progress(name, 0, 0)
        started = time.perf_counter()
        yield
        self.phases_s[name] = time.perf_counter() - started


def cache_shape(model: ModelConfig, shard: RankShard) -> ModelConfig:
    """The model as a rank's KV cache sees it: with this rank's key-value heads."""
    return replace(model, num_kv_heads=shard.kv_heads.length)


def plan_kv_cache(
    config: EngineConfig, model: ModelConfig, shard: RankShard, memories: Sequence[KVMemory]
) -> KVCachePlan:
    """The one plan that all ranks allocate, and with it the context, from the rank that has the
    least memory.

    Raises:
        ConfigError: as `split_memory`.
    """
    least = min(memories, key=lambda memory: memory.num_bytes)
    plan = split_memory(
        cache_shape(model, shard),
        config.scheduler,
        dtype=config.kv_dtype,
        max_model_len=config.max_model_len,
        memory_bytes=least.num_bytes,
        source=least.source,
    )
    if plan.max_model_len < longest_context(model, config.max_model_len):
        logger.warning("%s", shorter_context(model, plan, config.kv_dtype, least))
    return plan


def check_memory(
    config: EngineConfig,
    model: ModelConfig,
    shard: RankShard,
    device: torch.device,
    *,
    ranks_on_host: int = 1,
) -> None:
    """Refuse weights for which there is no room. On a CPU all ranks of a host ask before any of
    them loads.

    Raises:
        ConfigError: with what is wanted and what is free.
    """
    packed = True if config.quantize == "mxfp4" else None
    wanted = rank_bytes(
        model, shard, config.dtype, packed_experts=packed, cpu_dense_dtype=config.cpu_dense_dtype
    ).total
    if device.type == "cpu":
        free = host_free_bytes() // ranks_on_host
        where = "on this host" if ranks_on_host == 1 else f"for each of {ranks_on_host} ranks on this host"
    else:
        free, where = torch.cuda.mem_get_info(device)[0], f"on {device}"
    if wanted > free:
        raise ConfigError(
            f"the weights of rank {shard.tp_rank} take {wanted / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB "
            f"of memory are free {where}: "
            "end what else uses it, or split the model over more of them (parallel.tensor; `cantata "
            "inspect` says what fits)"
        )


def _exact_matmuls() -> None:
    """cuBLAS adds up in fp32 and multiplies fp32 as such: the gate decides by it. Images for GPUs
    come with other defaults."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def _check_mxfp8(target: str, experts_format: str) -> None:
    """Refuse MXFP8 activations where they would lose precision and win nothing; a CPU runs the
    reference, to try what they do.

    Raises:
        ConfigError: the experts are not in MXFP4, or the architecture does not multiply scaled
            blocks itself.
    """
    if experts_format != "mxfp4":
        raise ConfigError(
            "moe_activation_dtype mxfp8 needs experts in MXFP4, and the checkpoint's are in bf16: set it to "
            "auto, or quantize to mxfp4"
        )
    if target not in ("cpu", "gfx950") and not target.startswith("sm_10"):
        raise ConfigError(
            f"moe_activation_dtype mxfp8 needs sm_100 (B200) or gfx950 (MI355X), and this GPU is {target}: "
            f"set it to auto"
        )


def usable_device(name: str, local_rank: int = 0) -> torch.device:
    """The torch device of a rank: `cuda` alone is the local_rank-th GPU.

    Raises:
        ConfigError: it cannot be used here.
    """
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # streams and events are those of the current device
            _exact_matmuls()
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def prepare_device(config: EngineConfig, local_rank: int = 0) -> torch.device:
    """The device of a rank; on a CPU this process runs on the instruction set of the configuration
    from now on.

    Raises:
        ConfigError: as `usable_device`; the processor or the build lacks the instruction set.
    """
    device = usable_device(config.device, local_rank)
    if device.type == "cpu":
        try:
            native.choose(config.cpu_isa)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if not native.runs():
            raise ConfigError(
                f"this processor cannot run the C++ kernels for {native.isa()}, tried in a process that "
                f"died of SIGILL: {TAKE_ANOTHER_ISA}"
            )
    return device


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
        max_query_len=end - start,
    )
