"""llguidance: the tokenizer and the matchers of grammars. Imported only when the tokenizer is
loaded (`GrammarConfig.load`), as it takes hundreds of megabytes."""

from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from workers.constraint.parser_limits import parser_limits
from workers.constraint.tables import Bits, mask_words
from workers.errors import ConfigError, InvalidRequest


class GrammarTokenizer:
    """A checkpoint's tokenizer as llguidance needs it: 0.5 GiB and 3 s of loading for 200,000
    tokens. The ids that have no token, and special tokens, are in no text.

    Args:
        vocab_size: the model's, which can be larger than the tokenizer's.
    Attributes:
        texts: the tokens that are text, as a bitmask of whole words of 32 bits.
        eos: the token that a mask has where the text may end.
        bytes: the tokens of one byte.
    Raises:
        ConfigError: the folder has no tokenizer.json, or it cannot be read.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(
                f"grammars (response_format, strict tools) need the checkpoint's tokenizer.json, and "
                f"{folder} has none"
            )
        try:
            self.tokenizer = LLTokenizer(str(file), n_vocab=vocab_size)
        except ValueError as error:
            raise ConfigError(f"{file} cannot be read as the tokenizer of grammars: {error}") from error
        is_text = np.zeros(mask_words(vocab_size) * 32, dtype=np.uint8)
        is_text[:vocab_size] = [not self.tokenizer.is_special_token(i) for i in range(vocab_size)]
        self.texts: Bits = np.packbits(is_text, bitorder="little")
        self.eos: int = self.tokenizer.eos_token
        self.bytes = np.array(
            [i for i in np.flatnonzero(is_text).tolist() if len(self.tokenizer.decode_bytes([i])) == 1],
            dtype=np.int64,
        )

    def compile(self, grammar: str) -> LLMatcher:
        """Return a matcher at the beginning of a text. Releases the GIL; takes milliseconds, or
        seconds for a hostile grammar, whatever the vocabulary.

        Raises:
            InvalidRequest: llguidance does not take the grammar; the sentence may quote it.
        """
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0, limits=parser_limits())
        if matcher.is_error():
            raise InvalidRequest(
                f"the grammar was refused: {first_line(matcher.get_error())}", "constraint.grammars"
            )
        return matcher


def first_line(error: str) -> str:
    """Return the sentence of an error of llguidance without its dump of internal state."""
    return error.partition("\n")[0].strip()
