"""Random weights that keep a gpt-oss model's activations near unit size, drawn in pieces.

Each tensor has its own bit stream, seeded with the checkpoint's seed and the tensor's name: the
same tensor comes out whatever file it is in and however many layers there are. Values are uniform,
made from raw bits (numpy keeps the bit streams stable between versions, not its normal
distribution).
"""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from workers.model.tensor_specs import EMBEDDING, TensorSpec

_PIECE_ELEMENTS = 1 << 16
"""Elements per piece: small enough to stay in the processor's cache; a multiple of 8, so that the
streams do not depend on it."""
_E2M1_RMS = math.sqrt(sum(value * value for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)) / 8)
_SCALE_STEPS = (-1, 0, 1)
"""Offsets of the groups' scale exponents from the wanted exponent."""
_SCALE_RMS = math.sqrt(sum(4.0**step for step in _SCALE_STEPS) / len(_SCALE_STEPS))
_E8M0_BIAS = 127
_QUERY_KEY_GAIN = 1.5
"""Gain of queries and keys. Attention scores have about this size squared: a few keys stand out, so
that the output depends on the context."""


def random_pieces(spec: TensorSpec, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of one tensor as consecutive uint8 arrays of at most 128 KiB."""
    bits = _bit_stream(spec.name, seed)
    remaining = spec.num_elements
    while remaining:
        count = min(remaining, _PIECE_ELEMENTS)
        if spec.kind == "mxfp4_blocks":
            yield _random_bytes(bits, count)
        elif spec.kind == "mxfp4_scales":
            yield _random_scales(bits, count, spec.fan_in)
        else:
            yield _random_bf16(bits, count, *_mean_and_std(spec))
        remaining -= count


def _bit_stream(name: str, seed: int) -> np.random.SFC64:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.SFC64(np.random.SeedSequence(int.from_bytes(digest, "little")))


def _mean_and_std(spec: TensorSpec) -> tuple[float, float]:
    if spec.name.endswith("norm.weight"):
        return 1.0, 0.1
    if spec.name == EMBEDDING or spec.name.endswith(".sinks"):
        return 0.0, 1.0
    if spec.fan_in == 0:
        return 0.0, 0.1
    gain = _QUERY_KEY_GAIN if spec.name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
    return 0.0, gain / math.sqrt(spec.fan_in)


def _random_bytes(bits: np.random.SFC64, count: int) -> NDArray[np.uint8]:
    words = bits.random_raw(-(-count // 8)).astype("<u8", copy=False)
    return words.view(np.uint8)[:count]


def _random_scales(bits: np.random.SFC64, count: int, fan_in: int) -> NDArray[np.uint8]:
    exponent = round(math.log2(1 / math.sqrt(fan_in) / (_E2M1_RMS * _SCALE_RMS)))
    choices = np.array([_E8M0_BIAS + exponent + step for step in _SCALE_STEPS], dtype=np.uint8)
    return choices[np.arange(256) % len(choices)][_random_bytes(bits, count)]


def _random_bf16(bits: np.random.SFC64, count: int, mean: float, std: float) -> NDArray[np.uint8]:
    # A uniform distribution of half-width w has standard deviation w / sqrt(3).
    half_width = std * math.sqrt(3)
    values = _random_bytes(bits, 2 * count).view("<u2").astype(np.float32)
    values -= 32767.5
    values *= np.float32(half_width / 32768)
    values += np.float32(mean)
    return _round_to_bf16(values)


def _round_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round finite numbers to nearest even, in place. Not in torch, whose threads cost more than
    they save on pieces of this size."""
    words = values.view(np.uint32)
    words += 0x7FFF + (words >> 16 & 1)
    words >>= 16
    return words.astype("<u2").view(np.uint8)
