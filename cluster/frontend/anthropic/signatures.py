"""Signatures of thinking: with one, reasoning that comes back is known to be the model's own."""

import hashlib

from cluster.sealing import BrokenSeal, Sealer

_CONTEXT = "messages.thinking"
_HASH, _TEXT = b"h", b"t"


class Signatures:
    """The signatures of one owner's thinking.

    Args:
        owner: of the request's API key; its signatures are valid for no other.
    """

    def __init__(self, sealer: Sealer, owner: str) -> None:
        self._sealer = sealer
        self._context = f"{_CONTEXT} {owner}"

    def sign(self, thinking: str, *, shown: bool) -> str:
        """Return the signature of a thinking block.

        Args:
            shown: the block has the text; else the signature carries it, encrypted.
        """
        text = thinking.encode()
        signed = _HASH + hashlib.sha256(text).digest() if shown else _TEXT + text
        return self._sealer.seal(signed, self._context)

    def signed_thinking(self, thinking: str, signature: str) -> str:
        """Return the model's reasoning of a block that came back.

        Args:
            thinking: the text of the block, empty if it was not shown.
        Raises:
            BrokenSeal: the signature is none of this server's, or for another text or API key.
        """
        opened = self._sealer.open(signature, self._context)
        kind, signed = opened[:1], opened[1:]
        if kind == _TEXT and not thinking:
            return signed.decode()
        if kind == _HASH and signed == hashlib.sha256(thinking.encode()).digest():
            return thinking
        raise BrokenSeal("of another text")
