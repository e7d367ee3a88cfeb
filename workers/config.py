"""Frozen configuration of one engine. Each field exists in exactly one class, and no config is
changed after it is built.

`ModelConfig` comes from the checkpoint's `config.json` (`load_model_config`), the rest from the
operator.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kernels.formats import MoeActivationDtype
from workers.errors import ConfigError

Dtype = Literal["bfloat16", "float32"]
DenseDtype = Literal["bf16", "int8"]
"""Dtypes of dense weights in memory on a CPU."""
CpuIsa = Literal["auto", "amx", "avx512_bf16", "avx512", "avx2", "neon", "portable", "reference"]
"""Instruction sets of the C++ kernels (`kernels/cpu/native.py`), `auto` for the processor's best,
or the torch references."""
KVDtype = Dtype | Literal["fp8_e4m3"]
"""Dtypes of cached keys and values."""
BLOCK_SIZE = 16
"""Number of KV positions in a block; part of the cache layout's contract with kernels and
router."""
MAX_RANKS = 16
"""Maximum number of ranks of one replica: two nodes of eight GPUs."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """YaRN rotary embedding (arXiv 2309.00071), half-split.

    Attributes:
        truncate: round the correction range to whole dimensions; gpt-oss does not.
    """

    theta: float = 150000.0
    factor: float = 32.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position_embeddings: int = 4096
    truncate: bool = False


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a gpt-oss model.

    Attributes:
        layer_windows: per layer the number of keys visible to a query, itself included; None for
            all.
        max_context_len: number of positions the model was built for.
        swiglu_limit: clamp of the gate (above) and the up projection (both sides).
        stop_token_ids: the config's own end tokens; the tokenizer's are added by name.
        experts_format: `mxfp4` or `bf16`, as stored.
        layout: naming scheme of the checkpoint's files: Hugging Face's, or OpenAI's own
            (`original`).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_token: int
    layer_windows: tuple[int | None, ...]
    max_context_len: int
    rms_norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    rope: RopeConfig = field(default_factory=RopeConfig)
    stop_token_ids: tuple[int, ...] = ()
    experts_format: Literal["mxfp4", "bf16"] = "mxfp4"
    layout: Literal["hf", "original"] = "hf"

    @property
    def sliding_window(self) -> int | None:
        """The window of the sliding layers; None if no layer slides."""
        windows = {window for window in self.layer_windows if window is not None}
        return windows.pop() if windows else None


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Settings of the KV cache.

    Attributes:
        memory_bytes: bytes per rank, for both groups together; None chooses it from the free memory
            (`kv_cache/memory.py`).
        prefix_caching: whether full blocks are found again by hash.
        gpu_memory_utilization: share of a GPU's memory for weights, activations and KV cache
            together; not used on a CPU.
        dtype: `auto` is the model's; `fp8_e4m3`, or `fp8` for short, takes half of bf16's memory
            and reads and changes the numerics. Each KV head's scales are the checkpoint's if it has
            them (`workers/model/kv_scales.py`), else 1.
    """

    memory_bytes: int | None = None
    prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9
    dtype: Literal["auto", "fp8", "fp8_e4m3"] = "auto"

    def __post_init__(self) -> None:
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise ConfigError(f"engine.cache.memory_bytes must be above 0, got {self.memory_bytes}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"engine.cache.gpu_memory_utilization must be above 0 and at most 1, got "
                f"{self.gpu_memory_utilization}"
            )


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one engine's scheduler.

    Attributes:
        max_num_seqs: maximum number of running sequences.
        max_num_batched_tokens: token budget of a step.
        max_waiting_requests: size of the inbox; a request beyond it is refused with Overloaded.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_waiting_requests: int = 1024

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_waiting_requests"):
            if getattr(self, name) < 1:
                raise ConfigError(f"engine.scheduler.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How one replica's model is split over ranks. `workers/parallel/shard.py` decides which
    parallel plans a model allows.

    Attributes:
        tensor: number of ranks of a replica. Attention and vocabulary are split over all of them.
        expert: number of groups that the experts are split into, a divisor of `tensor`; None for
            `tensor`. The ranks of a group (tensor / expert of them) split each of its experts among
            themselves.
        step_timeout_s: seconds without a result after which a step counts as hung and the replica
            ends.
        start_timeout_s: seconds for the ranks to be placed on devices and to start, before they
            load.
    """

    tensor: int = 1
    expert: int | None = None
    step_timeout_s: float = 30.0
    start_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.tensor <= MAX_RANKS:
            raise ConfigError(f"engine.parallel.tensor must be 1 to {MAX_RANKS}, got {self.tensor}")
        if self.expert is not None and (self.expert < 1 or self.tensor % self.expert):
            divisors = [str(number) for number in range(1, self.tensor + 1) if self.tensor % number == 0]
            raise ConfigError(
                f"engine.parallel.expert must divide engine.parallel.tensor, which is {self.tensor}: "
                f"{', '.join(divisors)}; got {self.expert}"
            )
        for name in ("step_timeout_s", "start_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"engine.parallel.{name} must be a positive number of seconds, got {getattr(self, name)}"
                )

    @property
    def expert_size(self) -> int:
        """Number of groups that the experts are split into, with the default resolved."""
        return self.tensor if self.expert is None else self.expert


@dataclass(frozen=True, slots=True)
class GrammarConfig:
    """Settings of grammars (response formats, strict and forced tools), which llguidance runs in
    the engine's process.

    Attributes:
        load: when its tokenizer is loaded, 0.5 GiB and 3 s of gpt-oss's vocabulary: at the `start`
            of the engine, beside the weights, or at the `first_use` of a grammar. Loading holds
            Python's lock: at the first use every stream of the engine waits for it.
        num_threads: number of threads that compute masks; None: a quarter of the CPUs that the
            engine's process may use, from 1 to 8.
        cache_bytes: approximate size of the compiled grammars that are kept, and also of the
            constraints that are kept ready with theirs.
    """

    load: Literal["start", "first_use"] = "start"
    num_threads: int | None = None
    cache_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        if self.num_threads is not None and not 1 <= self.num_threads <= 256:
            raise ConfigError(f"engine.grammars.num_threads must be 1 to 256, got {self.num_threads}")
        if self.cache_bytes < 1:
            raise ConfigError(f"engine.grammars.cache_bytes must be above 0, got {self.cache_bytes}")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The complete configuration of an engine.

    Errors name a field by its path in the configuration of `cantata serve`.

    Attributes:
        model_path: the checkpoint folder.
        device: `cpu`, `cuda` (also of ROCm), or `cuda:N` for one GPU of several.
        dtype: of activations and dense weights, and of the KV cache unless cache.dtype says
            otherwise. float32 is the reference numerics; MXFP4 experts stay packed either way.
        max_model_len: context limit, at most the model's; None: the model's own, or as much of it
            as the KV cache holds.
        quantize: `mxfp4` packs the experts of a bf16 checkpoint while loading; None: kept as
            stored.
        enforce_eager: disable CUDA graphs; no effect on a CPU.
        cpu_dense_dtype: storage dtype of attention projections and lm_head. int8, with one scale
            per row, halves the bytes of them read per token; for bfloat16 on a CPU only;
            `docs/performance.md` has its error.
        allow_zero_weights: accept matrices, experts and norms that are all zeros, as in pruned
            models.
        heartbeat_timeout_s: seconds without a heartbeat (`workers/engine/heartbeat.py`) after which
            an engine counts as hung and is killed.
        moe_activation_dtype: dtype of the inputs of MXFP4 experts. `mxfp8` rounds activations to 8
            bits, which changes results, for hardware with block-scaled matrix products; auto leaves
            them as they are.
        cpu_isa: CPU instruction set, for the whole process of a rank. auto takes CANTATA_CPU_ISA
            from its environment, else the processor's best; `reference` computes in torch, slowly.
            No effect on a GPU.
    """

    model_path: Path
    dtype: Dtype = "bfloat16"
    device: str = "cpu"
    max_model_len: int | None = None
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    grammars: GrammarConfig = field(default_factory=GrammarConfig)
    quantize: Literal["mxfp4"] | None = None
    enforce_eager: bool = False
    cpu_dense_dtype: DenseDtype = "bf16"
    moe_activation_dtype: MoeActivationDtype = "auto"
    cpu_isa: CpuIsa = "auto"
    heartbeat_timeout_s: float = 10.0
    allow_zero_weights: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"engine.device must be cpu, cuda or cuda:N, got {self.device!r}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"engine.max_model_len must be at least 2, got {self.max_model_len}")
        if not (math.isfinite(self.heartbeat_timeout_s) and self.heartbeat_timeout_s >= 2):
            raise ConfigError(
                f"engine.heartbeat_timeout_s must be at least 2, since heartbeats come once per second; got "
                f"{self.heartbeat_timeout_s}"
            )
        if self.cpu_dense_dtype == "int8" and (self.dtype != "bfloat16" or not self.device.startswith("cpu")):
            raise ConfigError(
                f"engine.cpu_dense_dtype int8 needs dtype bfloat16 and device cpu, got dtype "
                f"{self.dtype} and device {self.device}"
            )

    @property
    def kv_dtype(self) -> KVDtype:
        """Dtype of cached keys and values, with `auto` resolved."""
        return self.dtype if self.cache.dtype == "auto" else "fp8_e4m3"


def check_max_model_len(config: EngineConfig, model: ModelConfig) -> None:
    """Refuse a limit above the context that the model was built for.

    Raises:
        ConfigError: one sentence.
    """
    if config.max_model_len is not None and not 2 <= config.max_model_len <= model.max_context_len:
        raise ConfigError(
            f"engine.max_model_len must be 2 to {model.max_context_len}, the model's context; got "
            f"{config.max_model_len}"
        )


def longest_context(model: ModelConfig, max_model_len: int | None) -> int:
    """Return the maximum tokens of a sequence with unlimited memory: `max_model_len`, or the
    model's own if that is None."""
    return model.max_context_len if max_model_len is None else max_model_len
