"""Signatures of thinking: with one, reasoning that comes back is known to be the model's own."""

import hashlib

from cluster.sealing import BrokenSeal, Sealer

_CONTEXT = "messages.thinking"
_HASH, _TEXT = b"h", b"t"


def signature(thinking: str, sealer: Sealer, *, shown: bool) -> str:
    """Return the signature of a thinking block.

    Args:
        shown: the block has the text; else the signature carries it, encrypted.
    """
    text = thinking.encode()
    return sealer.seal(_HASH + hashlib.sha256(text).digest() if shown else _TEXT + text, _CONTEXT)


def signed_thinking(thinking: str, signature: str, sealer: Sealer) -> str:
    """Return the model's reasoning of a block that came back.

    Args:
        thinking: the text of the block, empty if it was not shown.
    Raises:
        BrokenSeal: the signature is none of this server's, or for another text.
    """
    opened = sealer.open(signature, _CONTEXT)
    kind, signed = opened[:1], opened[1:]
    if kind == _TEXT and not thinking:
        return signed.decode()
    if kind == _HASH and signed == hashlib.sha256(thinking.encode()).digest():
        return thinking
    raise BrokenSeal("of another text")
