"""The device of a rank: checks that it can be used, and that it can hold and run the model."""

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
    """Return the torch device of a rank; `cuda` without an index is the GPU number local_rank.

    Raises:
        ConfigError: the device cannot be used here.
    """
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # streams and events belong to the current device
            _exact_matmuls()
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, AttributeError) as error:  # AttributeError: no CUDA in torch
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
    """Return the device of a rank. On a CPU, switch this process to the configured instruction set.

    Raises:
        ConfigError: as in `usable_device`; or the processor or the build lacks the instruction set.
        RankCrashed: a child process that tried the instruction set died of SIGILL.
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
    """Refuse weights that do not fit into memory. On a CPU all ranks of a host call this before any
    of them loads.

    Raises:
        ConfigError: names the bytes needed and the bytes free.
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
    """Refuse MXFP8 activations where they would lose precision and gain nothing. A CPU runs the
    reference, so that their effect on results can be tried.

    Raises:
        ConfigError: the experts are not in MXFP4, or the architecture has no instructions for
            products of scaled blocks.
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
    """Make cuBLAS accumulate in fp32 and multiply fp32 without TF32: the gate's decisions depend on
    it. Images for GPUs come with other defaults."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
