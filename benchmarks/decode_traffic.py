"""What a layer of gpt-oss launches on a GPU to decode, and the memory traffic of each launch.
Counted, not measured: nothing is computed.

    python3 -m benchmarks.decode_traffic [--model 120b] [--target sm_90] [--batch 1 8 64 256]
        [--context 8192] [--markdown]

The model's own code runs on tensors without memory; each launch is recorded with the tensors that
it is given. Traffic is an upper bound: each of these is counted once, what is overwritten in place
twice, scratch as if all of it were used. Of the experts those count that some token is expected to
have chosen if all are equally likely, of a KV cache the keys and values that the layer's queries
see and the new ones, of block tables what is in use. `least` is the layer's weights and these keys
and values, once each.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.launch_recorder import RecordedLaunch, recording_launches, storage_of
from benchmarks.random_model import random_model
from kernels import backend
from kernels.linear import reference as linear_reference
from kernels.mxfp4 import NATURAL, WGMMA, PackedMXFP4
from workers.config import BLOCK_SIZE, ModelConfig
from workers.model.gpt_oss import GptOss
from workers.model.make_checkpoint import preset_config
from workers.model.step_batch import StepBatch

META = torch.device("meta")
DTYPE = torch.bfloat16
_IN_PLACE = {"add_rms_norm_kernel": 1, "add_slots_rms_norm": 1}
"""Arguments that are both read and overwritten."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch and its bytes, split into weights, KV cache and everything else."""

    name: str
    weight_bytes: float
    kv_bytes: float
    other_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes + self.other_bytes


