"""The demo model's tokenizer: whole words and fixed phrases of its conversations are one token,
everything else is spelled in bytes.

There are no merges, so a word outside the vocabulary has the same tokens wherever it stands:
copying a name that was never seen is copying letters.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from cluster.config import WRAP_UP
from cluster.harmony.encoding import byte_alphabet
from cluster.harmony.make_tokenizer import FORMAT_TOKENS, add_special_tokens, save_tokenizer
from cluster.harmony.render import DEFAULT_KNOWLEDGE_CUTOFF, DEFAULT_MODEL_IDENTITY
from scripts.demo import small_talk, word_lists
from scripts.demo.conversations import SYSTEM_TEXTS, draw
from scripts.demo.examples import EFFORTS, Example, turn_text
from scripts.demo.tool_calls import compact

PHRASES = (
    f"{DEFAULT_MODEL_IDENTITY}\nKnowledge cutoff: {DEFAULT_KNOWLEDGE_CUTOFF}",
    "\nCurrent date: 20",
    *(f"\n\nReasoning: {effort}" for effort in EFFORTS),
    "\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message.",
    "\nCalls to these tools must go to the commentary channel: 'functions'.",
    "# Instructions\n\n",
    "# Tools\n\n## functions\n\nnamespace functions {\n\n",
    "} // namespace functions",
    " = (_: {\n",
    ",\n}) => any;\n\n",
    "?: string",
    ": string",
    ": number",
    ": boolean",
    "type ",
    "// The ",
    "// ",
    " to=functions.",
    " to=assistant",
    "functions.",
    "# Response Formats\n\n## ",
    '"properties":{"',
    '":{"type":"string"',
    '":{"type":"integer"',
    '":{"type":"boolean"',
    '":{"type":"array","items":{"type":"string"}',
    ',"title":"',
    '"required":["',
    '"additionalProperties":false',
    '"type":"object"',
    WRAP_UP,
    *SYSTEM_TEXTS,
)
"""Texts that are one token wherever they stand, most of them the constant parts of prompts."""

_WORDS = (
    *("system", "developer", "user", "assistant", "analysis", "commentary", "final", "json"),
    *(" user", " words", " color", " pet", " first", " product", " town", " weather", " write", " keys"),
    *(" years", " old", " cat", " dog", " search"),
)
"""Words that are tokens although names may be made of them."""

_PATTERN = "|".join(
    (
        *(re.escape(phrase) for phrase in sorted(PHRASES, key=len, reverse=True)),
        # Parts of identifiers never include the blank before them.
        r" ?\p{L}++(?:'\p{L}+)?+(?![_\p{N}])",
        r"\p{L}+",
        r"\p{N}",
        r"[\r\n]+",
        r" ?[^\s\p{L}\p{N}]+",
        r"\s",
    )
)
_SAMPLES = 3000
_LEAST_COUNT = 5
_SEED = 18


def write_tokenizer(path: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into the folder `path`; the same files on
    every machine."""
    letters = {byte: character for character, byte in byte_alphabet().items()}
    known = [*sorted(letters.values()), *("".join(letters[b] for b in text.encode()) for text in _words())]
    vocab = {text: index for index, text in enumerate(dict.fromkeys(known))}
    # ignore_merges: a piece of text that is a token as a whole is that token.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [_split(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    num_reserved = -(len(vocab) + len(FORMAT_TOKENS)) % 32
    reserved = [f"<|reserved_{len(vocab) + index}|>" for index in range(num_reserved)]
    add_special_tokens(tokenizer, [*reserved, *FORMAT_TOKENS])
    save_tokenizer(tokenizer, path)


def _split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")


def _words() -> list[str]:
    """Return the phrases, then the pieces of text that are frequent in the conversations, but for
    those of which names and values are made."""
    counts: Counter[str] = Counter()
    splitter = _split()
    rng = random.Random(_SEED)
    for _ in range(_SAMPLES):
        for text in _texts(draw(rng)):
            counts.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    frequent = sorted(piece for piece, count in counts.items() if count >= _LEAST_COUNT)
    return [*PHRASES, *_WORDS, *(piece for piece in frequent if not _is_spelled(piece))]


def _texts(example: Example) -> Iterator[str]:
    yield from (message.content for message in example.conversation.messages)
    if (shown := example.conversation.response_format) is not None:
        yield compact(shown.schema)
    yield from re.split(r"<\|\w+\|>", turn_text(example.answer))


_PROSE = frozenset(
    re.findall(
        r"[a-z]+",
        " ".join(
            text for topic in small_talk.TOPICS for text in (topic.about, topic.text, *topic.questions)
        ).lower(),
    )
)
_NAMES = frozenset(
    word.lower()
    for words in (
        *(word_lists.VERBS, word_lists.NOUNS, word_lists.TEXT_PARAMETERS, word_lists.NUMBER_PARAMETERS),
        *(word_lists.FLAGS, word_lists.CHOICES, word_lists.FIRST_NAMES, word_lists.CITIES),
        word_lists.TWO_WORDS,
    )
    for word in words
)


def _is_spelled(piece: str) -> bool:
    """Return whether a frequent piece is spelled all the same: a word of names and values, as long
    as it is not part of a sentence of small talk, or a single letter."""
    word = piece.strip()
    if len(word) == 1 and word.isalnum():
        return word not in "IAax" or word == piece
    is_name = word.lower() in _NAMES or word.lower().removesuffix("s") in _NAMES
    return is_name and (piece == word.lower() or word.lower() not in _PROSE)
