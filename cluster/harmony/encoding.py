"""Conversion of text to token ids and back with a checkpoint's tokenizer.json; the harmony special
tokens are found by name."""

import codecs
import ctypes
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

from workers.errors import CheckpointError

HARMONY_TOKENS = (
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|constrain|>",
    "<|return|>",
    "<|call|>",
    "<|endoftext|>",
)

CHUNK_CHARS = 1 << 17
"""Approximate length of the pieces, in characters, in which longer texts are encoded, so that
memory depends on the piece and not on the text."""
MAX_UNBROKEN_CHARS = 1 << 20
"""Longest text, in characters, without any of the cuts below (one word, one script without
punctuation). Longer text is cut here, though that may change the ids around the cut."""

# Pre-tokenizers of this family (GPT-2, cl100k, o200k) never put these neighbours into one piece, so
# a cut between them is harmless.
_CUT = re.compile(r"[^\W\d_](?=[ \n,.;:。，、])|\n(?=[^\W\d_])")
_USUAL_SPECIAL = re.compile(r"<\|[^<|>\s]+\|>")
_SURROGATE = re.compile("[\ud800-\udfff]")


def byte_alphabet() -> dict[str, int]:
    """Return the 256 characters in which a byte-level BPE spells bytes (GPT-2's
    `bytes_to_unicode`): printable Latin-1 stands for itself, the other bytes for the characters
    from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


class HarmonyEncoding:
    """The tokenizer of a checkpoint. Immutable after loading and safe to use from several threads;
    `encode` releases the GIL.

    Attributes:
        vocab_size: highest token id + 1.
        start, end, message, channel, constrain, return_, call, endoftext: ids of the harmony
            tokens.
        stop_token_ids: the ids that end a turn.
        control_tokens: the names of the harmony tokens, without their brackets, by id.
        special_ids: ids of all special tokens, reserved ones included.
        max_token_bytes: length of the longest token in bytes: a text of n characters has at least n
            / max_token_bytes tokens.
    """

    def __init__(self, tokenizer: Tokenizer, source: str = "the tokenizer") -> None:
        """
        Args:
            source: name of the tokenizer's origin in error messages.
        Raises:
            CheckpointError: not a byte-level BPE, or a harmony token is missing.
        """
        added = tokenizer.get_added_tokens_decoder()
        special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        missing = [name for name in HARMONY_TOKENS if name not in special_ids]
        if missing:
            raise CheckpointError(
                f"{source} has no special token {missing[0]}: it is not the tokenizer of a gpt-oss model."
            )
        self.start = special_ids["<|start|>"]
        self.end = special_ids["<|end|>"]
        self.message = special_ids["<|message|>"]
        self.channel = special_ids["<|channel|>"]
        self.constrain = special_ids["<|constrain|>"]
        self.return_ = special_ids["<|return|>"]
        self.call = special_ids["<|call|>"]
        self.endoftext = special_ids["<|endoftext|>"]
        self.stop_token_ids = (self.return_, self.call, self.endoftext)
        self.control_tokens = {special_ids[name]: name[2:-2] for name in HARMONY_TOKENS}
        self.special_ids = frozenset(special_ids.values())
        self._special_by_name = special_ids
        self._name_by_special = {token_id: name for name, token_id in special_ids.items()}
        unusual = sorted(
            (name for name in special_ids if not _USUAL_SPECIAL.fullmatch(name)), key=len, reverse=True
        )
        self._special_pattern = re.compile("|".join([_USUAL_SPECIAL.pattern, *map(re.escape, unusual)]))
        self._bytes_of = _bytes_of_tokens(tokenizer, source)
        self.vocab_size = len(self._bytes_of)
        self.max_token_bytes = max(1, *map(len, self._bytes_of))
        # The last writes; from here on the tokenizer is read only, which makes it safe to share
        # between threads.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        # The library starts its threads at the first use, and never again if there is no memory for
        # them then.
        self._encode_chunk("")
        self._literals: dict[str, tuple[int, ...]] = {}

    @classmethod
    def load(cls, path: Path, vocab_size: int | None = None) -> "HarmonyEncoding":
        """Read `tokenizer.json` of the checkpoint folder `path`.

        Args:
            vocab_size: the model's; None: not checked.
        Raises:
            CheckpointError: the file is missing or foreign, lacks a harmony token, or has ids that
                the model does not have.
        """
        file = path / "tokenizer.json"
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{file} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}."
            ) from error
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the binding raises bare Exception for any fault of the file
            raise CheckpointError(f"{file} is not a tokenizer: {_one_line(error)}.") from error
        encoding = cls(tokenizer, str(file))
        _give_back_free_memory()
        if vocab_size is not None and encoding.vocab_size > vocab_size:
            raise CheckpointError(
                f"{file} has token ids up to {encoding.vocab_size - 1}, but the model's vocab_size is "
                f"{vocab_size}: they do not fit."
            )
        return encoding

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Return the token ids of `text`; special tokens typed in it are plain text. A lone
        surrogate counts as U+FFFD.

        Args:
            limit: stop soon after this many ids: a longer result says only that the text is too
                long, and may be incomplete.
        """
        if _SURROGATE.search(text):
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = []
        for chunk in _chunks(text, CHUNK_CHARS, MAX_UNBROKEN_CHARS):
            ids += self._encode_chunk(chunk)
            if limit is not None and len(ids) > limit:
                break
        return ids

    def encode_with_special(self, text: str, limit: int | None = None) -> list[int]:
        """Encode text in which names of special tokens become those tokens: for raw harmony
        prompts, never for a chat's content."""
        ids: list[int] = []
        plain_from = 0
        for match in self._special_pattern.finditer(text):
            token_id = self._special_by_name.get(match.group())
            if token_id is not None:
                ids += self.encode(text[plain_from : match.start()], limit)
                ids.append(token_id)
                plain_from = match.end()
                if limit is not None and len(ids) > limit:
                    return ids
        return ids + self.encode(text[plain_from:], limit)

    def encode_literal(self, text: str) -> tuple[int, ...]:
        """Encode the format's fixed words and cache the result for good; never for a client's
        text."""
        ids = self._literals.get(text)
        if ids is None:
            ids = self._literals[text] = tuple(self.encode(text))
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that the token stands for, possibly part of a character; b"" for special
        tokens and for ids without a token."""
        return self._bytes_of[token_id] if 0 <= token_id < self.vocab_size else b""

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD. Special tokens are left
        out, or spelled with their names."""
        names = {} if skip_special_tokens else self._name_by_special
        return b"".join(names[i].encode() if i in names else self.token_bytes(i) for i in ids).decode(
            "utf-8", "replace"
        )

    def _encode_chunk(self, text: str) -> list[int]:
        try:
            # encode_batch_fast releases the GIL, unlike encode, and computes no offsets.
            ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except BaseException as error:
            # What the library calls a panic is not an Exception, and would pass every edge.
            if type(error).__name__ != "PanicException":
                raise
            raise RuntimeError("the tokenizer panicked") from None
        return ids


