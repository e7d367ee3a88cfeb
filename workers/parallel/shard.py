"""The part of a model that each rank holds: arithmetic over the shape, computed once and passed to
loader, model and KV cache.

Attention and vocabulary are split over all `tp_size` ranks. The experts are split into `ep_size`
groups of ranks; the `tp_size / ep_size` ranks of a group split the intermediate dimension of each
of the group's experts, in units of MX_BLOCK columns. Every rank sees every token and computes its
part; one all-reduce after attention and one after the experts add the parts up.
"""

from dataclasses import dataclass

from kernels.formats import MX_BLOCK
from workers.config import MAX_RANKS, ModelConfig, ParallelConfig
from workers.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Span:
    """A rank's part `start:stop` of a dimension, padded with zeros to `size` so that all ranks have
    equal shapes."""

    start: int
    stop: int
    size: int

    @property
    def length(self) -> int:
        """Length without padding."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class RankShard:
    """The shard of one rank.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads; if there are more ranks than heads, neighbouring ranks hold
            the same one.
        vocab: rows of embedding and lm_head.
        experts: this rank's experts, with their whole hidden dimension.
        intermediate: columns of the experts' intermediate dimension (gate and up rows of gate_up:
            twice as many, interleaved).
        adds_output_bias: whether this rank adds the attention output's bias; one rank does.
        adds_down_bias: whether this rank adds its experts' down bias; one rank of each group does.
    """

    tp_rank: int
    tp_size: int
    ep_rank: int
    ep_size: int
    heads: Span
    kv_heads: Span
    vocab: Span
    experts: Span
    intermediate: Span

    @property
    def adds_output_bias(self) -> bool:
        return self.tp_rank == 0

    @property
    def adds_down_bias(self) -> bool:
        return self.tp_rank % (self.tp_size // self.ep_size) == 0


def plan_shards(model: ModelConfig, parallel: ParallelConfig) -> tuple[RankShard, ...]:
    """Return the shard of every rank, by tp_rank.

    Raises:
        ConfigError: the model's heads or experts do not allow the parallel plan; names the nearest
            allowed ones.
    """
    reason = _refusal(model, parallel.tensor, parallel.expert_size)
    if reason is not None:
        raise ConfigError(
            f"engine.parallel: tensor={parallel.tensor}, expert={parallel.expert_size} cannot work: "
            f"{reason}; {_nearest(model, parallel)}"
        )
    return tuple(_shard(model, parallel, rank) for rank in range(parallel.tensor))


def vocab_lengths(model: ModelConfig, tensor: int) -> tuple[int, ...]:
    """Return the rows of the vocabulary that each rank holds, without padding."""
    return tuple(_balanced(model.vocab_size, tensor, rank).length for rank in range(tensor))


def allowed_plans(model: ModelConfig) -> list[tuple[int, int]]:
    """Return all (tensor, expert) that the model allows, in ascending order."""
    sizes = range(1, MAX_RANKS + 1)
    return [
        (tensor, expert)
        for tensor in sizes
        for expert in sizes
        if tensor % expert == 0 and _refusal(model, tensor, expert) is None
    ]


def _refusal(model: ModelConfig, tensor: int, expert: int) -> str | None:
    """Return why a parallel plan cannot work; None if it can. `expert` divides `tensor`."""
    if model.num_heads % tensor:
        return f"{model.num_heads} query heads cannot be split evenly over {tensor} ranks"
    if model.num_kv_heads % tensor and tensor % model.num_kv_heads:
        return (
            f"{model.num_kv_heads} key-value heads can neither be split evenly over {tensor} ranks "
            f"nor be repeated evenly on them"
        )
    if expert > model.num_experts:
        return f"{model.num_experts} experts cannot be split into {expert} groups"
    num_units = -(-model.intermediate_size // MX_BLOCK)
    if tensor // expert > num_units:
        return (
            f"an expert has {num_units} groups of {MX_BLOCK} intermediate columns, too few for "
            f"{tensor // expert} ranks"
        )
    return None


def _nearest(model: ModelConfig, parallel: ParallelConfig) -> str:
    """Return the nearest parallel plans that work, as part of a sentence."""
    wanted = (parallel.tensor, parallel.expert_size)
    plans = sorted(
        allowed_plans(model), key=lambda plan: (abs(plan[0] - wanted[0]), abs(plan[1] - wanted[1]), plan)
    )
    shown = ", ".join(f"tensor={tensor}, expert={expert}" for tensor, expert in plans[:3])
    return f"the nearest that can: {shown.replace(', tensor', '; tensor')}"


def _shard(model: ModelConfig, parallel: ParallelConfig, rank: int) -> RankShard:
    tensor, expert = parallel.tensor, parallel.expert_size
    group_size = tensor // expert
    num_units = -(-model.intermediate_size // MX_BLOCK)
    units = _balanced(num_units, group_size, rank % group_size)
    return RankShard(
        tp_rank=rank,
        tp_size=tensor,
        ep_rank=rank // group_size,
        ep_size=expert,
        heads=_balanced(model.num_heads, tensor, rank),
        kv_heads=_kv_heads(model.num_kv_heads, tensor, rank),
        vocab=_balanced(model.vocab_size, tensor, rank),
        experts=_unpadded(_balanced(model.num_experts, expert, rank // group_size)),
        intermediate=Span(
            units.start * MX_BLOCK,
            min(units.stop * MX_BLOCK, model.intermediate_size),
            units.size * MX_BLOCK if group_size > 1 else model.intermediate_size,
        ),
    )


def _balanced(total: int, parts: int, index: int) -> Span:
    """Return part `index` of `total`: the first `total % parts` parts are one longer, all are
    padded to the longest."""
    base, longer = divmod(total, parts)
    start = index * base + min(index, longer)
    return Span(start, start + base + (index < longer), base + (longer > 0))


def _unpadded(span: Span) -> Span:
    return Span(span.start, span.stop, span.length)


def _kv_heads(num_kv_heads: int, tensor: int, rank: int) -> Span:
    if tensor <= num_kv_heads:
        return _balanced(num_kv_heads, tensor, rank)
    head = rank * num_kv_heads // tensor
    return Span(head, head + 1, 1)
