"""Whether a grammar compiles, and the place in a schema that does not. Runs in the worker
process."""

import json
import re
import time
from collections.abc import Callable

from llguidance import LLMatcher, LLTokenizer

from cluster.grammars.byte_tokenizer import byte_tokenizer
from cluster.grammars.subschemas import Place, Subschemas
from cluster.grammars.wire import Verdict
from workers.constraint.parser_limits import parser_limits

_MAX_REASON_CHARS = 400
_MAX_PATH_CHARS = 200
MAX_SEARCH_CPU_S = 0.5
"""Processor time, in seconds, after which the search for the place of an error ends."""
_MAX_TRIES = 300
"""Maximum number of subschemas that are compiled to find a place."""
_MAX_KEYWORDS = 30


class Compiler:
    """llguidance over bytes."""

    def __init__(self) -> None:
        self._tokenizer: LLTokenizer = byte_tokenizer()
        self._limits = parser_limits()

    def verdict(self, text: str, on_error: Callable[[], None] = lambda: None) -> Verdict:
        """Compile a grammar.

        Args:
            on_error: called before the search for the place in a schema that does not compile.
        """
        message = self._error(text)
        if message is None:
            return Verdict()
        on_error()
        until = time.process_time() + MAX_SEARCH_CPU_S
        place: Place = ()
        schema = json.loads(text)["grammars"][0].get("json_schema")
        if isinstance(schema, dict) and not message.startswith("recursion limit"):
            place = self._place(schema, message, until)
        return Verdict(_shown_reason(message), _shown_place(place))

    def beginning_verdict(self, text: str, beginning: str) -> Verdict:
        """Return whether texts of a grammar can begin with this one."""
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        return Verdict() if matcher.consume_tokens(list(beginning.encode())) else Verdict("no beginning")

    def _error(self, text: str) -> str | None:
        """Return why llguidance does not take a grammar, or None."""
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        if matcher.is_error():
            return str(matcher.get_error())
        matcher.compute_bitmask()
        if not matcher.is_error():
            return None
        reason = str(matcher.get_error()).partition("\n")[0]
        return "no text is allowed" if reason.startswith("NoExtension") else reason

    def _place(self, schema: dict[str, object], message: str, until: float) -> Place:
        """Return the path of the keyword in a schema that gives this error."""
        parts = Subschemas(schema)
        tries = 0

        def fails(schemas: list[object]) -> bool:
            nonlocal tries
            tries += 1
            return parts.original(self._error(parts.document(schemas))) == message

        def exhausted() -> bool:
            return tries > _MAX_TRIES or time.process_time() > until

        place: Place = ()
        node: object = schema
        followed: set[Place] = set()
        while not exhausted() and place not in followed:
            followed.add(place)
            alone = parts.alone(node)
            if fails([alone]):
                node = alone
                break
            within = list(parts.within(node, place))
            while within and not exhausted():
                if len(within) == 1 and not fails([within[0][1]]):
                    within = []
                elif len(within) == 1:
                    break
                else:
                    half = within[: len(within) // 2]
                    within = half if fails([part for _, part in half]) else within[len(half) :]
            if len(within) != 1:
                break
            place, node = within[0]
        if not isinstance(node, dict) or len(node) > _MAX_KEYWORDS or exhausted():
            return place
        causes = [
            keyword
            for keyword in node
            if not fails([{name: value for name, value in node.items() if name != keyword}])
        ]
        return (*place, causes[0]) if len(causes) == 1 else place


def _shown_reason(message: str) -> str:
    """Return the sentence of a message, without the lines that it quotes."""
    first, *others = message.splitlines() or [""]
    others = [line.removeprefix("error: ") for line in others if line.startswith("error: ")]
    text = " ".join([first.strip(), *others])
    if len(text) > _MAX_REASON_CHARS:
        half = _MAX_REASON_CHARS // 2
        text = f"{text[:half]} … {text[-half:]}"
    return re.sub(r"[\x00-\x1f\x7f]+", " ", text)


def _shown_place(place: Place) -> str:
    """Return a place such as `.properties.a.anyOf[2]`; only its end where it is long."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return text if len(text) <= _MAX_PATH_CHARS else f"…{text[-_MAX_PATH_CHARS:]}"
