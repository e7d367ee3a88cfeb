"""Makes the tokenizer of a checkpoint: a small byte-level BPE for demo models, or gpt-oss's own
vocabulary.

Both split text as o200k does and hold the harmony special tokens, so everything above them treats
them alike.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.harmony.encoding import byte_alphabet
from cluster.harmony.tokenizer_corpus import CORPUS
from workers.errors import ConfigError

if TYPE_CHECKING:
    from openai_harmony import HarmonyEncoding as OracleEncoding

O200K_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""Pattern by which o200k splits text before BPE (tiktoken `tiktoken_ext/openai_public.py`)."""

FORMAT_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)

HARMONY_VOCAB_SIZE = 201_088
NUM_HARMONY_TEXT_TOKENS = 199_998
HARMONY_SPECIAL_IDS = {
    "<|startoftext|>": 199_998,
    "<|endoftext|>": 199_999,
    "<|return|>": 200_002,
    "<|constrain|>": 200_003,
    "<|channel|>": 200_005,
    "<|start|>": 200_006,
    "<|end|>": 200_007,
    "<|message|>": 200_008,
    "<|call|>": 200_012,
}
MIN_VOCAB_SIZE = 256 + len(FORMAT_TOKENS)

Progress = Callable[[str], None]


def write_bpe_tokenizer(path: Path, vocab_size: int = 2048) -> None:
    """Train a byte-level BPE on the built-in corpus and write tokenizer.json and
    tokenizer_config.json into the folder `path`.

    The same size gives the same files on every machine. Text tokens come first; the harmony special
    tokens have the highest ids, with `<|reserved_N|>` in front of them where the corpus gives fewer
    text tokens than there is room for.

    Raises:
        ConfigError: vocab_size has no room for the 256 bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"The vocabulary size {vocab_size} is too small: 256 bytes and the special tokens need at least "
            f"{MIN_VOCAB_SIZE}."
        )
    tokenizer = _with_o200k_pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(FORMAT_TOKENS),
        min_frequency=1,
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    num_text_tokens = tokenizer.get_vocab_size()
    reserved = [
        f"<|reserved_{token_id}|>" for token_id in range(num_text_tokens, vocab_size - len(FORMAT_TOKENS))
    ]
    add_special_tokens(tokenizer, [*reserved, *FORMAT_TOKENS])
    save_tokenizer(tokenizer, path)


def write_harmony_tokenizer(path: Path, progress: Progress | None = None) -> None:
    """Write gpt-oss's own tokenizer (201,088 ids, about 28 MB) as tokenizer.json and
    tokenizer_config.json into the folder `path`.

    The vocabulary comes from the installed `oss-harmony`; nothing is downloaded. Takes some
    seconds.

    Args:
        progress: called with a sentence before each stage.
    Raises:
        ConfigError: the extra `harmony` is not installed.
    """
    report = progress or (lambda _: None)
    try:
        from openai_harmony import load_harmony_encoding
    except ModuleNotFoundError as error:
        raise ConfigError(
            "The gpt-oss vocabulary needs the package oss-harmony: pip install 'cantata[harmony]'."
        ) from error
    report("reading the gpt-oss vocabulary")
    ranks = _text_ranks(load_harmony_encoding("HarmonyGptOss"))
    report("reconstructing the merges")
    alphabet = {byte: character for character, byte in byte_alphabet().items()}
    text = {token: "".join(map(alphabet.__getitem__, token)) for token in ranks}
    merges = [(text[left], text[right]) for left, right in _merges(ranks)]
    report("writing tokenizer.json")
    vocab = {text[token]: rank for token, rank in ranks.items()}
    # ignore_merges: like tiktoken, a piece of text that is a token as a whole is never cut.
    tokenizer = _with_o200k_pipeline(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    names = {token_id: name for name, token_id in HARMONY_SPECIAL_IDS.items()}
    special_ids = range(NUM_HARMONY_TEXT_TOKENS, HARMONY_VOCAB_SIZE)
    add_special_tokens(
        tokenizer, [names.get(token_id, f"<|reserved_{token_id}|>") for token_id in special_ids]
    )
    save_tokenizer(tokenizer, path)


def _text_ranks(oracle: "OracleEncoding") -> dict[bytes, int]:
    decode_bytes = oracle._inner.decode_bytes
    return {bytes(decode_bytes([token_id])): token_id for token_id in range(NUM_HARMONY_TEXT_TOKENS)}


def _merges(ranks: dict[bytes, int]) -> Iterable[tuple[bytes, bytes]]:
    """Return all pairs of tokens whose concatenation is a token, in the order of its rank.

    tiktoken keeps no merges: it joins the neighbours that make the token of lowest rank, whichever
    pair they are. So every cut of a token into two tokens is a merge (as transformers'
    TikTokenConverter does), not only the pair that BPE training joined.
    """
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        known = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        yield from sorted(known, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))


def _with_o200k_pipeline(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(O200K_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def add_special_tokens(tokenizer: Tokenizer, names: list[str]) -> None:
    """Give the special tokens the next ids, in this order."""
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into the folder `path`, which is made."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131_072,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
