"""`cantata inspect`: what a checkpoint is, what each rank would hold, what would be refused. Reads config.json and headers only."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.gpus import GIB, GPUS, UTILIZATION, left_for_kv
from workers.config import ModelConfig, ParallelConfig, SchedulerConfig, checkpoint_folder, load_model_config
from workers.errors import ConfigError
from workers.executor.rank import cache_shape
from workers.kv_cache.tensors import host_free_bytes, split_memory
from workers.model.checkpoint import check_tensors
from workers.model.sizes import KVBytes, RankBytes, count_parameters, kv_bytes, rank_bytes
from workers.parallel.shard import RankShard, allowed_plans, plan_shards

SHOWN_TENSORS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to spread the model.

    Attributes:
        rank: the rank that holds most.
        kv_tokens: tokens of all sequences together for which the KV cache has room; None: no device was named.
        refusal: why it cannot work; None if it can.
    """

    tensor: int
    expert: int
    rank: RankBytes | None
    kv: KVBytes | None
    kv_tokens: int | None
    refusal: str | None


def run_inspect(path: Path, *, tensor: int | None, expert: int | None, gpu: str | None, as_json: bool) -> int:
    """Print what the checkpoint at `path` is; returns 1 if the plan asked for would be refused.

    Raises:
        CheckpointError, ConfigError: one sentence.
    """
    model = load_model_config(path)
    check_tensors(path, model)
    asked = tensor is not None or expert is not None
    wanted = [ParallelConfig(tensor or 1, expert)] if asked else [ParallelConfig(size) for size in SHOWN_TENSORS]
    plans = [_plan(model, parallel, gpu) for parallel in wanted]
    if as_json:
        total, active = count_parameters(model)
        found = {"model": asdict(model), "parameters": total, "active_parameters": active, "plans": [asdict(plan) for plan in plans]}
        print(json.dumps(found))
    else:
        print(_text(path, model, plans, gpu))
    refused = [plan for plan in plans if plan.refusal is not None]
    if len(refused) < len(plans):
        return 0
    if not as_json:
        print(f"cantata: {refused[0].refusal}", file=sys.stderr)
    return 1


def _plan(model: ModelConfig, parallel: ParallelConfig, gpu: str | None) -> Plan:
    try:
        shards = plan_shards(model, parallel)
    except ConfigError as error:
        return Plan(parallel.tensor, parallel.expert_size, None, None, None, str(error))
    shard = max(shards, key=lambda shard: rank_bytes(model, shard, "bfloat16").total)
    rank, kv = rank_bytes(model, shard, "bfloat16"), kv_bytes(model, shard, "bfloat16")
    refusal, tokens = None, None
    if gpu is not None:
        left = _left_for_kv(rank.total, gpu, parallel.tensor)
        try:
            tokens = _kv_tokens(model, shard, left)
        except ConfigError:
            refusal = _does_not_fit(model, parallel, gpu, rank.total)
    return Plan(parallel.tensor, parallel.expert_size, rank, kv, tokens, refusal)


def _left_for_kv(weight_bytes: int, gpu: str, num_ranks: int) -> int:
    if gpu == "cpu":
        return max(host_free_bytes() // num_ranks - weight_bytes, 0)
    return left_for_kv(GPUS[gpu], weight_bytes)


def _kv_tokens(model: ModelConfig, shard: RankShard, num_bytes: int) -> int:
    """
    Raises:
        ConfigError: not even one sequence of the full context fits.
    """
    plan = split_memory(
        cache_shape(model, shard), SchedulerConfig(), dtype="bfloat16", max_model_len=model.max_context_len, memory_bytes=num_bytes
    )
    return plan.kv_capacity_tokens


def _does_not_fit(model: ModelConfig, parallel: ParallelConfig, gpu: str, weight_bytes: int) -> str:
    sentence = (
        f"tensor={parallel.tensor} does not fit {_device(gpu)}: {_readable(weight_bytes)} of weights on a rank leave no room for the KV "
        f"cache of one sequence of {model.max_context_len} tokens"
    )
    for tensor, expert in allowed_plans(model):
        if tensor > parallel.tensor and expert == tensor and gpu != "cpu":
            shard = plan_shards(model, ParallelConfig(tensor))[0]
            try:
                _kv_tokens(model, shard, _left_for_kv(rank_bytes(model, shard, "bfloat16").total, gpu, tensor))
            except ConfigError:
                continue
            return f"{sentence}; tensor={tensor} fits"
    return f"{sentence}; a smaller max_model_len may fit"


def _text(path: Path, model: ModelConfig, plans: list[Plan], gpu: str | None) -> str:
    total, active = count_parameters(model)
    sliding = sum(window is not None for window in model.layer_windows)
    layout = "OpenAI's own layout" if model.layout == "original" else "Hugging Face layout"
    rows = [
        ("checkpoint", str(checkpoint_folder(path))),
        ("format", f"{layout}, experts in {'MXFP4' if model.experts_format == 'mxfp4' else 'bf16'}"),
        ("parameters", f"{total / 1e9:.2f} B, {active / 1e9:.2f} B active for a token"),
        ("layers", f"{model.num_layers}, {sliding} with a window of {model.sliding_window} keys"),
        ("hidden size", f"{model.hidden_size}, intermediate {model.intermediate_size}, vocabulary {model.vocab_size}"),
        ("attention", f"{model.num_heads} query heads, {model.num_kv_heads} key-value heads, dimension {model.head_dim}"),
        ("experts", f"{model.num_experts}, {model.num_experts_per_token} for a token"),
        ("context", f"{model.max_context_len} tokens"),
    ]
    lines = [f"  {name:<12} {value}" for name, value in rows]
    lines += ["", f"Each rank, in bf16{'' if gpu is None else f', on {_device(gpu)}'}:", ""]
    header = ("tp", "ep", "weights", "attention", "experts", "embedding", "lm_head", "padding", "KV/token", "KV/seq", "tokens that fit")
    lines.append("".join(f"{cell:>{max(len(cell), 9) + 2}}" for cell in header))
    for plan in plans:
        if plan.rank is None or plan.kv is None:
            lines.append(f"{plan.tensor:>11}{plan.expert:>11}  refused: {plan.refusal}")
            continue
        rank, kv = plan.rank, plan.kv
        fits = "-" if gpu is None else "does not fit" if plan.refusal else f"{plan.kv_tokens:,}"
        sizes = (rank.total, rank.attention, rank.experts, rank.embedding, rank.lm_head, rank.padding, kv.per_token, kv.per_sequence)
        cells = (str(plan.tensor), str(plan.expert), *map(_readable, sizes), fits)
        lines.append("".join(f"{cell:>{max(len(name), 9) + 2}}" for cell, name in zip(cells, header, strict=True)))
    return "\n".join(lines)


def _device(gpu: str) -> str:
    if gpu == "cpu":
        return f"this machine ({_readable(host_free_bytes())} free)"
    return f"{gpu.upper()} ({_readable(GPUS[gpu].memory_bytes)}, {UTILIZATION:.0%} of it used)"


def _readable(num_bytes: int) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"
