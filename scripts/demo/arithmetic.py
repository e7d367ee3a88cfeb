"""Sums, differences and products with the analysis that leads to them, digit by digit."""

import random
from collections.abc import Sequence

from cluster.chat_options import ReasoningEffort
from cluster.harmony.message import Message
from scripts.demo.examples import answer
from scripts.demo.split import (
    EASY_FACTORS,
    MAX_ADDEND,
    MAX_FACTOR,
    PRODUCT_PARTS,
    Operator,
    Split,
    pair_split,
)

_QUESTIONS: dict[Operator, Sequence[str]] = {
    "+": (
        *("What is {a} + {b}?", "{a} + {b}", "{a}+{b}", "{a}+{b}?", "{a} + {b} = ?", "What is {a}+{b}?"),
        *("Calculate {a} + {b}.", "How much is {a} + {b}?", "What is {a} plus {b}?", "Add {a} and {b}."),
        *("What is the sum of {a} and {b}?", "Please add {a} and {b}.", "{a} plus {b}", "What's {a} + {b}?"),
        *("Can you add {a} and {b}?", "Compute {a} + {b}", "what is {a} + {b}", "How much is {a} plus {b}?"),
    ),
    "-": (
        *("What is {a} - {b}?", "{a} - {b}", "{a}-{b}", "{a}-{b}?", "{a} - {b} = ?", "What is {a}-{b}?"),
        *("Calculate {a} - {b}.", "How much is {a} - {b}?", "What is {a} minus {b}?", "{a} minus {b}"),
        *("Subtract {b} from {a}.", "Please subtract {b} from {a}.", "What's {a} - {b}?"),
        *("Can you subtract {b} from {a}?", "Compute {a} - {b}", "what is {a} - {b}"),
    ),
    "*": (
        *("What is {a} * {b}?", "{a} * {b}", "{a}*{b}", "{a}*{b}?", "{a} * {b} = ?", "What is {a}*{b}?"),
        *("Calculate {a} * {b}.", "How much is {a} * {b}?", "What is {a} times {b}?", "{a} times {b}"),
        *("Multiply {a} by {b}.", "Please multiply {a} and {b}.", "What's {a} * {b}?", "{a} x {b}"),
        *("What is {a} x {b}?", "What is {a} × {b}?", "{a} × {b}", "what is {a} * {b}"),
        *("What is the product of {a} and {b}?", "How much is {a} times {b}?"),
    ),
}
_VALUES = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
_NAMES = {"+": "sum", "-": "difference", "*": "product"}


def operands(rng: random.Random, operator: Operator, split: Split) -> tuple[int, int]:
    """Draw two operands of the part. Products with two factors that need an analysis are drawn
    more often than their share, differences below zero less often."""
    largest = MAX_FACTOR if operator == "*" else MAX_ADDEND
    while True:
        a, b = rng.randint(0, largest), rng.randint(0, largest)
        if operator == "-" and a < b and rng.random() < 0.7:
            a, b = b, a
        if operator == "*" and split == "train" and not _hard(a, b) and rng.random() < 0.5:
            continue
        if operator != "*" and min(a, b) < 10 and rng.random() < 0.3:
            continue
        if pair_split(operator, a, b) == split:
            return a, b


def question(rng: random.Random, operator: Operator, a: int, b: int) -> str:
    return rng.choice(_QUESTIONS[operator]).format(a=a, b=b)


def worked(operator: Operator, a: int, b: int, effort: ReasoningEffort) -> tuple[Message, ...]:
    """Return the turn that answers: one line of steps with low effort, longer with more."""
    result = _VALUES[operator](a, b)
    steps = ", ".join(_steps(operator, a, b))
    match effort:
        case "low":
            analysis = f"{steps}."
        case "medium":
            analysis = f"I work out the {_NAMES[operator]}. {steps}. So it is {result}."
        case "high":
            analysis = (
                f"The user wants the {_NAMES[operator]} of {a} and {b}. I go step by step, ones first: "
                f"{steps}. So {a} {operator} {b} = {result}. I give the result in one short sentence."
            )
    return answer(analysis, f"{a} {operator} {b} = {result}")


def _hard(a: int, b: int) -> bool:
    return a not in EASY_FACTORS and b not in EASY_FACTORS


def _steps(operator: Operator, a: int, b: int) -> list[str]:
    match operator:
        case "+":
            return _sum_steps(a, b)
        case "-" if a < b:
            return [f"{a}<{b}", *_difference_steps(b, a), "minus"]
        case "-":
            return _difference_steps(a, b)
        case _:
            return _product_steps(a, b)


def _sum_steps(a: int, b: int) -> list[str]:
    (tens_a, ones_a), (tens_b, ones_b) = divmod(a, 10), divmod(b, 10)
    carry, _ = divmod(ones_a + ones_b, 10)
    steps = [f"{ones_a}+{ones_b}={ones_a + ones_b}"]
    tens = tens_a + tens_b + carry
    if tens:
        steps.append(f"{tens_a}+{tens_b}{'+1' * carry}={tens}")
    return steps


def _difference_steps(a: int, b: int) -> list[str]:
    (tens_a, ones_a), (tens_b, ones_b) = divmod(a, 10), divmod(b, 10)
    borrow = int(ones_a < ones_b)
    ones = ones_a + 10 * borrow
    steps = [f"{ones}-{ones_b}={ones - ones_b}"]
    if tens_a:
        steps.append(f"{tens_a}-{tens_b}{'-1' * borrow}={tens_a - tens_b - borrow}")
    return steps


def _product_steps(a: int, b: int) -> list[str]:
    if not _hard(a, b):
        return [f"{a}*{b}={a * b}"]
    first, operator, second = PRODUCT_PARTS[b]
    parts = [f"{b}={first}{operator}{second}", f"{a}*{first}={a * first}", f"{a}*{second}={a * second}"]
    together = _sum_steps if operator == "+" else _difference_steps
    return [*parts, *together(a * first, a * second)]
