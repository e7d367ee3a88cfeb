"""Bad words of a request as the token sequences that an engine must not complete."""

from collections.abc import Sequence

from cluster.harmony.encoding import HarmonyEncoding
from cluster.harmony.message import CHANNELS
from workers.errors import InvalidRequest

Tokens = tuple[int, ...]

_HEADER_WORDS = (*CHANNELS, "assistant")


def bad_word_tokens(
    words: Sequence[str], encoding: HarmonyEncoding, *, writes_headers: bool
) -> tuple[Tokens, ...]:
    """Return the tokens of each word, by itself and after a blank, as a text may have it.

    Args:
        writes_headers: refuse words without which a model cannot write the headers of a chat's
            messages.
    Raises:
        InvalidRequest: with `param`.
    """
    headers = [tuple(encoding.encode_literal(text)) for text in _HEADER_WORDS] if writes_headers else []
    found: dict[Tokens, None] = {}
    for index, word in enumerate(words):
        for text in (word.lstrip(), f" {word.lstrip()}"):
            tokens = tuple(encoding.encode(text))
            if any(_occurs(tokens, header) for header in headers):
                raise InvalidRequest(
                    f"bad_words[{index}] is part of the headers of messages (analysis, commentary, final, "
                    f"assistant), which the model has to write.",
                    f"bad_words[{index}]",
                )
            found[tokens] = None
    return tuple(found)


def _occurs(tokens: Tokens, header: Tokens) -> bool:
    return any(
        header[start : start + len(tokens)] == tokens for start in range(len(header) - len(tokens) + 1)
    )