class IncrementalDecoder:
    """A decoder of one message's tokens, which returns text as tokens come and keeps an unfinished
    character back."""

    def __init__(self, encoding: HarmonyEncoding) -> None:
        self._encoding = encoding
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the characters that this token completes; invalid bytes give U+FFFD, as
        `bytes.decode(errors="replace")` does."""
        return self._utf8.decode(self._encoding.token_bytes(token_id))

    def flush(self) -> str:
        """Return U+FFFD for an unfinished character, or nothing. The decoder is empty
        afterwards."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _bytes_of_tokens(tokenizer: Tokenizer, source: str) -> list[bytes]:
    """Return the bytes of each token by id, b"" for special tokens and gaps."""
    alphabet = byte_alphabet()
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    added = tokenizer.get_added_tokens_decoder()
    table = [b""] * (max(max(vocab.values(), default=-1), max(added, default=-1)) + 1)
    for text, token_id in vocab.items():
        try:
            table[token_id] = bytes(map(alphabet.__getitem__, text))
        except KeyError as error:
            if token_id not in added:
                raise CheckpointError(
                    f"{source} is not a byte-level BPE: the token {text!r} has characters that stand for no "
                    f"byte."
                ) from error
    for token_id, token in added.items():
        table[token_id] = b"" if token.special else token.content.encode()
    return table


def _give_back_free_memory() -> None:
    """Return the free memory that the parser of tokenizer.json keeps to the system: three quarters
    of what it allocated, 260 MB with the vocabulary of gpt-oss."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _chunks(text: str, size: int, max_unbroken: int) -> Iterator[str]:
    begin = 0
    while len(text) - begin > size:
        cut = _CUT.search(text, begin + size, begin + max_unbroken)
        end = cut.end() if cut else begin + max_unbroken
        yield text[begin:end]
        begin = end
    if begin < len(text):
        yield text[begin:]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200]
