"""What is held out of the demo model's training: a fifth of the operand pairs, tool names,
parameter names and string values, decided by their text alone."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from scripts.demo.word_lists import COMMON

Split = Literal["train", "held_out"]
Operator = Literal["+", "-", "*"]
OPERATORS: tuple[Operator, ...] = ("+", "-", "*")

MAX_ADDEND = 99
MAX_FACTOR = 12
EASY_FACTORS = (0, 1, 2, 5, 10)
"""Factors whose multiples are facts, which the analysis of the other products uses."""
PRODUCT_PARTS: Mapping[int, tuple[int, Operator, int]] = {
    3: (2, "+", 1),
    4: (5, "-", 1),
    6: (5, "+", 1),
    7: (5, "+", 2),
    8: (10, "-", 2),
    9: (10, "-", 1),
    11: (10, "+", 1),
    12: (10, "+", 2),
}
"""Each other factor as the sum or difference of two easy ones."""
_ONE_IN = 5
_TRIES = 10_000

Pair = tuple[int, int]


def word_split(text: str) -> Split:
    """Return the part that a name or value belongs to; capitals make no difference."""
    text = text.lower()
    return "held_out" if text not in COMMON and _rank(text) % _ONE_IN == 0 else "train"


def pick(make: Callable[[], str], split: Split) -> str:
    """Return the first text that `make` gives and that belongs to the part.

    Raises:
        ValueError: none of many did.
    """
    for _ in range(_TRIES):
        text = make()
        if word_split(text) == split:
            return text
    raise ValueError(f"no text of the part {split!r}")


def pairs(operator: Operator) -> Iterator[Pair]:
    """Yield all operands, the smaller one first. Both orders are one pair: the analysis of a
    difference below zero is that of the other order."""
    end = (MAX_FACTOR if operator == "*" else MAX_ADDEND) + 1
    for a in range(end):
        yield from ((a, b) for b in range(a, end))


def pair_split(operator: Operator, a: int, b: int) -> Split:
    """Return the part that two operands, in any order, belong to."""
    return "held_out" if (min(a, b), max(a, b)) in _HELD_OUT[operator] else "train"


def _rank(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _held_out_pairs(operator: Operator) -> frozenset[Pair]:
    """Return a fifth of all pairs, among those that no analysis contains."""
    everything = list(pairs(operator))
    free = [pair for pair in everything if not _is_step(operator, *pair)]
    ranked = sorted(free, key=lambda pair: _rank(f"{pair[0]}{operator}{pair[1]}"))
    return frozenset(ranked[: len(everything) // _ONE_IN])


def _is_step(operator: Operator, a: int, b: int) -> bool:
    """Return whether the analysis of another pair may contain a pair with a <= b: of digits, and of
    the multiples of which products are made."""
    if operator == "*":
        return a in EASY_FACTORS or b in EASY_FACTORS
    parts = [(x, y) for x, sign, y in PRODUCT_PARTS.values() if sign == operator]
    multiples = {(n * min(part), n * max(part)) for part in parts for n in range(MAX_FACTOR + 1)}
    digits = b <= MAX_FACTOR if operator == "+" else a < 10 and b < 20
    return digits or (a, b) in multiples


_HELD_OUT = {operator: _held_out_pairs(operator) for operator in OPERATORS}
