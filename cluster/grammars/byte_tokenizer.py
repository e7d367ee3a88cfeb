"""A tokenizer whose tokens are the 256 bytes: enough to compile a grammar, and made in
milliseconds."""

from collections.abc import Sequence

from llguidance import LLTokenizer, TokenizerWrapper

_END = 256


class _Bytes:
    """What llguidance asks of a tokenizer."""

    eos_token_id = _END
    bos_token_id = None
    tokens: Sequence[bytes] = (*(bytes([byte]) for byte in range(256)), b"<|end|>")
    special_token_ids = (_END,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def byte_tokenizer() -> LLTokenizer:
    """Return a tokenizer in which a byte is its own token id, and 256 is the end."""
    return LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=_END + 1, slices=[])
