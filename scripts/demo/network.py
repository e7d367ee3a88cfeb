"""gpt-oss in torch for training: float32, all operations differentiable, experts rounded to MXFP4
in the forward pass. Its checkpoints are read by `workers.model.checkpoint`, and give the engine's
logits.

Examples of a batch lie one after another, each padded to a multiple of PAD tokens, so that all
products run over one matrix; attention runs over the examples of equal length together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.mxfp4 import pack, unpack
from kernels.pointwise import yarn_concentration, yarn_frequencies
from scripts.demo.sink_attention import sink_attention
from workers.config import ModelConfig
from workers.model.tensor_specs import LayerNames, Rows, tensor_names

PAD = 16
"""Granularity of an example's length in a batch."""

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples in ascending order of padded length.

    Attributes:
        token_ids: [T] int64.
        positions: [T] int64, each token's place in its example.
        groups: (number of examples, padded length) in the order of the tokens.
        predicting: [P] int64, the tokens after which a token of a completion comes.
        targets: [P] int64, those tokens.
    """

    token_ids: Tensor
    positions: Tensor
    groups: tuple[tuple[int, int], ...]
    predicting: Tensor
    targets: Tensor


def make_batch(examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """Return the batch of (prompt, completion) pairs."""
    ordered = sorted(examples, key=lambda example: len(example[0]) + len(example[1]))
    ids: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    predicting: list[int] = []
    targets: list[int] = []
    for prompt, completion in ordered:
        tokens = [*prompt, *completion][:-1]  # after the last token nothing is predicted
        predicting += range(len(ids) + len(prompt) - 1, len(ids) + len(tokens))
        targets += completion
        length = -(-len(tokens) // PAD) * PAD
        ids += [*tokens, *[0] * (length - len(tokens))]
        positions += range(length)
        lengths.append(length)
    groups = tuple((lengths.count(length), length) for length in dict.fromkeys(lengths))
    return Batch(
        torch.tensor(ids), torch.tensor(positions), groups, torch.tensor(predicting), torch.tensor(targets)
    )


@dataclass(frozen=True, slots=True)
class Output:
    """What a forward pass gives.

    Attributes:
        logits: [P, vocab_size] at the positions that predict.
        balance: the load-balancing loss of the gates, 1 if all experts are used equally.
    """

    logits: Tensor
    balance: Tensor


def initial_parameters(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Draw the parameters, under the names of a checkpoint; experts as dense matrices."""
    generator = torch.Generator().manual_seed(seed)
    names, hidden = tensor_names(config), config.hidden_size

    def matrix(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    found = {
        names.embedding: matrix(config.vocab_size, hidden, std=0.5),
        names.final_norm: torch.ones(hidden),
        names.lm_head: matrix(config.vocab_size, hidden, std=0.02),
    }
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    experts, inner = config.num_experts, config.intermediate_size
    shrink = (2 * config.num_layers) ** -0.5
    for layer in names.layers:
        found[layer.attention_norm] = torch.ones(hidden)
        found[layer.experts_norm] = torch.ones(hidden)
        found[layer.sinks] = torch.zeros(config.num_heads)
        shapes = ((layer.query, query), (layer.key, kv), (layer.value, kv), (layer.gate, experts))
        for rows, size in shapes:
            found[rows.weight] = matrix(size, hidden, std=hidden**-0.5)
            found[rows.bias] = torch.zeros(size)
        found[layer.output.weight] = matrix(hidden, query, std=shrink * query**-0.5)
        found[layer.output.bias] = torch.zeros(hidden)
        found[layer.gate_up.dense] = matrix(experts, 2 * inner, hidden, std=hidden**-0.5)
        found[layer.gate_up.bias] = torch.zeros(experts, 2 * inner)
        found[layer.down.dense] = matrix(experts, hidden, inner, std=shrink * inner**-0.5)
        found[layer.down.bias] = torch.zeros(experts, hidden)
    return found


class Network(nn.Module):
    """The model.

    Attributes:
        config: with experts_format `mxfp4`.
    """

    def __init__(self, config: ModelConfig, parameters: Parameters) -> None:
        super().__init__()
        self.config = config
        self._names = tensor_names(config)
        # Names with dots cannot be those of a module's parameters.
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(tensor.clone()) for name, tensor in parameters.items()}
        )

    def weight(self, name: str) -> Tensor:
        weight: Tensor = self.weights[name.replace(".", "/")]
        return weight

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters under the names of a checkpoint."""
        for name, tensor in self.weights.items():
            yield name.replace("/", "."), tensor

    def forward(self, batch: Batch) -> Output:
        """Compute the logits where tokens of completions are predicted."""
        config, eps = self.config, self.config.rms_norm_eps
        cos, sin = self._angles(batch.positions)
        residual = functional.embedding(batch.token_ids, self.weight(self._names.embedding))
        balance = residual.new_zeros(())
        for index, layer in enumerate(self._names.layers):
            normed = _rms_norm(residual, self.weight(layer.attention_norm), eps)
            residual = residual + self._attention(layer, normed, batch, cos, sin, config.layer_windows[index])
            if index == config.num_layers - 1:
                residual = residual[batch.predicting]
            normed = _rms_norm(residual, self.weight(layer.experts_norm), eps)
            out, layer_balance = self._experts(layer, normed)
            residual, balance = residual + out, balance + layer_balance
        normed = _rms_norm(residual, self.weight(self._names.final_norm), eps)
        logits = functional.linear(normed, self.weight(self._names.lm_head))
        return Output(logits, balance / config.num_layers)

    def _linear(self, rows: Rows, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight(rows.weight), self.weight(rows.bias))

    def _attention(
        self, layer: LayerNames, x: Tensor, batch: Batch, cos: Tensor, sin: Tensor, window: int | None
    ) -> Tensor:
        config = self.config
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
        q = _rotate(self._linear(layer.query, x).view(-1, heads, width), cos, sin)
        k = _rotate(self._linear(layer.key, x).view(-1, kv_heads, width), cos, sin)
        v = self._linear(layer.value, x).view(-1, kv_heads, width)
        sizes = [count * length for count, length in batch.groups]
        parts = []
        for (count, length), query, key, value in zip(
            batch.groups, torch.split(q, sizes), torch.split(k, sizes), torch.split(v, sizes), strict=True
        ):
            attended = sink_attention(
                query.view(count, length, kv_heads, heads // kv_heads, width),
                key.view(count, length, kv_heads, width),
                value.view(count, length, kv_heads, width),
                self.weight(layer.sinks),
                window,
            )
            parts.append(attended.view(count * length, heads * width))
        return self._linear(layer.output, torch.cat(parts))

    def _experts(self, layer: LayerNames, x: Tensor) -> tuple[Tensor, Tensor]:
        config, num_experts, k = self.config, self.config.num_experts, self.config.num_experts_per_token
        gate_logits = self._linear(layer.gate, x)
        values, ids = gate_logits.topk(k, -1)
        weights = values.softmax(-1)
        # Gate and up in turn become all of the gate, then all of up.
        gate_up = _halves(_rounded(self.weight(layer.gate_up.dense)))
        gate_up_bias, down_bias = _halves(self.weight(layer.gate_up.bias)), self.weight(layer.down.bias)
        down = _rounded(self.weight(layer.down.dense))
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=num_experts)
        tokens = order // k
        parts = []
        for expert, rows in enumerate(torch.split(x[tokens], counts.tolist())):
            gate, up = torch.addmm(gate_up_bias[expert], rows, gate_up[expert].T).chunk(2, -1)
            gate = gate.clamp(max=config.swiglu_limit)
            up = up.clamp(-config.swiglu_limit, config.swiglu_limit)
            activated = (up + 1) * gate * torch.sigmoid(gate * config.swiglu_alpha)
            parts.append(torch.addmm(down_bias[expert], activated, down[expert].T))
        results = torch.cat(parts) * weights.reshape(-1)[order][:, None]
        out = torch.zeros_like(x).index_add(0, tokens, results)
        used = counts / counts.sum()
        balance = num_experts * (used * gate_logits.softmax(-1).mean(0)).sum()
        return out, balance

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        rope = self.config.rope
        frequencies = yarn_frequencies(
            positions.device,
            self.config.head_dim,
            rope.theta,
            rope.factor,
            rope.beta_fast,
            rope.beta_slow,
            rope.original_max_position_embeddings,
            rope.truncate,
        )
        angles = positions.float()[:, None] * frequencies
        concentration = yarn_concentration(rope.factor)
        return angles.cos()[:, None] * concentration, angles.sin()[:, None] * concentration


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _halves(x: Tensor) -> Tensor:
    """Return [E, 2I, ...] with the even places of the second axis before the odd ones."""
    return torch.cat((x[:, 0::2], x[:, 1::2]), 1)


def _rounded(weight: Tensor) -> Tensor:
    """Return the values that MXFP4 holds, with the gradient of the weights as they are."""
    with torch.no_grad():
        difference = unpack(pack(weight), torch.float32) - weight
    return weight + difference
