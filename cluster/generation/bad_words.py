"""Bad words of a request as the token sequences that an engine must not complete."""

from collections.abc import Sequence

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.message import CHANNELS
from workers.errors import InvalidRequest

Tokens = tuple[int, ...]

_HEADER_WORDS = (*CHANNELS, "assistant")


def bad_word_tokens(words: Sequence[str], encoding: HarmonyEncoding) -> tuple[Tokens, ...]:
    """Return the tokens of each word, by itself and after a blank, as a text may have it."""
    texts = [text for word in words for text in (word.lstrip(), f" {word.lstrip()}")]
    return tuple(dict.fromkeys(tuple(encoding.encode(text)) for text in texts))


def check_headers_can_be_written(words: Sequence[str], encoding: HarmonyEncoding) -> None:
    """Refuse bad words without which a model cannot write the headers of a chat's messages.

    Raises:
        InvalidRequest: with `param`.
    """
    if not words:
        return
    headers = [tuple(encoding.encode_literal(text)) for text in _HEADER_WORDS]
    for index, word in enumerate(words):
        for tokens in bad_word_tokens([word], encoding):
            if any(_occurs(tokens, header) for header in headers):
                raise InvalidRequest(
                    f"bad_words[{index}] is part of the headers of messages (analysis, commentary, final, "
                    f"assistant), which the model has to write.",
                    f"bad_words[{index}]",
                )


def _occurs(tokens: Tokens, header: Tokens) -> bool:
    return any(
        header[start : start + len(tokens)] == tokens for start in range(len(header) - len(tokens) + 1)
    )
