"""Search for stop strings in streamed text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)  # not frozen, which would triple the time to make one for each token
class StopResult:
    """The text that may be shown now.

    Attributes:
        text: text that can no longer be part of a stop string.
        matched: the stop string that was found; nothing may be shown after it.
    """

    text: str
    matched: str | None = None


class StopStrings:
    """A search for the first stop string that is complete, which holds back only text that may
    still become one.

    Of several stop strings that end at the same character the longest is taken, so the answer does
    not depend on how the text is split.
    Building takes time and memory in proportion to the stop strings, a push in proportion to its
    text; text in which none of them begins is searched by a regular expression.
    Follows: Aho and Corasick, "Efficient string matching", CACM 1975.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """
        Raises:
            ValueError: a stop string is empty.
        """
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._fallback = [0] * len(self._next)
        self._link()
        self._begin = re.compile("|".join(map(re.escape, self._next[0])))
        self._node = 0
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> StopResult:
        """Take the next piece of text. After a match all further text is dropped."""
        if self._matched is not None:
            return StopResult("", self._matched)
        pending = self._held + text
        position = len(self._held)
        while position < len(pending):
            if not self._node:
                begin = self._begin.search(pending, position)
                if begin is None:
                    break
                position = begin.start()
            self._node = self._step(self._node, pending[position])
            position += 1
            self._matched = self._match[self._node]
            if self._matched is not None:
                self._held = ""
                return StopResult(pending[: position - len(self._matched)], self._matched)
        safe = len(pending) - self._depth[self._node]
        self._held = pending[safe:]
        return StopResult(pending[:safe])

    def flush(self) -> str:
        """Return the text that was held back, after the last piece; nothing after a match."""
        held, self._held, self._node = self._held, "", 0
        return held

    def _insert(self, stop: str) -> None:
        node = 0
        for depth, character in enumerate(stop, start=1):
            following = self._next[node].get(character)
            if following is None:
                following = self._next[node][character] = len(self._next)
                self._next.append({})
                self._depth.append(depth)
                self._match.append(None)
            node = following
        self._match[node] = stop

    def _link(self) -> None:
        """Give each node, breadth first, the node of its longest proper suffix that is also a
        beginning of a stop string."""
        queue = list(self._next[0].values())
        for node in queue:
            for character, child in self._next[node].items():
                self._fallback[child] = self._step(self._fallback[node], character)
                if self._match[child] is None:
                    self._match[child] = self._match[self._fallback[child]]
                queue.append(child)

    def _step(self, node: int, character: str) -> int:
        while node and character not in self._next[node]:
            node = self._fallback[node]
        return self._next[node].get(character, 0)
