"""Time and memory traffic of the C++ operations, for comparison with the machine's limits."""

import ctypes
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.cpu import native

_ITEM_BYTES = {code: dtype.itemsize for dtype, code in native.DATA_TYPES.items()}
_MXFP4_BYTES = 17 / 32
"""Bytes per MXFP4 weight: four bits, and one byte of scale for 32 weights."""


@dataclass(frozen=True, slots=True)
class Work:
    """The work of one operation, or of many calls of it.

    Attributes:
        num_bytes: bytes of the weights, cache and logits that had to be read, and of activations;
            each counted once per call.
        num_flops: a multiplication and an addition count as two.
    """

    calls: int = 0
    seconds: float = 0.0
    num_bytes: float = 0.0
    num_flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.calls + other.calls,
            self.seconds + other.seconds,
            self.num_bytes + other.num_bytes,
            self.num_flops + other.num_flops,
        )

    def __sub__(self, other: "Work") -> "Work":
        return Work(
            self.calls - other.calls,
            self.seconds - other.seconds,
            self.num_bytes - other.num_bytes,
            self.num_flops - other.num_flops,
        )


class Profile:
    """Sums of work by operation; layers of equal shape are one operation. Any thread may read while
    another computes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._work: defaultdict[str, Work] = defaultdict(Work)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record all C++ operations of this process within the context."""
        with native.observing(self._observe):
            yield

    def snapshot(self) -> dict[str, Work]:
        """Return the sums so far, in the order in which operations first occurred."""
        with self._lock:
            return dict(self._work)

    def _observe(self, name: str, arguments: Any, seconds: float) -> None:
        describe = _OPERATIONS.get(name)
        label, num_bytes, num_flops = (name, 0.0, 0.0) if describe is None else describe(arguments)
        with self._lock:
            self._work[label] += Work(1, seconds, num_bytes, num_flops)


def difference(later: dict[str, Work], earlier: dict[str, Work]) -> dict[str, Work]:
    """Return the work between two snapshots."""
    return {label: work - earlier.get(label, Work()) for label, work in later.items()}


Description = tuple[str, float, float]
"""Label, bytes, floating-point operations."""


def _int32(address: int, count: int) -> npt.NDArray[np.int32]:
    return np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(address))


def _matmul(
    name: str, rows: int, width: int, outputs: int, weight_bytes: float, activation_bytes: int
) -> Description:
    num_bytes = outputs * width * weight_bytes + rows * (width + outputs) * activation_bytes
    return f"{name} {outputs} x {width}", num_bytes, 2.0 * rows * width * outputs


def _linear(args: Any) -> Description:
    return _matmul("linear", args.num_rows, args.width, args.num_outputs, _ITEM_BYTES[args.weight_type], 4)


def _dense(args: Any) -> Description:
    name, weight_bytes = ("int8", 1) if args.scales else ("bf16", 2)
    return _matmul(f"dense {name}", args.num_rows, args.width, args.num_outputs, weight_bytes, 2)


def _experts(args: Any) -> Description:
    local = _int32(args.topk_ids, args.num_tokens * args.top_k) - args.first_expert
    local = local[(local >= 0) & (local < args.num_experts)]
    weights = 3 * args.hidden * args.intermediate
    return (
        "experts",
        len(np.unique(local)) * weights * _MXFP4_BYTES + 4 * args.num_tokens * args.hidden,
        2.0 * len(local) * weights,
    )


def _attention(args: Any) -> Description:
    ends = _int32(args.context_lens, args.num_seqs).astype(np.int64)
    queries = np.diff(_int32(args.cu_seqlens_q, args.num_seqs + 1).astype(np.int64))
    window = args.window or int(ends.max(initial=1))
    oldest = np.maximum(ends - queries + 1 - window, 0)
    keys = int((ends - oldest)[queries > 0].sum())
    seen = sum(
        int(np.minimum(np.arange(end - count, end) + 1, window).sum())
        for end, count in zip(ends, queries, strict=True)
    )
    item = _ITEM_BYTES[args.type]
    num_bytes = (
        2 * keys * args.num_kv_heads * args.head_dim * item
        + 2 * args.num_tokens * args.num_heads * args.head_dim * item
    )
    label = f"attention, window {args.window}" if args.window else "attention, all keys"
    return label, num_bytes, 4.0 * seen * args.num_heads * args.head_dim


def _norm(args: Any) -> Description:
    return "norms", args.num_rows * args.width * _ITEM_BYTES[args.type] * (4 if args.delta else 2), 0.0


def _rope_and_store(args: Any) -> Description:
    heads = 2 * args.num_heads + 4 * args.num_kv_heads
    return "RoPE and KV store", args.num_tokens * heads * args.head_dim * _ITEM_BYTES[args.type], 0.0


def _gate_topk(args: Any) -> Description:
    return "gate top-k", args.num_tokens * args.num_experts * 4, 0.0


def _sample(args: Any) -> Description:
    return "sampling", args.num_rows * args.vocab * 4 * (2 if args.temperature else 1), 0.0


def _logprobs(args: Any) -> Description:
    return "log probabilities", args.num_rows * args.vocab * 8, 0.0


def _automaton(args: Any) -> Description:
    # A row's vectors; what else is touched depends on its state.
    return "automata", args.num_rows * 40, 0.0


def _embed(args: Any) -> Description:
    return "embedding", 2 * args.num_tokens * args.width * _ITEM_BYTES[args.type], 0.0


def _yarn(args: Any) -> Description:
    return "rotary angles", args.num_tokens * (8 + 8 * args.half), 0.0


def _convert(args: Any) -> Description:
    return "conversions", 6 * args.count, 0.0


_OPERATIONS: dict[str, Callable[[Any], Description]] = {
    "linear": _linear,
    "dense": _dense,
    "experts": _experts,
    "attention": _attention,
    "norm": _norm,
    "rope_and_store": _rope_and_store,
    "gate_topk": _gate_topk,
    "sample": _sample,
    "logprobs": _logprobs,
    "automaton_mask": _automaton,
    "automaton_advance": _automaton,
    "embed": _embed,
    "yarn": _yarn,
    "convert": _convert,
}
