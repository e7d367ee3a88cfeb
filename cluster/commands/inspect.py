"""`cantata inspect`: describe a checkpoint, each rank's share of it, and what would be refused.
Reads only config.json and headers."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cluster.commands.gpus import GIB, GPUS, gpu_kv_cache
from workers.config import (
    CacheConfig,
    DenseDtype,
    EngineConfig,
    KVDtype,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)
from workers.errors import ConfigError
from workers.kv_cache.memory import (
    KVCachePlan,
    cache_shape,
    check_kv_dtype,
    cpu_kv_memory,
    host_free_bytes,
    split_memory,
)
from workers.model.sizes import (
    KVBytes,
    RankBytes,
    count_parameters,
    grammar_tokenizer_bytes,
    kv_bytes,
    rank_bytes,
)
from workers.model.stored_model import check_tensors
from workers.model_config import checkpoint_folder, checkpoint_warnings, load_model_config
from workers.parallel.shard import RankShard, allowed_plans, plan_shards

SHOWN_TENSORS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Weights:
    """How weights are stored in memory: arguments of `rank_bytes`."""

    packed_experts: bool | None
    cpu_dense_dtype: DenseDtype


@dataclass(frozen=True, slots=True)
class Split:
    """A way to split the model over ranks.

    Attributes:
        rank: the rank that holds most.
        kv_tokens: number of tokens, over all sequences, for which the KV cache has room; None if no
            device was named.
        max_model_len: maximum tokens of one sequence; None if no device was named.
        refusal: why it cannot work; None if it can.
    """

    tensor: int
    expert: int
    rank: RankBytes | None
    kv: KVBytes | None
    kv_tokens: int | None
    max_model_len: int | None
    refusal: str | None


def run_inspect(
    path: Path,
    *,
    tensor: int | None,
    expert: int | None,
    gpu: str | None,
    quantize: Literal["mxfp4"] | None,
    cpu_dense_dtype: DenseDtype,
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"],
    as_json: bool,
) -> int:
    """Print a description of the checkpoint at `path`; return 1 if the requested split
    would be refused.

    Raises:
        CheckpointError, ConfigError: one sentence.
    """
    if cpu_dense_dtype == "int8" and gpu != "cpu":
        raise ConfigError("--cpu-dense-dtype int8 needs --gpu cpu")
    model = load_model_config(path)
    check_tensors(path, model)
    warnings = checkpoint_warnings(path)
    asked = tensor is not None or expert is not None
    wanted = (
        [ParallelConfig(1 if tensor is None else tensor, expert)]
        if asked
        else [ParallelConfig(size) for size in SHOWN_TENSORS]
    )
    weights = Weights(True if quantize == "mxfp4" else None, cpu_dense_dtype)
    kv_dtype = EngineConfig(path, cache=CacheConfig(dtype=kv_cache_dtype)).kv_dtype
    if gpu is not None and gpu != "cpu":
        check_kv_dtype(kv_dtype, GPUS[gpu].target, way_out="leave out --kv-cache-dtype")
    splits = [_split(model, parallel, gpu, weights, kv_dtype) for parallel in wanted]
    if as_json:
        total, active = count_parameters(model)
        found = {
            "model": asdict(model),
            "parameters": total,
            "active_parameters": active,
            "grammar_tokenizer_bytes": grammar_tokenizer_bytes(model.vocab_size),
            "plans": [asdict(split) for split in splits],
            "warnings": warnings,
        }
        print(json.dumps(found))
    else:
        print(_text(path, model, splits, gpu, quantize, cpu_dense_dtype, kv_dtype))
        for sentence in warnings:
            print(f"cantata: warning: {sentence}", file=sys.stderr)
    refused = [split for split in splits if split.refusal is not None]
    if len(refused) < len(splits):
        return 0
    if not as_json:
        print(f"cantata: {refused[0].refusal}", file=sys.stderr)
    return 1


def _split(
    model: ModelConfig, parallel: ParallelConfig, gpu: str | None, weights: Weights, kv_dtype: KVDtype
) -> Split:
    try:
        shards = plan_shards(model, parallel)
    except ConfigError as error:
        return Split(parallel.tensor, parallel.expert_size, None, None, None, None, str(error))
    shard, rank = _fullest(model, shards, weights)
    refusal, tokens, context = None, None, None
    if gpu is not None:
        try:
            cache = _kv_cache(model, shard, rank.total, gpu, parallel.tensor, kv_dtype)
            tokens, context = cache.kv_capacity_tokens, cache.max_model_len
        except ConfigError as error:
            refusal = (
                f"tensor={parallel.tensor} on {_device(gpu)}, {_readable(rank.total)} of weights on "
                f"a rank: {error}"
            )
            larger = _fitting(model, parallel.tensor, gpu, weights, kv_dtype)
            refusal += f"; tensor={larger} would fit" if larger else ""
    return Split(
        parallel.tensor,
        parallel.expert_size,
        rank,
        kv_bytes(model, shard, kv_dtype),
        tokens,
        context,
        refusal,
    )


def _fullest(
    model: ModelConfig, shards: Sequence[RankShard], weights: Weights
) -> tuple[RankShard, RankBytes]:
    experts, dense = weights.packed_experts, weights.cpu_dense_dtype
    sizes = [
        (shard, rank_bytes(model, shard, "bfloat16", packed_experts=experts, cpu_dense_dtype=dense))
        for shard in shards
    ]
    return max(sizes, key=lambda pair: pair[1].total)


def _kv_cache(
    model: ModelConfig, shard: RankShard, weight_bytes: int, gpu: str, num_ranks: int, kv_dtype: KVDtype
) -> KVCachePlan:
    """Compute the KV cache that an engine with default settings would give each rank.

    Raises:
        ConfigError: not even the shortest context fits.
    """
    scheduler = SchedulerConfig()
    if gpu != "cpu":
        return gpu_kv_cache(
            GPUS[gpu],
            model,
            shard,
            scheduler,
            weight_bytes=weight_bytes,
            max_model_len=None,
            kv_dtype=kv_dtype,
        )
    shape = cache_shape(model, shard)
    memory = cpu_kv_memory(
        shape,
        CacheConfig(),
        scheduler,
        dtype=kv_dtype,
        max_model_len=None,
        ranks_on_host=num_ranks,
        weight_bytes=weight_bytes,
    )
    return split_memory(
        shape,
        scheduler,
        dtype=kv_dtype,
        max_model_len=None,
        memory_bytes=memory.num_bytes,
        source=memory.source,
    )


def _fitting(model: ModelConfig, tensor: int, gpu: str, weights: Weights, kv_dtype: KVDtype) -> int | None:
    """Return the smallest number of GPUs above `tensor` that holds the model and its whole context;
    on one host, more ranks do not help."""
    for size, expert in allowed_plans(model):
        if gpu != "cpu" and size > tensor and expert == size:
            shard, rank = _fullest(model, plan_shards(model, ParallelConfig(size)), weights)
            try:
                cache = _kv_cache(model, shard, rank.total, gpu, size, kv_dtype)
            except ConfigError:
                continue
            if cache.max_model_len == model.max_context_len:
                return size
    return None


def _text(
    path: Path,
    model: ModelConfig,
    splits: list[Split],
    gpu: str | None,
    quantize: str | None,
    cpu_dense_dtype: DenseDtype,
    kv_dtype: KVDtype,
) -> str:
    experts_in_mxfp4 = model.experts_format == "mxfp4" or quantize == "mxfp4"
    kept = ["experts in MXFP4, all else in bf16" if experts_in_mxfp4 else "in bf16"]
    kept += ["attention and lm_head in int8"] * (cpu_dense_dtype == "int8")
    kept += ["the KV cache in fp8"] * (kv_dtype == "fp8_e4m3")
    kept += [] if gpu is None else [f"on {_device(gpu)}"]
    lines = [f"  {name:<12} {value}" for name, value in _model_rows(path, model, quantize)]
    lines += ["", f"Each rank, {', '.join(kept)}:", "", *_table(splits, gpu)]
    left_out = [split.refusal for split in splits if split.rank is not None and split.refusal is not None]
    if len(left_out) < len(splits):  # if all are left out, the first refusal is the error
        lines += [f"\n{refusal}" for refusal in left_out]
    return "\n".join(lines)


def _model_rows(path: Path, model: ModelConfig, quantize: str | None) -> list[tuple[str, str]]:
    total, active = count_parameters(model)
    sliding = sum(window is not None for window in model.layer_windows)
    layout = "OpenAI's own layout" if model.layout == "original" else "Hugging Face layout"
    stored = "MXFP4" if model.experts_format == "mxfp4" else "bf16"
    packed = ", packed to MXFP4 while loading" if quantize and model.experts_format != "mxfp4" else ""
    return [
        ("checkpoint", str(checkpoint_folder(path))),
        ("format", f"{layout}, experts in {stored}{packed}"),
        ("parameters", f"{_count(total)}, {_count(active)} active per token"),
        ("layers", f"{model.num_layers}, {sliding} with a window of {model.sliding_window} keys"),
        (
            "hidden size",
            f"{model.hidden_size}, intermediate {model.intermediate_size}, vocabulary {model.vocab_size}",
        ),
        (
            "attention",
            f"{model.num_heads} query heads, {model.num_kv_heads} key-value heads, dimension "
            f"{model.head_dim}",
        ),
        ("experts", f"{model.num_experts}, {model.num_experts_per_token} active per token"),
        ("context", f"{model.max_context_len} tokens"),
        (
            "grammars",
            f"{_readable(grammar_tokenizer_bytes(model.vocab_size))} in each engine's process "
            f"(engine.grammars.load)",
        ),
    ]


_COLUMNS = (
    *("tp", "ep", "weights", "attention", "experts", "gate, norms", "embedding", "lm_head", "padding"),
    *("KV/token", "KV/seq", "context", "tokens that fit"),
)


def _table(splits: list[Split], gpu: str | None) -> list[str]:
    lines = [_row(_COLUMNS)]
    for split in splits:
        if split.rank is None or split.kv is None:
            lines.append(f"{split.tensor:>11}{split.expert:>11}  refused: {split.refusal}")
            continue
        rank, kv = split.rank, split.kv
        weights = (rank.total, rank.attention, rank.experts, rank.gate_and_norms, rank.embedding)
        sizes = (*weights, rank.lm_head, rank.padding, kv.per_token, kv.per_sequence)
        context = "-" if split.max_model_len is None else f"{split.max_model_len:,}"
        fits = "-" if gpu is None else "does not fit" if split.refusal else f"{split.kv_tokens:,}"
        lines.append(_row((str(split.tensor), str(split.expert), *map(_readable, sizes), context, fits)))
    return lines


def _row(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>{max(len(name), 9) + 2}}" for cell, name in zip(cells, _COLUMNS, strict=True))


def _device(gpu: str) -> str:
    if gpu == "cpu":
        return f"this machine ({_readable(host_free_bytes())} free)"
    return (
        f"{gpu.upper()} ({_readable(GPUS[gpu].memory_bytes)}, "
        f"{CacheConfig().gpu_memory_utilization:.0%} of it used)"
    )


def _count(parameters: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit}"
    return str(parameters)


def _readable(num_bytes: int) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"
