"""Numbers as people write them: sizes such as `2GiB`, counts of tokens such as `32k`."""

import re
from collections.abc import Mapping
from typing import Any

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_size(text: str) -> int:
    """Parse `2GiB`, `512 MB`, `1.5g` or `4096` into bytes; K, M, G and T alone are powers of 1024.

    Raises:
        ValueError: with one sentence.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _SIZE_UNITS:
        raise ValueError(f"{text!r} is not a size; write bytes or a number with KiB, MiB, GiB, KB, MB or GB")
    return int(float(match[1]) * _SIZE_UNITS[match[2].lower()])


_COUNTS = ("engine.max_model_len", "engine.scheduler.max_num_batched_tokens")
"""Settings that take texts such as `32k`, as vLLM's flags of these names do."""
_COUNT_UNITS = {
    unit: base**power
    for units, base in (("kmgt", 1000), ("KMGT", 1024))
    for power, unit in enumerate(units, 1)
}


def parse_count(text: str) -> int:
    """Tokens of `32k` (32,000), `32K` (32,768), `1.5m` or `4096`, in vLLM's notation.

    Raises:
        ValueError: with one sentence.
    """
    match = re.fullmatch(r"\s*(\d+)(\.\d+)?([kmgtKMGT])?\s*", text)
    if match is None or (match[2] and (match[3] is None or match[3].isupper())):
        raise ValueError(
            f"{text!r} is not a number of tokens; write it in digits or as 32k (32,000) or 32K (32,768)"
        )
    return int(float(match[1] + (match[2] or "")) * _COUNT_UNITS.get(match[3], 1))


def texts_to_numbers(values: Any, path: tuple[str, ...] = ()) -> Any:
    """Replace the texts of sizes (names that end in `_bytes`) and of token counts by numbers.

    Raises:
        ValueError: naming the setting.
    """
    if isinstance(values, Mapping):
        return {key: texts_to_numbers(value, (*path, str(key))) for key, value in values.items()}
    is_size, is_count = bool(path) and path[-1].endswith("_bytes"), ".".join(path) in _COUNTS
    if (is_size or is_count) and isinstance(values, str):
        try:
            return parse_size(values) if is_size else parse_count(values)
        except ValueError as error:
            raise ValueError(f"{'.'.join(path)}: {error}") from None
    return values