def layer_launches(
    config: ModelConfig, window: int | None, target: str, batch_size: int, context: int
) -> list[Launch]:
    """Return the launches of one layer of that window."""
    with _recording(target) as recorded:
        counts = []
        # Launches that only the first run makes are not a layer's.
        for num_layers in (1, 1, 2):
            layers = replace(config, num_layers=num_layers, layer_windows=(window,) * num_layers)
            model = random_model(layers, META, WGMMA if target == "sm_90" else NATURAL, dtype=DTYPE)
            shape = (2, 1 + -(-context // BLOCK_SIZE), BLOCK_SIZE, config.num_kv_heads, config.head_dim)
            caches = [torch.empty(shape, dtype=DTYPE, device=META) for _ in model.layers]
            recorded.clear()
            model.forward(_decode_batch(batch_size, context), caches)
            counts.append(len(recorded))
        length = counts[2] - counts[1]
        first = next(index for index, launch in enumerate(recorded) if launch.name == "linear")
        bytes_of = ByteCounter(model, caches, window, batch_size, context)
        return [bytes_of(launch) for launch in recorded[first : first + length]]


class ByteCounter:
    """A counter of the bytes of a launch's tensors by kind, for the launches of one layer in their
    order.

    Args:
        window: the layer's.
        context: tokens of each of the batch's sequences.
    """

    def __init__(
        self, model: GptOss, caches: Sequence[Tensor], window: int | None, batch_size: int, context: int
    ) -> None:
        config = model.config
        chance = config.num_experts_per_token / config.num_experts
        share = 1 - (1 - chance) ** batch_size
        experts = [layer.experts.weights for layer in model.layers]
        packed = [
            part
            for expert in experts
            for part in (expert.gate_up, expert.down)
            if isinstance(part, PackedMXFP4)
        ]
        biases = [bias for expert in experts for bias in (expert.gate_up_bias, expert.down_bias)]
        self._share = dict.fromkeys(map(storage_of, model._weights()), 1.0)
        self._share |= {storage_of(tensor): share for part in packed for tensor in (part.blocks, part.scales)}
        self._share |= {storage_of(bias): share for bias in biases}
        self._caches = set(map(storage_of, caches))
        token_bytes = 2 * config.num_kv_heads * config.head_dim * caches[0].dtype.itemsize
        self._new_bytes = batch_size * token_bytes
        self._seen_bytes = batch_size * token_bytes * (context if window is None else min(window, context))

    def __call__(self, launch: RecordedLaunch) -> Launch:
        name, tensors = launch.name, launch.tensors
        weights = kv = other = 0.0
        for tensor in {storage_of(tensor): tensor for tensor in tensors}.values():
            if storage_of(tensor) in self._share:
                # A weight that a second launch reads is none of the least.
                weights += tensor.nbytes * self._share.pop(storage_of(tensor))
            elif storage_of(tensor) in self._caches:
                kv += self._new_bytes if "store" in name else self._seen_bytes
            else:
                other += tensor.nbytes
        other += sum(tensor.nbytes for tensor in tensors[: _IN_PLACE.get(name, 0)])
        return Launch(name, weights, kv, other)


@contextmanager
def _recording(target: str) -> Iterator[list[RecordedLaunch]]:
    """Yield the launches made inside, which do nothing; tensors without memory count as those of a
    GPU of that target."""
    for module in (
        "attention.paged",
        "attention.rope_store",
        "moe.on_triton",
        "linear.narrow",
        "pointwise.norm",
        "pointwise.yarn",
        "sampling.device",
    ):
        importlib.import_module(f"kernels.{module}")
    importlib.import_module("kernels.embedding.lookup")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(linear_reference, "linear", functional.linear))
        everywhere: dict[str, Callable[..., object]] = {
            "triton_runs_on": lambda device: True,
            "architecture": lambda device: target,
        }
        everywhere["_num_processors"] = lambda device: 132
        for name, module in list(sys.modules.items()):
            for function, replacement in everywhere.items():
                if (name.startswith("kernels.") or module is backend) and hasattr(module, function):
                    stack.enter_context(mock.patch.object(module, function, replacement))
        yield stack.enter_context(recording_launches(compute=False))


def _decode_batch(batch_size: int, context: int) -> StepBatch:
    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    table = empty(batch_size, -(-context // BLOCK_SIZE), dtype=torch.int32)
    return StepBatch(
        token_ids=empty(batch_size),
        positions=empty(batch_size),
        slot_mapping_full=empty(batch_size),
        slot_mapping_sliding=empty(batch_size),
        block_table_full=table,
        block_table_sliding=table,
        context_lens=empty(batch_size, dtype=torch.int32),
        cu_seqlens_q=empty(batch_size + 1, dtype=torch.int32),
        sample_indices=empty(batch_size),
        max_query_len=1,
    )


def least_bytes(launches: list[Launch]) -> float:
    """Return the bytes of a layer's weights and KV cache, once each."""
    return sum(launch.weight_bytes + launch.kv_bytes for launch in launches)


def _labels(launches: list[Launch]) -> list[tuple[str, int]]:
    """Return (name, number of launches of that name before it) for each launch."""
    names = [launch.name for launch in launches]
    return [(name, names[:index].count(name)) for index, name in enumerate(names)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="120b", help="a preset of cantata make-checkpoint")
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256], help="sequences")
    parser.add_argument("--context", type=int, default=8192, help="tokens of each")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    config = preset_config(args.model)
    left, bar, right = ("| ", " | ", " |") if args.markdown else ("", "  ", "")
    for window in sorted(set(config.layer_windows), key=lambda window: window or 0, reverse=True):
        columns = [layer_launches(config, window, args.target, size, args.context) for size in args.batch]
        print(
            f"\n{args.model} on {args.target}, context {args.context}, "
            f"{'full' if window is None else f'window {window}'}; MB by batch\n"
        )
        by_label = [dict(zip(_labels(column), column, strict=True)) for column in columns]
        rows = [
            [
                label[0],
                *(f"{column[label].total_bytes / 1e6:.2f}" if label in column else "" for column in by_label),
            ]
            for label in max(by_label, key=len)
        ]
        rows.append(["launches", *(str(len(column)) for column in columns)])
        rows.append(
            ["together", *(f"{sum(launch.total_bytes for launch in column) / 1e6:.2f}" for column in columns)]
        )
        rows.append(["least", *(f"{least_bytes(column) / 1e6:.2f}" for column in columns)])
        rows.append(
            [
                "ratio",
                *(
                    f"{sum(launch.total_bytes for launch in column) / least_bytes(column):.3f}"
                    for column in columns
                ),
            ]
        )
        header = ["launch", *map(str, args.batch)]
        separator = [["---", *["---:"] * len(columns)]] if args.markdown else []
        width = max(len(row[0]) for row in rows)
        for row in [header, *separator, *rows]:
            print(left + bar.join([row[0].ljust(width), *(cell.rjust(9) for cell in row[1:])]) + right)
    return 0


if __name__ == "__main__":
    sys.exit(main())
