"""Tokens as the APIs report them: their texts with the engine's log probabilities."""

from collections.abc import Iterator, Sequence

from cluster.events import TokenCandidate, TokenLogprob
from cluster.harmony.encoding import HarmonyEncoding, IncrementalDecoder
from workers.request import TokenLogprobs


def token_logprob(
    encoding: HarmonyEncoding, token_id: int, logprobs: TokenLogprobs, text_offset: int
) -> TokenLogprob:
    """Return the engine's log probabilities of a token, with the texts of all tokens in them."""
    top = tuple(_candidate(encoding, other, logprob) for other, logprob in logprobs.top)
    return TokenLogprob(_candidate(encoding, token_id, logprobs.logprob), text_offset, top)


def prompt_token_logprobs(
    encoding: HarmonyEncoding,
    prompt: Sequence[int],
    found: Sequence[TokenLogprobs],
    *,
    skip_special_tokens: bool,
    with_first: bool,
) -> Iterator[TokenLogprob]:
    """Yield the log-probabilities of a prompt's tokens, with their offsets in its text.

    Args:
        found: the engine's, from the second token on.
        skip_special_tokens: the text is without the names of special tokens.
        with_first: begin with the first token, whose log-probability is no matter.
    """
    decoder = IncrementalDecoder(encoding)
    offset = 0
    for position, token_id in enumerate(prompt):
        if position:
            yield token_logprob(encoding, token_id, found[position - 1], offset)
        elif with_first:
            yield token_logprob(encoding, token_id, TokenLogprobs(0.0), offset)
        if token_id not in encoding.special_ids:
            offset += len(decoder.push(token_id))
        else:
            offset += len(decoder.flush())
            offset += 0 if skip_special_tokens else len(token_text(encoding, token_id))


def _candidate(encoding: HarmonyEncoding, token_id: int, logprob: float) -> TokenCandidate:
    return TokenCandidate(token_id, token_text(encoding, token_id), encoding.token_bytes(token_id), logprob)


def token_text(encoding: HarmonyEncoding, token_id: int) -> str:
    """Return the displayed form of a single token: its text, the name of a special token, or
    `bytes:` and hex escapes for part of a character."""
    token_bytes = encoding.token_bytes(token_id)
    if not token_bytes:
        return encoding.decode([token_id], skip_special_tokens=False)
    try:
        return token_bytes.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)
