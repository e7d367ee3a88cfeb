"""An automaton as the engine's process follows it: which states have a grammar, or are one token
before such a state, and which tokens are forced."""

import numpy as np
import numpy.typing as npt

from workers.constraint.state import AutomatonTables

Bits = npt.NDArray[np.uint8]


def mask_words(vocab_size: int) -> int:
    """Return the number of 32-bit words of a mask."""
    return -(-vocab_size // 32)


MAX_FORCED = 32
"""Maximum number of forced tokens that are looked ahead."""
LONG_CHAIN = 3
"""Number of forced tokens in a row from which it pays to follow a sequence for their sake alone."""


class HostTables(AutomatonTables):
    """Tables of an automaton for the engine's process.

    Attributes:
        grammars: its grammars, as llguidance reads them.
        grammar_of: by state, the index of its grammar; None without one.
        nears: by state, whether the next token, or one more, may come in a state with a grammar.
        forced: by state, the only token that may come next; None if there are several.
        chains: by state, the tokens that are forced from there on, in a row.
        ends: by state, the tokens with a transition: they end the text of a state with a grammar.
        texts: by state, the tokens that may spell the text of its grammar, as a bitmask; only
            states for which llguidance's mask alone does not say it.
        is_plain: by state, whether a token that comes in it changes nothing but the position.
        is_followed: whether the engine has to follow sequences with this automaton.
    """

    def __init__(self, body: bytes) -> None:
        super().__init__(body)
        states = self.states
        self.grammar_of = [state.grammar if state.HasField("grammar") else None for state in states]
        overflow = [state.overflow if state.HasField("overflow") else None for state in states]
        self.forced = [
            state.allowed[0] if state.restrict and len(set(state.allowed)) == 1 else None for state in states
        ]
        self.chains = [self._forced_from(state) for state in range(len(states))]
        following = [
            {index, *(entry.state for entry in state.transitions)} for index, state in enumerate(states)
        ]
        self.nears = [
            any(
                self.grammar_of[place] is not None
                for target in targets
                for place in (target, overflow[target])
                if place is not None
            )
            for targets in following
        ]
        self.is_plain = [not state.counted and not state.HasField("overflow") for state in states]
        self.is_followed = bool(self.grammars) or max(map(len, self.chains)) >= LONG_CHAIN
        self.ends = [tuple(dict.fromkeys(entry.token_id for entry in state.transitions)) for state in states]
        self.texts: dict[int, Bits] = {}

    def set_texts(self, texts: Bits) -> None:
        """Compute `texts`.

        Args:
            texts: the vocabulary's tokens that are text, as a bitmask.
        """
        shared: dict[bytes, Bits] = {}
        for state, grammar in enumerate(self.grammar_of):
            if grammar is not None and self._restricts(state, self.grammars[grammar], texts):
                bits = self._text_bits(state, texts)
                self.texts[state] = shared.setdefault(bits.tobytes(), bits)

    def _restricts(self, state: int, grammar: str, texts: Bits) -> bool:
        """Return whether the state keeps tokens from its text that the grammar may allow: only Lark
        grammars with `<|name|>` or `<[id]>` allow special tokens."""
        return (
            self.states[state].restrict
            or any(texts[token_id >> 3] >> (token_id & 7) & 1 for token_id in self._kept_out(state))
            or "<|" in grammar
            or "<[" in grammar
        )

    def _kept_out(self, state: int) -> list[int]:
        entry = self.states[state]
        return [*self.ends[state], *(() if entry.restrict else entry.forbidden)]

    def _text_bits(self, state: int, texts: Bits) -> Bits:
        entry, bits = self.states[state], texts.copy()
        if entry.restrict:
            allowed = np.zeros(len(texts) * 8, dtype=np.uint8)
            allowed[np.array(entry.allowed, dtype=np.int64)] = 1
            bits &= np.packbits(allowed, bitorder="little")
        for token_id in self._kept_out(state):
            bits[token_id >> 3] &= ~(1 << (token_id & 7)) & 0xFF
        return bits

    def _forced_from(self, state: int) -> tuple[int, ...]:
        """Return the tokens that come from this state on if each state on the way allows only
        one."""
        tokens: list[int] = []
        seen = set()
        while (token_id := self.forced[state]) is not None and state not in seen and len(tokens) < MAX_FORCED:
            seen.add(state)
            tokens.append(token_id)
            entries = self.states[state].transitions
            state = next((entry.state for entry in entries if entry.token_id == token_id), state)
        return tuple(tokens)
