"""The device of a rank: whether it can be used, and whether it can hold and run the model."""

import signal

import torch

from kernels.cpu import native
from workers.config import EngineConfig, ModelConfig
from workers.errors import ConfigError, RankCrashed
from workers.exit_codes import TAKE_ANOTHER_ISA
from workers.kv_cache.memory import host_free_bytes
from workers.model.sizes import rank_bytes
from workers.parallel.shard import RankShard


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
    except (RuntimeError, AssertionError, AttributeError) as error:  # the last: torch without CUDA
        raise ConfigError(f"engine.device {name} cannot be used here: {_why(error)}") from error
    return device


def _why(error: Exception) -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"the torch that is installed, {torch.__version__}, was built without CUDA and ROCm; remove "
            f".venv, and install again with TORCH_INDEX_URL naming an index of torch for this GPU"
        )
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def prepare_device(config: EngineConfig, local_rank: int = 0) -> torch.device:
    """The device of a rank; on a CPU this process runs on the instruction set of the configuration
    from now on.

    Raises:
        ConfigError: as `usable_device`; the processor or the build lacks the instruction set.
        RankCrashed: a process that tried the instruction set died of SIGILL.
    """
    device = usable_device(config.device, local_rank)
    if device.type == "cpu":
        try:
            native.choose(config.cpu_isa)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if not native.runs():
            raise RankCrashed(
                f"this processor cannot run the C++ kernels for {native.isa()}, tried in a process that "
                f"died of SIGILL: {TAKE_ANOTHER_ISA}",
                signal.SIGILL,
            )
    return device


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
            "end what else uses it, or split the model over more of them (engine.parallel.tensor; `cantata "
            "inspect` says what fits)"
        )


def check_mxfp8(target: str, experts_format: str) -> None:
    """Refuse MXFP8 activations where they would lose precision and win nothing; a CPU runs the
    reference, to try what they do.

    Raises:
        ConfigError: the experts are not in MXFP4, or the architecture does not multiply scaled
            blocks itself.
    """
    if experts_format != "mxfp4":
        raise ConfigError(
            "engine.moe_activation_dtype mxfp8 needs experts in MXFP4, and the checkpoint's are in bf16: "
            "set it to auto, or quantize to mxfp4"
        )
    if target not in ("cpu", "gfx950") and not target.startswith("sm_10"):
        raise ConfigError(
            f"engine.moe_activation_dtype mxfp8 needs sm_100 (B200) or gfx950 (MI355X), and this GPU is "
            f"{target}: set it to auto"
        )


def _exact_matmuls() -> None:
    """cuBLAS adds up in fp32 and multiplies fp32 as such: the gate decides by it. Images for GPUs
    come with other defaults."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
