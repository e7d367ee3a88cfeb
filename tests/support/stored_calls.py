"""Calls of the CPU kernels that are stored with their results: a JSON list of cases, each

    {"name",
     "quick": whether short runs have it too, "program": null, or after how many calls `run_program`
     must end, "buffers": [{"data": what is there before, or "num_bytes", "type", "expected",
     "atol", "rtol", "norm"}], "calls": [{"operation", "num_bytes": of its arguments, "fields":
     [[offset, format, value]], "returns"}]}

A field's value is a number, or for a pointer the index of a buffer. A buffer with data and nothing
expected must stay as it is; one with neither is scratch. `isa_driver.py` runs them.
"""

import ctypes
import gzip
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.cpu import structures

GOLDEN = Path(__file__).parents[1] / "golden" / "isa_cases.json.gz"
FORMATS = {ctypes.c_void_p: "P", ctypes.c_int64: "q", ctypes.c_int32: "i", ctypes.c_float: "f"}


@dataclass(frozen=True, eq=False)
class Output:
    """An operation's output.

    Attributes:
        expected: fp32 where rounding matters; `dtype` is the type that is written.
        before: contents before the call; None: bytes of 255.
        tolerance: atol, rtol, norm as in isa_driver.py; nothing: exactly this.
    """

    expected: Tensor
    tolerance: dict[str, float] = field(default_factory=dict)
    before: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Scratch:
    num_bytes: int


@dataclass
class Case:
    """A case as it is stored, made call by call."""

    name: str
    quick: bool = True
    program: int | None = None
    buffers: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    _known: dict[Any, int] = field(default_factory=dict, repr=False)

    def call(self, operation: str, returns: int | None = None, **values: Any) -> "Case":
        """Add a call: each field of its structure is a number, or for a pointer a tensor that is
        read, an Output, a Scratch or None."""
        structure = structures.OPERATIONS[operation].arguments
        assert {name for name, _ in structure._fields_} == set(values), operation
        fields: list[list[Any]] = []
        for name, kind, *_ in structure._fields_:
            value, form = values[name], FORMATS[kind]
            if value is not None:
                fields.append(
                    [getattr(structure, name).offset, form, self._place(value) if form == "P" else value]
                )
        self.calls.append(
            {
                "operation": operation,
                "num_bytes": ctypes.sizeof(structure),
                "fields": fields,
                "returns": returns,
            }
        )
        return self

    def stored(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def _place(self, value: Tensor | Output | Scratch) -> int:
        if value not in self._known:
            self._known[value] = len(self.buffers)
            self.buffers.append(_buffer(value))
        return self._known[value]


def _buffer(value: Tensor | Output | Scratch) -> dict[str, Any]:
    if isinstance(value, Scratch):
        return {"num_bytes": value.num_bytes}
    if isinstance(value, Tensor):
        return {"type": _name(value), "data": _text(value)}
    before = {"num_bytes": value.expected.nbytes} if value.before is None else {"data": _text(value.before)}
    return before | {"type": _name(value.expected), "expected": _text(value.expected)} | value.tolerance


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _text(tensor: Tensor) -> str:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes().hex()


class Inputs:
    """Random tensors, the same everywhere."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def bytes(self, *shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.frombuffer(bytearray(self._random.randbytes(count)), dtype=torch.uint8).view(shape)

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32, bits: int = 4) -> Tensor:
        """Return numbers from -4 to 4, of so few bits that the file is small and bf16 holds them
        exactly."""
        return (((self.bytes(*shape) >> (8 - bits)).float() - 2 ** (bits - 1)) / 2 ** (bits - 3)).to(dtype)

    def permutation(self, count: int) -> list[int]:
        return self._random.sample(range(count), count)


def packed_dense(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the layout of kernels/cpu/dense.py: (values, scales, the weights that they stand for
    [N, K] fp32)."""
    num_rows, width = weight.shape
    groups, columns = -(-num_rows // 16), -(-width // 32) * 32
    wide, scales = weight.float(), None
    if dtype == torch.int8:
        largest = wide.abs().amax(1)
        scales = largest / 127
        scaled = wide * (127 / largest)[:, None]
        wide = (scaled.abs() + 0.5).floor() * scaled.sign()
    padded = functional.pad(wide, (0, columns - width, 0, groups * 16 - num_rows)).to(dtype)
    if scales is None:
        return padded.view(groups, 16, columns // 2, 2).transpose(1, 2).contiguous(), None, wide
    # [group, unit, row, quad, pair, column] to [group, quad, unit, pair, row, column]
    values = padded.view(groups, 4, 4, columns // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).contiguous()
    return values, scales, wide * scales[:, None]


def rows16(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the layout of kernels/cpu/layout.py, from natural blocks [E, N, K/32, 16] and scales
    [E, N, K/32]."""
    num_experts, num_rows, num_groups = scales.shape
    columns = torch.stack((blocks & 15, blocks >> 4), dim=-1).view(
        num_experts, num_rows // 16, 16, num_groups * 4, 2, 2, 2
    )
    nibbles = columns.permute(0, 1, 3, 2, 6, 4, 5)  # [expert, group, chunk, row, odd, byte, nibble]
    packed = nibbles[..., 0] | (nibbles[..., 1] << 4)
    shape = (num_experts, num_rows // 16, num_groups * 4, 64)
    return packed.reshape(shape), scales.view(num_experts, num_rows // 16, 16, num_groups).transpose(
        2, 3
    ).contiguous()


def load() -> list[dict[str, Any]]:
    """Return the stored cases."""
    stored: list[dict[str, Any]] = json.loads(gzip.decompress(GOLDEN.read_bytes()))
    return stored


def save(made: list[dict[str, Any]], path: Path) -> None:
    path.write_bytes(gzip.compress(json.dumps(made).encode(), mtime=0))
