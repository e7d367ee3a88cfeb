"""Prompts that fit because the oldest turns of a chat are left out."""

from collections.abc import Callable, Sequence

from cluster.harmony.message import Message
from workers.errors import ContextLengthExceeded


def fitting(messages: Sequence[Message], render: Callable[[Sequence[Message]], list[int]]) -> list[int]:
    """Return the prompt of the messages without as few of their oldest turns as make it fit.
    Instructions stay, and so does the last turn, which begins with the last message of a user.

    Args:
        render: returns the prompt of some of the messages; called a number of times that grows with
            the logarithm of the number of turns.
    Raises:
        ContextLengthExceeded: the last turn alone is too long.
    """
    try:
        return render(messages)
    except ContextLengthExceeded as error:
        too_long = error
    starts = [index for index, message in enumerate(messages) if message.role == "user"]
    found: list[int] | None = None
    low, high = 1, len(starts) - 1
    while low <= high:
        middle = (low + high) // 2
        try:
            found = render(_from(messages, starts[middle]))
            high = middle - 1
        except ContextLengthExceeded:
            low = middle + 1
    if found is None:
        raise too_long
    return found


def _from(messages: Sequence[Message], start: int) -> list[Message]:
    instructions = [message for message in messages[:start] if message.role == "developer"]
    return [*instructions, *messages[start:]]
