"""Sequences of tokens that a sequence's output must not contain."""

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class BadWords:
    """The bad words of one sequence: a token that would complete one of them may not come next.

    Args:
        words: token ids of each, at least one.
        output: the sequence's output tokens so far.
    """

    def __init__(self, words: Sequence[Sequence[int]], output: Sequence[int]) -> None:
        self._single = np.array(sorted({word[0] for word in words if len(word) == 1}), dtype=np.int64)
        # The tokens before the last one, and the last one, by the token before the last one.
        self._endings: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        for word in words:
            if len(word) > 1:
                self._endings.setdefault(word[-2], []).append((tuple(word[:-1]), word[-1]))
        self._recent = deque(output, maxlen=max(map(len, words), default=1) - 1)

    @property
    def depend_on_output(self) -> bool:
        """True if what is forbidden depends on the output so far."""
        return bool(self._endings)

    def push(self, token_id: int) -> None:
        """Add one output token."""
        self._recent.append(token_id)

    def forbidden(self, further: Sequence[int] = ()) -> Ints:
        """Return the tokens that may not come next.

        Args:
            further: output tokens after those that were pushed.
        """
        recent = (*self._recent, *further)
        endings = self._endings.get(recent[-1], ()) if recent else ()
        last = [token_id for before, token_id in endings if recent[-len(before) :] == before]
        return np.concatenate((self._single, np.array(last, dtype=np.int64))) if last else self._single
